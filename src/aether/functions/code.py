"""Code of functions: taken in and judged, kept in the object store under its digest, and fetched onto this machine.

An archive is unpacked once when it comes, by the readers that will unpack it for an image, and thrown away again:
what may not be unpacked, or lacks its entrypoint, is refused at the upload and not at the first call. Which code is
still needed is the catalogue's to know (`aether.functions.retention`).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
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
from aether.artifact.extract import ExtractLimits, extract
from aether.artifact.unzip import unzip
from aether.model.errors import BadRequest, DigestMismatch, NotFound, PayloadTooLarge, ServiceUnavailable
from aether.model.function_instance import Code, CodeForm

PREFIX = "functions/"
"""Of the keys in the object store; the digest follows."""
MAX_CODE_BYTES = 256 << 20
"""Of an archive."""
LIMITS = ExtractLimits(max_bytes=1 << 30, max_entries=100_000, max_ratio=200)
"""Of what comes out of it; those of whoever makes images of it."""
UNUSED_SECS = 86_400.0
"""An archive that nobody has fetched for so long leaves this machine; the object store keeps it."""

_T = TypeVar("_T")
_RECEIVING = ".receiving-"
_CHECKING = ".checking-"
_GATHERED = 1 << 20
_READ = 1 << 20
_ZIP = (b"PK\3\4", b"PK\5\6")
_GZIP = b"\x1f\x8b"


class CodeObjects(Protocol):
    """The part of an object store that code needs."""

    async def put(self, key: str, body: AsyncIterator[bytes], size_bytes: int | None = None) -> None: ...

    async def size(self, key: str) -> int: ...

    def read(self, key: str, chunk_bytes: int = 1 << 20, start: int = 0) -> AsyncIterator[bytes]: ...

    async def delete(self, key: str) -> None: ...

    def list(self, prefix: str) -> AsyncIterator[tuple[str, int, float]]:
        """Yield (key, size in bytes, modified at in seconds since the epoch)."""
        ...


@dataclass(frozen=True, slots=True)
class Received:
    """An archive that has come in whole and is not kept yet."""

    path: Path
    digest: str
    form: CodeForm
    size_bytes: int


class CodeStore:
    """`folder` is this machine's: archives by their digest, and what is being received."""

    def __init__(
        self,
        folder: Path,
        objects: CodeObjects,
        *,
        max_bytes: int = MAX_CODE_BYTES,
        limits: ExtractLimits = LIMITS,
        threads: int = 2,
    ) -> None:
        self._folder = folder
        self.objects = objects
        self._max_bytes = max_bytes
        self._limits = limits
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="code")
        # apart, so that nobody waits for an archive of somebody else's to be unpacked
        self._checks = ThreadPoolExecutor(threads, thread_name_prefix="code-checks")
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._tasks = Tasks()

    async def open(self, *, sweep: bool = True) -> None:
        """Take away what a killed server left half-done (`sweep`: nobody else is at work in the folder). Raises
        OSError."""

        def prepare() -> None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if sweep:
                for item in self._folder.iterdir():
                    if item.name.startswith(_RECEIVING):
                        item.unlink()
                    elif item.name.startswith(_CHECKING):
                        shutil.rmtree(item)

        await self._run(prepare)

    async def close(self) -> None:
        await self._tasks.close()
        for threads in (self._threads, self._checks):
            await asyncio.to_thread(threads.shutdown, wait=True)

    @asynccontextmanager
    async def receiving(self, body: AsyncIterator[bytes], form: CodeForm | None = None) -> AsyncGenerator[Received]:
        """Take in an archive; it is gone on leaving unless it was kept. `form` is what its sender says; without, and
        for zip and tar.gz, what it begins with decides.

        Raises BadRequest, PayloadTooLarge, and whatever `body` raises."""
        path = self._folder / f"{_RECEIVING}{os.urandom(8).hex()}"
        try:
            digest, size = await self._write(body, path)
            yield Received(path, digest, await self._run(lambda: _form(path, form)), size)
        finally:
            path.unlink(missing_ok=True)

    async def check(self, received: Received, entrypoint: str) -> None:
        """Unpack it as it will be unpacked, and look for the entrypoint. Raises BadRequest, and ServiceUnavailable
        when there is no room for it."""

        def unpack() -> None:
            with tempfile.TemporaryDirectory(prefix=_CHECKING, dir=self._folder) as work:
                tree = Path(work) / "tree"
                match received.form:
                    case CodeForm.ZIP:
                        unzip(received.path, tree, limits=self._limits)
                    case CodeForm.TAR_GZ:
                        extract(received.path, tree, limits=self._limits, plain=True)
                    case CodeForm.ARTIFACT:
                        extract(received.path, tree, limits=self._limits)
                # its links do not lead out, or it had been refused
                if not (tree / entrypoint).is_file():
                    raise BadRequest(
                        f"the code has no file '{entrypoint}', which is the function's entrypoint",
                        {"field": "entrypoint"},
                    )

        try:
            await asyncio.get_running_loop().run_in_executor(self._checks, unpack)
        except OSError as error:
            raise ServiceUnavailable(f"the code cannot be unpacked here: {error.strerror}") from error

    async def keep(self, received: Received) -> None:
        """Have it in the object store, and on this machine for the first call. Whoever calls sees to it that nobody
        sweeps the same digest meanwhile. Raises ServiceUnavailable."""
        key = PREFIX + received.digest
        try:
            there = await self.objects.size(key) == received.size_bytes
        except NotFound:
            there = False
        if not there:
            await self.objects.put(key, self._blocks(received.path), received.size_bytes)
        try:
            await self._run(lambda: _place(received.path, self._folder / received.digest))
        except OSError as error:
            raise ServiceUnavailable(f"the code cannot be written here: {error.strerror}") from error

    async def fetch(self, digest: str, form: CodeForm) -> Code:
        """The archive on this machine; a caller that goes away ends nobody else's waiting. Raises NotFound when it is
        not stored, DigestMismatch, ServiceUnavailable."""
        target = self._folder / digest
        if not await self._run(lambda: _used(target)):
            task = self._fetching.get(digest)
            if task is None:
                task = self._fetching[digest] = self._tasks.start(self._fetch(digest, target), f"fetch {digest[:12]}")
                task.add_done_callback(lambda _: self._fetching.pop(digest, None))
            await asyncio.shield(task)
        return Code(target, form, digest)

    async def trim(self, unused_secs: float = UNUSED_SECS) -> int:
        """Remove what nobody has fetched for so long from this machine; returns how many archives."""

        def remove() -> int:
            before = time.time() - unused_secs
            old = [
                item
                for item in self._folder.iterdir()
                if item.name[0] != "." and item.is_file() and item.stat().st_mtime < before
            ]
            for item in old:
                item.unlink(missing_ok=True)
            return len(old)

        return await self._run(remove)

    async def _fetch(self, digest: str, target: Path) -> None:
        path = self._folder / f"{_RECEIVING}{os.urandom(8).hex()}"
        try:
            try:
                found, _ = await self._write(self.objects.read(PREFIX + digest, _READ), path)
            except NotFound:
                raise NotFound(f"the code {digest[:12]} is no longer stored") from None
            if found != digest:
                raise DigestMismatch(f"the stored code {digest[:12]} has changed: its bytes hash to {found[:12]}")
            await self._run(lambda: _place(path, target))
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
            out = await self._run(lambda: path.open("xb"))
            try:
                async for block in body:
                    size += len(block)
                    held += len(block)
                    if size > self._max_bytes:
                        raise PayloadTooLarge(f"the code has more than {self._max_bytes} bytes")
                    gathered.append(block)
                    if held >= _GATHERED:
                        await self._run(partial(write, gathered))
                        gathered, held = [], 0
                await self._run(partial(write, gathered))
            finally:
                out.close()
            path.chmod(0o600)
        except OSError as error:
            raise ServiceUnavailable(f"the code cannot be written here: {error.strerror}") from error
        return hashed.hexdigest(), size

    async def _blocks(self, path: Path) -> AsyncGenerator[bytes]:
        file = await self._run(lambda: path.open("rb"))
        try:
            while block := await self._run(lambda: file.read(_READ)):
                yield block
        finally:
            file.close()

    async def _run(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _form(path: Path, said: CodeForm | None) -> CodeForm:
    with path.open("rb") as file:
        start = file.read(4)
    found = CodeForm.ZIP if start in _ZIP else CodeForm.TAR_GZ if start.startswith(_GZIP) else None
    if found is None:
        raise BadRequest("the code is neither a zip nor a tar.gz archive")
    if said is None or said is found:
        return found
    if said is CodeForm.ARTIFACT and found is CodeForm.TAR_GZ:
        return said
    raise BadRequest(f"the code was announced as {said.value} and is a {found.value} archive")


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
