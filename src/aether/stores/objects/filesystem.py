"""A directory as object store, with the two-phase contract that S3 has.

    .parts/<id>            being received; unknown to everybody else, swept at the next start
    .multipart/<id>/       parts of an upload (`aether.stores.objects.multipart`)
    pending/<upload>       received in full, still replaceable by its signed URL
    claimed/<upload>       out of every URL's reach, being verified
    artifacts/...          final, read-only

An object changes place only by rename. Uploads are not flushed to the disk until `move`: before that the bytes are
worth nothing, because they are hashed again whenever somebody wants to use them; an acknowledged PUT still
survives kill -9, since its bytes are the kernel's by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from aether.model.errors import BadRequest, Forbidden, NotFound, ServiceUnavailable
from aether.model.objects import Part, SignedRequest
from aether.stores.objects.multipart import Multiparts
from aether.stores.objects.parts import check_number
from aether.stores.objects.receiving import PartialObject, in_thread, sweep, sync_folder
from aether.stores.objects.signing import Grant, UrlSigner, check_key

_P = ParamSpec("_P")
_T = TypeVar("_T")
_BUFFER_BYTES = 1 << 20
_PENDING, _CLAIMED, _PARTS, _MULTIPART = "pending/", "claimed/", ".parts", ".multipart"


class Allowed(Protocol):
    """The part of a checked URL that receiving needs."""

    @property
    def key(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def multipart_id(self) -> str: ...
    @property
    def part(self) -> int: ...


class FilesystemObjects:
    """Objects below `root`, which must be one filesystem. Signed URLs begin with `base_url`, which may be empty."""

    def __init__(
        self, root: Path, signer: UrlSigner, *, base_url: str = "", threads: int = 4, flushes: int = 4
    ) -> None:
        self._root = root
        self._signer = signer
        self._base_url = base_url.rstrip("/")
        self._parts = root / _PARTS
        self._multiparts = Multiparts(root / _MULTIPART, self._parts)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="objects")
        # these wait for the disk, which flushes many together as fast as one, and need no CPU meanwhile
        self._flushing = ThreadPoolExecutor(flushes, thread_name_prefix="flushes")

    async def open(self) -> None:
        """Make the folders and sweep what a killed server was receiving. Raises OSError."""

        def prepare() -> None:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._parts.mkdir(mode=0o700, exist_ok=True)
            sweep(self._parts)
            self._multiparts.sweep()

        await self._run(prepare)

    async def close(self) -> None:
        for threads in (self._threads, self._flushing):
            await asyncio.to_thread(threads.shutdown, wait=True)

    async def check(self) -> None:
        """Readiness: the folder can be written to. Raises ServiceUnavailable."""

        def probe() -> None:
            if not os.access(self._parts, os.W_OK):
                raise ServiceUnavailable("the object folder cannot be written to")
            if os.statvfs(self._root).f_bavail == 0:
                raise ServiceUnavailable("the disk that holds the artifacts is full")

        await self._run(probe)

    # --- the registry's port

    async def sign_put(
        self, key: str, size_bytes: int, expires_secs: int, *, sha256: str | None = None
    ) -> SignedRequest:
        """`sha256` is not enforced here: the registry hashes every byte anyway."""
        return self._signed("PUT", key, expires_secs, size=size_bytes)

    async def sign_get(self, key: str, expires_secs: int, filename: str) -> SignedRequest:
        return self._signed("GET", key, expires_secs, filename=filename)

    async def begin_multipart(self, key: str) -> str:
        return await self._run(self._multiparts.begin, key)

    async def sign_part(
        self, key: str, multipart_id: str, number: int, size_bytes: int, expires_secs: int
    ) -> SignedRequest:
        check_number(number)
        return self._signed("PUT", key, expires_secs, multipart=multipart_id, part=number, size=size_bytes)

    async def parts(self, key: str, multipart_id: str) -> list[Part]:
        return await self._run(self._multiparts.parts, key, multipart_id)

    async def finish_multipart(self, key: str, multipart_id: str, parts: Sequence[tuple[int, str]]) -> None:
        def finish() -> None:
            try:
                self._multiparts.finish(key, multipart_id, parts, self._path(key))
            except NotFound:
                if not self._path(key).exists() and not self._path(_claimed(key)).exists():
                    raise

        await self._run(finish)

    async def abort_multipart(self, key: str, multipart_id: str) -> None:
        await self._run(self._multiparts.abort, key, multipart_id)

    async def multipart_uploads(self, prefix: str) -> AsyncIterator[tuple[str, str, float]]:
        for found in await self._run(self._multiparts.uploads, prefix):
            yield found

    async def put(self, key: str, body: AsyncIterator[bytes], size_bytes: int | None = None) -> None:
        target = self._path(key)
        received = PartialObject(self._parts, size_bytes, lambda part, _: self._move(part, target), self._threads)
        await received.begin()
        try:
            async for block in body:
                await received.add(memoryview(block))
            await received.finish()
        finally:
            await received.abort()

    async def size(self, key: str) -> int:
        return await self._run(lambda: os.stat(self._path(key)).st_size)

    async def read(self, key: str, chunk_bytes: int = 1 << 20, start: int = 0) -> AsyncGenerator[bytes]:
        descriptor = await self._run(os.open, self._path(key), os.O_RDONLY | os.O_CLOEXEC)
        try:
            offset = start
            while block := await self._run(os.pread, descriptor, chunk_bytes, offset):
                offset += len(block)
                yield block
        finally:
            os.close(descriptor)

    async def sha256(self, key: str) -> tuple[str, int]:
        return await self._run(_hash, self._path(key))

    async def kept_sha256(self, key: str) -> str | None:
        await self.size(key)
        return None

    async def claim(self, key: str) -> str:
        path, claimed = self._path(key), _claimed(key)
        if claimed == key:
            raise BadRequest("only a pending object can be claimed")

        def rename() -> str:
            target = self._path(claimed)
            if not target.exists():
                target.parent.mkdir(mode=0o700, exist_ok=True)
                try:
                    os.rename(path, target)
                except FileNotFoundError:
                    if not target.exists():  # else somebody else was faster
                        raise
            return claimed

        return await self._run(rename)

    async def move(self, source: str, target: str) -> None:
        await in_thread(self._flushing, lambda: self._move(self._path(source), self._path(target)))

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
        """Begin to receive an object or a part. Raises ServiceUnavailable when it cannot fit on the disk, NotFound
        when the upload in parts is over."""
        target = self._path(grant.key)
        if grant.multipart_id:
            await self.parts(grant.key, grant.multipart_id)

        def publish(part: Path, etag: str) -> None:
            if grant.multipart_id:
                self._multiparts.add(grant.key, grant.multipart_id, grant.part, part, etag)
            else:
                target.parent.mkdir(mode=0o700, exist_ok=True)
                part.rename(target)

        return await PartialObject(self._parts, grant.size_bytes, publish, self._threads).begin()

    # --- small things

    def _signed(self, method: str, key: str, expires_secs: int, **fields: str | int) -> SignedRequest:
        path, expires_at = self._signer.sign(method, key, expires_secs, **fields)
        return SignedRequest(method, self._base_url + path, {}, expires_at)

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
                if source.exists():
                    continue
                if target.exists():
                    break  # somebody else has just moved it
                raise
        folder = target.parent
        while folder != self._root.parent:
            sync_folder(folder)
            folder = folder.parent

    def _walk(self, prefix: str) -> list[tuple[str, int, float]]:
        found: list[tuple[str, int, float]] = []
        for folder, folders, files in os.walk(self._root / prefix.rpartition("/")[0]):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                path = os.path.join(folder, name)
                key = os.path.relpath(path, self._root)
                with contextlib.suppress(FileNotFoundError):
                    if key.startswith(prefix):
                        stat = os.stat(path)
                        found.append((key, stat.st_size, stat.st_mtime))
        return sorted(found)

    async def _run(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await in_thread(self._threads, lambda: work(*args, **kwargs))


def _claimed(key: str) -> str:
    return _CLAIMED + key.removeprefix(_PENDING) if key.startswith(_PENDING) else key


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
