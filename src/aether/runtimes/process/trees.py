"""The code of functions as folders, which sandboxes show read-only."""

from __future__ import annotations

import tempfile
from pathlib import Path

from aether.artifact.extract import ExtractLimits, flush
from aether.model.function_instance import CodeForm
from aether.runtimes.code import LIMITS, CodeStore, unpacker
from aether.runtimes.locks import PART

MAKER = "tree-1"


class TreeStore(CodeStore[Path]):
    """Unpacked code in a folder of this machine."""

    def __init__(self, folder: Path, *, limits: ExtractLimits = LIMITS) -> None:
        super().__init__(folder, MAKER, limits)

    def _make(self, archive: Path, form: CodeForm, key: str) -> None:
        with tempfile.TemporaryDirectory(prefix=key + PART, dir=self.folder) as work:
            tree = Path(work) / "tree"
            unpacker(form)(archive, tree, self._limits)
            flush(tree)  # what has its final name is whole, also after the machine was lost
            tree.rename(self.folder / key)

    def _found(self, key: str) -> Path | None:
        target = self.folder / key
        return target if target.is_dir() else None

    def _parts(self, key: str) -> tuple[Path, ...]:
        return (self.folder / key,)
