# The same names as ./dev.sh, for those whose fingers type make.
.PHONY: bootstrap verify run test lint bench db-start schema-drift clean
bootstrap verify run test lint bench db-start schema-drift clean:
	@./dev.sh $@
