"""What is sent of a file: the whole or a part of it, read in blocks and counted as it leaves."""

from __future__ import annotations

import os

from aether.model.errors import LocalIOError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Sent = Callable[[int], None]

MD5_BLOCK_BYTES = 1024 * 1024


class SourceFile:
    """An open file of `size` bytes, for any number of readers at once. Raises LocalIOError when it cannot be read."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise LocalIOError(f"cannot read {path}: {error.strerror}") from error
        self.size = os.fstat(self._descriptor).st_size

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def part(self, offset: int, size: int, on_sent: Sent) -> FilePart:
        return FilePart(self, offset, size, on_sent)

    def read_at(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises LocalIOError when the file has become shorter."""
        try:
            block = os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise LocalIOError(f"cannot read {self._path}: {error.strerror}") from error
        if len(block) != size:
            raise LocalIOError(f"{self._path} changed while it was being sent")
        return block

    def md5(self, offset: int, size: int) -> str:
        """What object stores name parts by; it guards against mix-ups, not against forgers."""
        import hashlib

        digest = hashlib.md5(usedforsecurity=False)
        for at in range(offset, offset + size, MD5_BLOCK_BYTES):
            digest.update(self.read_at(at, min(MD5_BLOCK_BYTES, offset + size - at)))
        return digest.hexdigest()


class FilePart:
    """`size` bytes of a file from `offset` on, to be sent once. `on_sent` gets the bytes that have left so far; what
    it raises ends the sending."""

    def __init__(self, source: SourceFile, offset: int, size: int, on_sent: Sent) -> None:
        self.size = size
        self._source = source
        self._offset = offset
        self._sent = 0
        self._on_sent = on_sent

    def read(self, size: int = -1, /) -> bytes:
        """The next block. http.client calls it once the block before has been handed to the kernel."""
        self._on_sent(self._sent)
        left = self.size - self._sent
        block = self._source.read_at(self._offset + self._sent, left if size < 0 else min(size, left))
        self._sent += len(block)
        return block
