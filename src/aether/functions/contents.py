"""Files of the object store under the digest of their bytes, and those of them that are on this machine.

They come in whole before anything is done with them, are kept durably and never changed. What they are, and which of
them are still needed, is for others to know.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Protocol, TypeVar

from aether.apps.tasks import Tasks
from aether.model.errors import DigestMismatch, NotFound, PayloadTooLarge, ServiceUnavailable

UNUSED_SECS = 86_400.0
"""A file that nobody has asked for so long leaves this machine; the object store keeps it."""
CHECKING = ".checking-"
"""Folders so called are taken away at the start of a server."""

_T = TypeVar("_T")
_RECEIVING = ".receiving-"
_GATHERED = 1 << 20
_READ = 1 << 20


class Objects(Protocol):
    """The part of an object store that is needed."""

    async def put(self, key: str, body: AsyncIterator[bytes], size_bytes: int | None = None) -> None: ...

    async def size(self, key: str) -> int: ...

    def read(self, key: str, chunk_bytes: int = 1 << 20, start: int = 0) -> AsyncIterator[bytes]: ...

    async def delete(self, key: str) -> None: ...

    def list(self, prefix: str) -> AsyncIterator[tuple[str, int, float]]:
        """Yield (key, size in bytes, modified at in seconds since the epoch)."""
        ...


@dataclass(frozen=True, slots=True)
class Arrived:
    """A file that has come in whole and is not kept yet."""

    path: Path
    digest: str
    size_bytes: int


class Contents:
    """`folder` is this machine's: files by their digest, and what is being received. `prefix` is that of their keys
    in the object store, `what` they are in words."""

    def __init__(
        self, folder: Path, objects: Objects, *, prefix: str, what: str, max_bytes: int, threads: int = 2
    ) -> None:
        self.folder = folder
        self.objects = objects
        self.prefix = prefix
        self._what = what
        self._max_bytes = max_bytes
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=what.replace(" ", "-"))
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._tasks = Tasks()

    async def open(self, *, sweep: bool = True) -> None:
        """Take away what a killed server left half-done (`sweep`: nobody else is at work in the folder). Raises
        OSError."""

        def prepare() -> None:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if sweep:
                for item in self.folder.iterdir():
                    if item.name.startswith(_RECEIVING):
                        item.unlink()
                    elif item.name.startswith(CHECKING):
                        shutil.rmtree(item)

        await self.run(prepare)

    async def close(self) -> None:
        await self._tasks.close()
        await asyncio.to_thread(self._threads.shutdown, wait=True)

    @asynccontextmanager
    async def arriving(self, body: AsyncIterator[bytes]) -> AsyncGenerator[Arrived]:
        """Take in a file; it is gone on leaving unless it was kept. Raises PayloadTooLarge, ServiceUnavailable, and
        whatever `body` raises."""
        path = self.folder / f"{_RECEIVING}{os.urandom(8).hex()}"
        try:
            digest, size = await self._write(body, path)
            yield Arrived(path, digest, size)
        finally:
            path.unlink(missing_ok=True)

    async def keep(self, arrived: Arrived) -> None:
        """Have it in the object store, and on this machine for the first use. Whoever calls sees to it that nobody
        sweeps the same digest meanwhile. Raises ServiceUnavailable."""
        key = self.prefix + arrived.digest
        try:
            there = await self.objects.size(key) == arrived.size_bytes
        except NotFound:
            there = False
        if not there:
            await self.objects.put(key, self._blocks(arrived.path), arrived.size_bytes)
        try:
            await self.run(lambda: _place(arrived.path, self.folder / arrived.digest))
        except OSError as error:
            raise ServiceUnavailable(f"the {self._what} cannot be written here: {error.strerror}") from error

    async def have(self, digest: str) -> Path:
        """The file on this machine; a caller that goes away ends nobody else's waiting. Raises NotFound when it is
        not stored, DigestMismatch, ServiceUnavailable."""
        target = self.folder / digest
        if not await self.run(lambda: _used(target)):
            task = self._fetching.get(digest)
            if task is None:
                task = self._fetching[digest] = self._tasks.start(self._fetch(digest, target), f"fetch {digest[:12]}")
                task.add_done_callback(lambda _: self._fetching.pop(digest, None))
            await asyncio.shield(task)
        return target

    async def trim(self, unused_secs: float = UNUSED_SECS) -> int:
        """Remove what nobody has asked for so long from this machine; returns how many files."""

        def remove() -> int:
            before = time.time() - unused_secs
            old = [
                item
                for item in self.folder.iterdir()
                if item.name[0] != "." and item.is_file() and item.stat().st_mtime < before
            ]
            for item in old:
                item.unlink(missing_ok=True)
            return len(old)

        return await self.run(remove)

    async def run(self, work: Callable[[], _T]) -> _T:
        """In one of its own threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _fetch(self, digest: str, target: Path) -> None:
        path = self.folder / f"{_RECEIVING}{os.urandom(8).hex()}"
        try:
            try:
                found, _ = await self._write(self.objects.read(self.prefix + digest, _READ), path)
            except NotFound:
                raise NotFound(f"the {self._what} {digest[:12]} is no longer stored") from None
            if found != digest:
                raise DigestMismatch(
                    f"the stored {self._what} {digest[:12]} has changed: its bytes hash to {found[:12]}"
                )
            await self.run(lambda: _place(path, target))
        finally:
            path.unlink(missing_ok=True)

    async def _write(self, body: AsyncIterator[bytes], path: Path) -> tuple[str, int]:
        """Write what comes to a file; returns (digest, size)."""
        hashed = sha256()
        size = 0
        gathered: list[bytes] = []
        held = 0

        def write(blocks: list[bytes]) -> None:
            for block in blocks:
                hashed.update(block)
                out.write(block)

        try:
            # buffered, since its lock keeps a close from coming between when the caller is cancelled
            out = await self.run(lambda: path.open("xb"))
            try:
                async for block in body:
                    size += len(block)
                    held += len(block)
                    if size > self._max_bytes:
                        raise PayloadTooLarge(f"the {self._what} has more than {self._max_bytes} bytes")
                    gathered.append(block)
                    if held >= _GATHERED:
                        await self.run(partial(write, gathered))
                        gathered, held = [], 0
                await self.run(partial(write, gathered))
            finally:
                out.close()
            path.chmod(0o600)
        except OSError as error:
            raise ServiceUnavailable(f"the {self._what} cannot be written here: {error.strerror}") from error
        return hashed.hexdigest(), size

    async def _blocks(self, path: Path) -> AsyncGenerator[bytes]:
        file = await self.run(lambda: path.open("rb"))
        try:
            while block := await self.run(lambda: file.read(_READ)):
                yield block
        finally:
            file.close()


def _place(path: Path, target: Path) -> None:
    """Durably, since a name that is there vouches for what it names."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    path.replace(target)


def _used(path: Path) -> bool:
    """Whether it is there; if so, it was needed now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
