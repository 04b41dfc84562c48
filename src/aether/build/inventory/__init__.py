"""What is installed in an artifact: packages, how they hang together, and whether their bytes are the promised ones.

`bill` is the facade; `contents` what was packed; `node` and `python` find packages; `npm_lock`, `yarn_lock` and
`pnpm_lock` read what lockfiles promise; `evidence` compares installed bytes with what package managers keep.
Writing it down is left to `aether.artifact.sbom_document`.
"""
