"""Receiving bytes into a file that nobody sees before it is whole, for the directory store.

What is received lies below `.parts/` and is locked by whoever receives it: `sweep` takes away what nobody holds any
more. Where a finished file goes is the caller's to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

from isal import isal_zlib

from aether.model.errors import BadRequest, NotFound, ServiceUnavailable
from aether.model.names import new_id

_T = TypeVar("_T")
_crc32: Callable[[memoryview, int], int] = cast("Any", isal_zlib).crc32


async def in_thread(threads: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
    """Run `work`; what the operating system says becomes NotFound or ServiceUnavailable."""
    with _translated():
        return await asyncio.get_running_loop().run_in_executor(threads, work)


@contextlib.contextmanager
def _translated() -> Generator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound("the object does not exist") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = {"reason": "disk_full"}  # so that a client does not wait for it to pass
            raise ServiceUnavailable("the disk that holds the artifacts is full; nothing was kept", full) from error
        raise ServiceUnavailable(f"the object store cannot answer: {error.strerror}") from error


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Take away what a killed server was receiving or throwing away."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
            continue
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


class PartialObject:
    """An object that is being received; invisible until `finish`.

    `size` is what must arrive, None for whatever comes. `publish` gets the whole file and its ETag, and puts it where
    it belongs.
    """

    def __init__(
        self, folder: Path, size: int | None, publish: Callable[[Path, str], None], threads: ThreadPoolExecutor
    ) -> None:
        self._part = folder / f"{new_id()}.part"
        self._size = size
        self._publish = publish
        self._threads = threads
        self._descriptor = -1
        self._written = 0
        self._checksum = 0
        self._given_up = False
        # A cancelled caller may abort while its last write is still in a thread: the descriptor must not be
        # closed, and its number reused, under that write.
        self._lock = threading.Lock()

    async def begin(self) -> PartialObject:
        """Raises ServiceUnavailable when it cannot fit on the disk."""
        try:
            await in_thread(self._threads, self._begin)
        except asyncio.CancelledError:
            self._given_up = True
            self._threads.submit(self._abort)
            raise
        return self

    async def add(self, block: memoryview) -> None:
        """Append; the caller may reuse the block's memory afterwards. Raises ServiceUnavailable when the disk
        is full."""
        await in_thread(self._threads, lambda: self._add(block))

    async def finish(self) -> str:
        """Publish, replacing what was there; returns the ETag. Raises BadRequest unless the size is exact."""
        return await in_thread(self._threads, self._finish)

    async def abort(self) -> None:
        """Leave nothing behind; after `finish` it does nothing."""
        if self._descriptor >= 0:
            await in_thread(self._threads, self._abort)

    def _begin(self) -> None:
        with self._lock:
            if self._given_up:
                return
            disk = os.statvfs(self._part.parent)
            if disk.f_bavail * disk.f_frsize < (self._size or 0):
                raise OSError(errno.ENOSPC, "no space")
            self._descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def _add(self, block: memoryview) -> None:
        with self._lock:
            while self._descriptor >= 0 and block:
                written = os.write(self._descriptor, block)
                self._checksum = _crc32(block[:written], self._checksum)
                self._written += written
                block = block[written:]

    def _finish(self) -> str:
        with self._lock:
            if self._descriptor < 0:
                raise BadRequest("the upload was given up; nothing was kept")
            if self._size is not None and self._written != self._size:
                raise BadRequest(f"{self._written} bytes arrived, {self._size} were announced; nothing was kept")
            # Names content, so that a part sent twice is the same part. It guards against mix-ups, not against
            # forgers: who uploads may upload anything, and the registry hashes all of it.
            etag = f"{self._checksum:08x}{self._written:x}"
            self._publish(self._part, etag)
            self._close()
            return etag

    def _abort(self) -> None:
        with self._lock:
            if self._descriptor >= 0:
                self._close()
                self._part.unlink(missing_ok=True)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)
