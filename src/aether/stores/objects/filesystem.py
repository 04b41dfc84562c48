"""A directory as object store, with the two-phase contract that S3 has.

    .parts/<id>            being received; unknown to everybody else, swept at the next start
    pending/<upload>       received in full, still replaceable by its signed URL
    claimed/<upload>       out of every URL's reach, being verified
    artifacts/...          final, read-only

An object changes place only by rename. Nothing is flushed to the disk until `move`: before that the bytes are
worth nothing, because they are hashed again whenever somebody wants to use them; an acknowledged PUT still
survives kill -9, since its bytes are the kernel's by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from aether.model.errors import BadRequest, Forbidden, NotFound, ServiceUnavailable
from aether.model.names import new_id
from aether.model.objects import SignedRequest
from aether.stores.objects.signing import Grant, UrlSigner, check_key

_P = ParamSpec("_P")
_T = TypeVar("_T")
_BUFFER_BYTES = 1 << 20
_PENDING, _CLAIMED, _PARTS = "pending/", "claimed/", ".parts"


class Allowed(Protocol):
    """The part of a checked URL that receiving needs."""

    @property
    def key(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...


class FilesystemObjects:
    """Objects below `root`, which must be one filesystem and belong to one server at a time."""

    def __init__(self, root: Path, signer: UrlSigner, *, threads: int = 4) -> None:
        self._root = root
        self._signer = signer
        self._parts = root / _PARTS
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="objects")

    async def open(self) -> None:
        """Make the folders and sweep what a killed server was receiving. Raises OSError."""

        def prepare() -> None:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.rmtree(self._parts, ignore_errors=True)
            self._parts.mkdir(mode=0o700)

        await self._run(prepare)

    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown, wait=True)

    async def check(self) -> None:
        """Readiness: the folder can be written to. Raises ServiceUnavailable."""

        def probe() -> None:
            if not os.access(self._parts, os.W_OK):
                raise ServiceUnavailable("the object folder cannot be written to")
            if os.statvfs(self._root).f_bavail == 0:
                raise ServiceUnavailable("the disk that holds the artifacts is full")

        await self._run(probe)

    # --- the registry's port

    def sign_put(self, key: str, size_bytes: int, expires_secs: int) -> SignedRequest:
        url, expires_at = self._signer.sign("PUT", key, expires_secs, size=size_bytes)
        return SignedRequest("PUT", url, {}, expires_at)

    def sign_get(self, key: str, expires_secs: int, filename: str) -> SignedRequest:
        url, expires_at = self._signer.sign("GET", key, expires_secs, filename=filename)
        return SignedRequest("GET", url, {}, expires_at)

    async def size(self, key: str) -> int:
        return await self._run(lambda: os.stat(self._path(key)).st_size)

    async def read(self, key: str, chunk_bytes: int = 1 << 20) -> AsyncGenerator[bytes]:
        descriptor = await self._run(os.open, self._path(key), os.O_RDONLY | os.O_CLOEXEC)
        try:
            offset = 0
            while block := await self._run(os.pread, descriptor, chunk_bytes, offset):
                offset += len(block)
                yield block
        finally:
            os.close(descriptor)

    async def sha256(self, key: str) -> tuple[str, int]:
        return await self._run(_hash, self._path(key))

    async def claim(self, key: str) -> str:
        path = self._path(key)
        if not key.startswith(_PENDING):
            raise BadRequest("only a pending object can be claimed")
        claimed = _CLAIMED + key.removeprefix(_PENDING)

        def rename() -> str:
            target = self._path(claimed)
            if not target.exists():
                target.parent.mkdir(mode=0o700, exist_ok=True)
                os.rename(path, target)
            return claimed

        return await self._run(rename)

    async def move(self, source: str, target: str) -> None:
        await self._run(self._move, self._path(source), self._path(target))

    async def delete(self, key: str) -> None:
        path = self._path(key)

        def unlink() -> None:
            path.unlink(missing_ok=True)
            folder = path.parent
            while folder.parent != self._root and folder != self._root:
                try:
                    folder.rmdir()
                except OSError:
                    return  # in use again, or gone already
                folder = folder.parent

        await self._run(unlink)

    def local_path(self, key: str) -> str | None:
        return str(self._path(key))

    async def list(self, prefix: str) -> AsyncIterator[tuple[str, int, float]]:
        for found in await self._run(self._walk, prefix):
            yield found

    # --- the HTTP side

    def authorize(self, method: str, key: str, query: str) -> Grant:
        """Raises Forbidden unless the URL was signed here and is fresh; a PUT reaches pending objects only."""
        grant = self._signer.check(method, key, query)
        if method == "PUT" and not key.startswith(_PENDING):
            raise Forbidden("only a pending object can be written")
        return grant

    async def receive(self, grant: Allowed) -> PartialObject:
        """Begin to receive an object. Raises ServiceUnavailable when it cannot fit on the disk."""

        def begin() -> int:
            disk = os.statvfs(self._parts)
            if disk.f_bavail * disk.f_frsize < grant.size_bytes:
                raise OSError(errno.ENOSPC, "no space")
            return os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

        part = self._parts / f"{new_id()}.part"
        return PartialObject(await self._run(begin), part, self._path(grant.key), grant.size_bytes, self._threads)

    # --- in threads

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _move(self, source: Path, target: Path) -> None:
        try:
            descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if target.exists():
                return
            raise
        try:
            os.fchmod(descriptor, 0o400)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        while True:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                os.rename(source, target)
                break
            except FileNotFoundError:
                # A delete beside us may have pruned the empty folder between mkdir and rename.
                if not source.exists():
                    raise
        folder = target.parent
        while folder != self._root.parent:
            _sync_folder(folder)
            folder = folder.parent

    def _walk(self, prefix: str) -> list[tuple[str, int, float]]:
        found: list[tuple[str, int, float]] = []
        for folder, folders, files in os.walk(self._root / prefix.rstrip("/")):
            if _PARTS in folders:
                folders.remove(_PARTS)
            for name in files:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    stat = os.stat(path)
                    found.append((os.path.relpath(path, self._root), stat.st_size, stat.st_mtime))
        return sorted(found)

    async def _run(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await _in_thread(self._threads, lambda: work(*args, **kwargs))


class PartialObject:
    """An object that is being received; invisible until `finish`."""

    def __init__(self, descriptor: int, part: Path, target: Path, size: int, threads: ThreadPoolExecutor) -> None:
        self._descriptor = descriptor
        self._part = part
        self._target = target
        self._size = size
        self._threads = threads
        self._written = 0
        self._open = True
        # A cancelled caller may abort while its last write is still in a thread: the descriptor must not be
        # closed, and its number reused, under that write.
        self._lock = threading.Lock()

    async def add(self, block: memoryview) -> None:
        """Append; the caller may reuse the block's memory afterwards. Raises ServiceUnavailable when the disk
        is full."""
        await self._run(self._add, block)

    async def finish(self) -> None:
        """Publish under the key, replacing what was there. Raises BadRequest unless the size is exact."""
        await self._run(self._finish)

    async def abort(self) -> None:
        """Leave nothing behind; after `finish` it does nothing."""
        if self._open:
            await self._run(self._abort)

    def _add(self, block: memoryview) -> None:
        with self._lock:
            while self._open and block:
                written = os.write(self._descriptor, block)
                self._written += written
                block = block[written:]

    def _finish(self) -> None:
        with self._lock:
            if not self._open:
                raise BadRequest("the upload was given up; nothing was kept")
            if self._written != self._size:
                raise BadRequest(f"{self._written} bytes arrived, {self._size} were announced; nothing was kept")
            self._target.parent.mkdir(mode=0o700, exist_ok=True)
            os.rename(self._part, self._target)
            self._open = False
            os.close(self._descriptor)

    def _abort(self) -> None:
        with self._lock:
            if self._open:
                self._open = False
                os.close(self._descriptor)
                self._part.unlink(missing_ok=True)

    async def _run(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await _in_thread(self._threads, lambda: work(*args, **kwargs))


async def _in_thread(threads: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
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
            raise ServiceUnavailable("the disk that holds the artifacts is full; nothing was kept") from error
        raise ServiceUnavailable(f"the object store cannot answer: {error.strerror}") from error


def _hash(path: Path) -> tuple[str, int]:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    size = 0
    with open(path, "rb", buffering=0) as source:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := source.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return digest.hexdigest(), size


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
