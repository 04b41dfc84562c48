"""Unpacked artifacts on this machine: `releases/<app>/<digest>`, made once, complete or absent, shared by callers.

Reading the archive safely is left to `aether.artifact.extract`; when to unpack and what to keep, to the engine.
Hashing and unpacking run in threads of their own.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from aether.apps.ports import ArtifactObjects
from aether.apps.tasks import Tasks
from aether.artifact.extract import ExtractLimits, extract, sweep
from aether.model.errors import DigestMismatch, NotFound

_T = TypeVar("_T")
_DISCARDED = ".discarded-"
_FETCHED = ".fetched-"
_BLOCK = 1 << 20


class UnpackedArtifacts:
    """Implements `ArtifactSource` below the folder `root`, which belongs to one server at a time."""

    def __init__(
        self, root: Path, objects: ArtifactObjects, *, limits: ExtractLimits | None = None, threads: int = 2
    ) -> None:
        self._root = root
        self._objects = objects
        self._limits = limits
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="unpack")
        self._under_way: dict[Path, asyncio.Task[Path]] = {}
        self._tasks = Tasks()

    async def open(self) -> None:
        """Take away what a killed server left half-done. Raises OSError."""
        await self._run(self._sweep)

    async def close(self) -> None:
        await self._tasks.close()
        await asyncio.to_thread(self._threads.shutdown, wait=True)

    async def unpack(self, app: str, digest: str, content_digest: str | None) -> Path:
        """Raises NotFound without the object, DigestMismatch when it is not what its name says, BadRequest for an
        archive that is refused, OSError of the disk. A cancelled caller does not disturb the others."""
        target = self._root / app / digest
        if target.is_dir():
            return target
        task = self._under_way.get(target)
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

    async def discard(self, app: str, digest: str) -> None:
        await self._run(lambda: self._remove(self._root / app / digest))

    async def discard_app(self, app: str) -> None:
        await self._run(lambda: self._remove(self._root / app))

    async def _make(self, app: str, digest: str, content_digest: str | None, target: Path) -> Path:
        key = f"artifacts/{app}/{digest}/app.tar.gz"
        local = self._objects.local_path(key)
        if local is not None:
            return await self._run(lambda: self._verify_and_extract(Path(local), digest, content_digest, target))
        fetched = self._root / f"{_FETCHED}{os.urandom(8).hex()}"
        try:
            await self._fetch(key, fetched)
            return await self._run(lambda: self._verify_and_extract(fetched, digest, content_digest, target))
        finally:
            fetched.unlink(missing_ok=True)

    async def _fetch(self, key: str, into: Path) -> None:
        out = await self._run(lambda: into.open("wb"))
        try:
            async for block in self._objects.read(key, _BLOCK):
                await self._run(lambda block=block: out.write(block))
        finally:
            await self._run(out.close)

    def _verify_and_extract(self, archive: Path, digest: str, content_digest: str | None, target: Path) -> Path:
        try:
            with archive.open("rb", buffering=0) as source:
                found = hashlib.file_digest(source, "sha256").hexdigest()
        except FileNotFoundError:
            raise NotFound(f"the artifact {digest[:12]} is no longer stored") from None
        if found != digest:
            raise DigestMismatch(f"the stored artifact {digest[:12]} has changed: its bytes hash to {found[:12]}")
        target.parent.mkdir(parents=True, exist_ok=True)
        content = extract(archive, target, limits=self._limits).content_digest
        if content_digest is not None and content != content_digest:
            self._remove(target)
            raise DigestMismatch(
                f"the content of artifact {digest[:12]} hashes to {content[:12]}, not to {content_digest[:12]} as "
                "its upload said"
            )
        return target

    def _sweep(self) -> None:
        self._root.mkdir(mode=0o755, parents=True, exist_ok=True)
        for item in list(self._root.iterdir()):
            if item.name.startswith(_DISCARDED):
                _rmtree(item)
            elif item.name.startswith(_FETCHED):
                item.unlink()
            elif item.is_dir():
                sweep(item)

    def _remove(self, folder: Path) -> None:
        gone = self._root / f"{_DISCARDED}{os.urandom(8).hex()}"
        try:
            folder.rename(gone)
        except FileNotFoundError:
            return
        _rmtree(gone)

    async def _run(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _rmtree(folder: Path) -> None:
    """Remove a tree whose folders may be read-only."""
    for parent, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(folder)
