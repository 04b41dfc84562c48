# The same names as ./dev.sh, for those whose fingers type make.
.PHONY: bootstrap verify run test lint bench db-start clean
bootstrap verify run test lint bench db-start clean:
	@./dev.sh $@
