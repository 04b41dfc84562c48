"""The body of an upload: a file that is read in blocks, counted as it leaves, and can be sent again."""

from __future__ import annotations

import os

from aether.model.errors import LocalIOError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class FileBody:
    """An open file of `size` bytes. Raises LocalIOError when it cannot be read or changes its size under way."""

    def __init__(self, path: str, progress: Callable[[int], None] | None = None) -> None:
        self._path = path
        self._progress = progress
        self._sent = 0
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise LocalIOError(f"cannot read {path}: {error.strerror}") from error
        self.size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> FileBody:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def rewound(self) -> FileBody:
        """The same body from its first byte, for another attempt."""
        self._file.seek(0)
        self._sent = 0
        return self

    def read(self, size: int = -1, /) -> bytes:
        """The next block. http.client calls it once the block before has been handed to the kernel."""
        if self._progress is not None:
            self._progress(self._sent)
        try:
            block = self._file.read(size)
        except OSError as error:
            raise LocalIOError(f"cannot read {self._path}: {error.strerror}") from error
        self._sent += len(block)
        if self._sent > self.size or (not block and self._sent < self.size):
            raise LocalIOError(f"{self._path} changed while it was being sent")
        return block
