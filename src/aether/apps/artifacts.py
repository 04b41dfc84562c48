"""Unpacked artifacts on this machine: `releases/<app>/<digest>`, made once, complete or absent, shared by callers.

Reading the archive safely is left to `aether.artifact.extract`; when to unpack and what to keep, to the engine.
Hashing and unpacking run in threads of their own.

A machine that loses power may keep a folder and lose what is in its files. Flushing a large tree takes seconds, which
no deployment should wait for: a mark that names this boot of the machine is on the disk before the folder is there,
and goes once the folder is flushed. A folder with the mark of another boot is unpacked again; after a kill alone the
files are whole. A process of its own flushes: no signal ends a flush, and the server must be able to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import structlog

from aether.apps.ports import ArtifactObjects
from aether.apps.tasks import Tasks
from aether.artifact.extract import ExtractLimits, extract, sweep
from aether.model.errors import DigestMismatch, NotFound, ServiceUnavailable

_T = TypeVar("_T")
_DISCARDED = ".discarded-"
_FETCHED = ".fetched-"
_UNFLUSHED = ".unflushed-"
_SYNC_ENDS_SECS = 0.5
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BLOCK = 1 << 20
_PATIENCE_SECS = 60.0
_FIRST_WAIT_SECS = 0.25
_LONGEST_WAIT_SECS = 4.0
_log = structlog.stdlib.get_logger("aether.apps")


class UnpackedArtifacts:
    """Implements `ArtifactSource` below the folder `root`, which belongs to one server at a time."""

    def __init__(
        self,
        root: Path,
        objects: ArtifactObjects,
        *,
        limits: ExtractLimits | None = None,
        threads: int = 2,
        boot_id: str | None = None,
    ) -> None:
        self._root = root
        self._objects = objects
        self._limits = limits
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="unpack")
        self._flushing = asyncio.Lock()
        self._boot_id = _this_boot() if boot_id is None else boot_id
        """Empty where it cannot be told: then every folder is flushed before it is there."""
        self._under_way: dict[Path, asyncio.Task[Path]] = {}
        self._tasks = Tasks()

    async def open(self, *, sweep: bool = True) -> None:
        """Take away what a killed server or a power cut left half-done (`sweep`: nobody else is at work in the
        folder). Raises OSError."""
        if not sweep:
            return
        for unflushed in await self._run(self._sweep):
            self._flush_later(unflushed)

    async def close(self) -> None:
        await self._tasks.close()
        await asyncio.to_thread(self._threads.shutdown, wait=True)

    async def unpack(self, app: str, digest: str, content_digest: str | None) -> Path:
        """Raises NotFound without the object, DigestMismatch when it is not what its name says, BadRequest for an
        archive that is refused, OSError of the disk. A cancelled caller does not disturb the others."""
        target = self._root / app / digest
        if target.is_dir():
            return target
        task = self._under_way.get(target)  # a folder is there only once it is whole
        if task is None:
            task = self._under_way[target] = self._tasks.start(
                self._make(app, digest, content_digest, target), f"unpack for {app}"
            )
            task.add_done_callback(lambda _: self._under_way.pop(target, None))
        return await asyncio.shield(task)

    async def unpacked(self, app: str) -> Sequence[str]:
        def names() -> list[str]:
            folder = self._root / app
            return [item.name for item in folder.iterdir() if item.name[0] != "."] if folder.is_dir() else []

        return await self._run(names)

    async def apps(self) -> Sequence[str]:
        return await self._run(lambda: [item.name for item in self._root.iterdir() if item.name[0] != "."])

    async def discard(self, app: str, digest: str) -> None:
        def remove() -> None:
            self._remove(self._root / app / digest)
            _mark_of(self._root / app / digest).unlink(missing_ok=True)

        await self._run(remove)

    async def discard_app(self, app: str) -> None:
        await self.destroy(await self.put_aside(app))

    async def put_aside(self, app: str) -> Path | None:
        return await self._run(lambda: self._put_aside(self._root / app))

    async def destroy(self, aside: Path | None) -> None:
        if aside is not None:
            await self._run(lambda: _rmtree(aside))

    async def _make(self, app: str, digest: str, content_digest: str | None, target: Path) -> Path:
        key = f"artifacts/{app}/{digest}/app.tar.gz"
        local = self._objects.local_path(key)
        if local is not None:
            await self._run(lambda: self._verify_and_extract(Path(local), digest, content_digest, target))
            self._flush_later(target)
            return target
        fetched = self._root / f"{_FETCHED}{os.urandom(8).hex()}"
        try:
            await self._fetch(key, fetched)
            await self._run(lambda: self._verify_and_extract(fetched, digest, content_digest, target))
            self._flush_later(target)
            return target
        finally:
            fetched.unlink(missing_ok=True)

    async def _fetch(self, key: str, into: Path) -> None:
        """A store that goes away meanwhile is waited for; what has arrived is not fetched again."""
        out = await self._run(lambda: into.open("wb"))
        patience = _Patience()
        try:
            while True:
                try:
                    async for block in self._objects.read(key, _BLOCK, out.tell()):
                        await self._run(lambda block=block: out.write(block))
                        patience.renew()
                    return
                except ServiceUnavailable as error:
                    if not await patience.wait():
                        raise
                    _log.warning("an artifact is fetched again from where it broke off", key=key, error=error.message)
        finally:
            await self._run(out.close)

    def _verify_and_extract(self, archive: Path, digest: str, content_digest: str | None, target: Path) -> None:
        try:
            with archive.open("rb", buffering=0) as source:
                found = hashlib.file_digest(source, "sha256").hexdigest()
        except FileNotFoundError:
            raise NotFound(f"the artifact {digest[:12]} is no longer stored") from None
        if found != digest:
            raise DigestMismatch(f"the stored artifact {digest[:12]} has changed: its bytes hash to {found[:12]}")
        target.parent.mkdir(parents=True, exist_ok=True)
        if self._boot_id:
            _write_durably(_mark_of(target), self._boot_id)
        try:
            content = extract(archive, target, limits=self._limits, durable=not self._boot_id).content_digest
        except BaseException:
            if not target.exists():
                _mark_of(target).unlink(missing_ok=True)
            raise
        if content_digest is not None and content != content_digest:
            self._remove(target)
            _mark_of(target).unlink(missing_ok=True)
            raise DigestMismatch(
                f"the content of artifact {digest[:12]} hashes to {content[:12]}, not to {content_digest[:12]} as "
                "its upload said"
            )

    def _flush_later(self, target: Path) -> None:
        self._tasks.start(self._flush(target), f"flush {target.parent.name}")

    async def _flush(self, target: Path) -> None:
        """A flush that fails leaves the mark, and with it the folder to the next start's judgement."""
        try:
            async with self._flushing:
                code = await _run_sync(target)
            if code == 0 or not target.is_dir():
                await self._run(lambda: _mark_of(target).unlink(missing_ok=True))
                return
            why = f"sync ended with {code}"
        except OSError as error:
            why = str(error)
        _log.warning("an unpacked artifact is not on the disk yet", folder=str(target), error=why)

    def _sweep(self) -> list[Path]:
        """Returns the folders that still have to be flushed."""
        unflushed: list[Path] = []
        self._root.mkdir(mode=0o755, parents=True, exist_ok=True)
        for item in list(self._root.iterdir()):
            if item.name.startswith(_DISCARDED):
                _rmtree(item)
            elif item.name.startswith(_FETCHED):
                item.unlink()
            elif item.is_dir():
                sweep(item)
                unflushed += self._judge(item)
        return unflushed

    def _judge(self, app: Path) -> list[Path]:
        """Remove what may have lost its content in a power cut; returns what only was not flushed yet."""
        unflushed: list[Path] = []
        for mark in [item for item in app.iterdir() if item.name.startswith(_UNFLUSHED)]:
            target = app / mark.name.removeprefix(_UNFLUSHED)
            if self._boot_id and mark.read_text() == self._boot_id:
                unflushed.append(target)
            else:
                self._remove(target)
                mark.unlink()
        return unflushed

    def _remove(self, folder: Path) -> None:
        if (aside := self._put_aside(folder)) is not None:
            _rmtree(aside)

    def _put_aside(self, folder: Path) -> Path | None:
        """None when there is no such folder. One that is not destroyed is swept away by the next start."""
        gone = self._root / f"{_DISCARDED}{os.urandom(8).hex()}"
        try:
            folder.rename(gone)
        except FileNotFoundError:
            return None
        return gone

    async def _run(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


class _Patience:
    """How long to go on asking a store from which nothing comes: waits grow up to some seconds."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self._end = asyncio.get_running_loop().time() + _PATIENCE_SECS
        self._wait = _FIRST_WAIT_SECS

    async def wait(self) -> bool:
        """False when the time is over."""
        if asyncio.get_running_loop().time() + self._wait > self._end:
            return False
        await asyncio.sleep(self._wait * random.uniform(0.5, 1.0))
        self._wait = min(self._wait * 2, _LONGEST_WAIT_SECS)
        return True


def _this_boot() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _mark_of(target: Path) -> Path:
    return target.with_name(f"{_UNFLUSHED}{target.name}")


async def _run_sync(folder: Path) -> int:
    """Put the file system that holds `folder` on disk; returns the exit code."""
    nothing = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        "sync", "-f", str(folder), stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
    )
    try:
        return await process.wait()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SYNC_ENDS_SECS):
                await process.wait()
        raise


def _write_durably(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, text.encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _rmtree(folder: Path) -> None:
    """Remove a tree whose folders may be read-only."""
    for parent, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(folder)
