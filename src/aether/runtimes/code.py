"""What the code of functions becomes on this machine: made from an archive, under its digest, once, never changed.

What it becomes (a file system image, a folder) is up to the drivers; how archives are read is up to `artifact`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Generic, TypeVar

from aether.artifact.extract import ExtractLimits, extract
from aether.artifact.unzip import unzip
from aether.model.errors import BadRequest, DigestMismatch, ServiceUnavailable
from aether.model.function_instance import Code, CodeForm
from aether.runtimes.locks import LOCK, PART, locked, sweep_parts

LIMITS = ExtractLimits(max_bytes=1 << 30, max_entries=100_000, max_ratio=200)
_READ = 1 << 20

T = TypeVar("T")


class CodeStore(ABC, Generic[T]):
    """What code becomes, in a folder of this machine, each made once however many ask and however many processes do.

    `maker` is part of every key: it changes whenever the same archive would become something else.
    """

    def __init__(self, folder: Path, maker: str, limits: ExtractLimits) -> None:
        self.folder = folder
        self._maker = maker
        self._limits = limits
        self._making: dict[str, asyncio.Task[T]] = {}

    @abstractmethod
    def _found(self, key: str) -> T | None:
        """What was made under `key`, when it is whole."""

    @abstractmethod
    def _make(self, archive: Path, form: CodeForm, key: str) -> None:
        """Make it, growing in `KEY.part-…` beside it; the archive is what its digest says."""

    @abstractmethod
    def _parts(self, key: str) -> tuple[Path, ...]:
        """What lies in the folder for `key`, that which makes it whole first."""

    def key(self, code: Code) -> str:
        """What is made of `code` is kept under this."""
        digest = code.digest
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise BadRequest("the digest of code is 64 lower-case hexadecimal digits")
        limits = self._limits
        text = f"{self._maker}\n{code.form}\n{digest}\n{limits.max_bytes} {limits.max_entries} {limits.max_ratio}\n"
        return sha256(text.encode()).hexdigest()

    async def get(self, code: Code) -> T:
        """What `code` becomes; made if it is not there yet.

        A caller that goes away ends nobody else's waiting. Raises BadRequest (InvalidArchive, ArchiveTooLarge) for
        what may not be unpacked, DigestMismatch, ServiceUnavailable, OSError of the disk.
        """
        key = self.key(code)
        task = self._making.get(key)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self.made, code, key))
            self._making[key] = task
            task.add_done_callback(lambda done: self._finished(key, done))
        return await asyncio.shield(task)

    def made(self, code: Code, key: str) -> T:
        """As `get`. Blocks."""
        if (found := self._found(key)) is not None:
            with suppress(OSError):  # else it counts as used when it was made
                os.utime(self._parts(key)[0])
            return found
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = self.folder / (key + LOCK)
        with locked(lock):
            if (found := self._found(key)) is not None:
                return found
            if (actual := file_digest(code.archive)) != code.digest:
                raise DigestMismatch(f"the code's digest is {actual}, not {code.digest}")
            self._make(code.archive, code.form, key)
            lock.unlink(missing_ok=True)
        found = self._found(key)
        if found is None:
            raise ServiceUnavailable("what was made of the code vanished while it was made")
        return found

    def trim(self, unused_secs: float, held: Collection[str]) -> int:
        """Remove what nobody has asked for within `unused_secs`, unless its key is `held`; returns how many. Blocks.

        What somebody is just about to use was asked for just now."""
        removed = 0
        before = time.time() - unused_secs
        for path in list(self.folder.glob("*")) if self.folder.is_dir() else []:
            key = path.name.partition(".")[0]
            if key in held or path.name != self._parts(key)[0].name or path.stat().st_mtime > before:
                continue
            with locked(self.folder / (key + LOCK)) as held_lock:
                del held_lock
                for part in self._parts(key):
                    _remove(part)
                (self.folder / (key + LOCK)).unlink(missing_ok=True)
            removed += 1
        return removed

    def sweep(self) -> int:
        """Remove what killed makers left; returns how many files and folders. Safe beside makers at work. Blocks."""
        return sweep_parts(self.folder)

    def _finished(self, key: str, task: asyncio.Task[T]) -> None:
        del self._making[key]
        if not task.cancelled():
            task.exception()  # whoever waits has it; those that went away will not ask


def _remove(path: Path) -> None:
    if path.is_dir():
        gone = path.with_name(f"{path.name}{PART}-gone")  # what has its name is whole
        path.rename(gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """The SHA-256 of a file in hex. Blocks."""
    hashed = sha256()
    with path.open("rb", buffering=0) as source:
        while block := source.read(_READ):
            hashed.update(block)
    return hashed.hexdigest()


def unpacker(form: CodeForm) -> Callable[[Path, Path, ExtractLimits], object]:
    """What unpacks an archive of `form` into a new folder."""
    match form:
        case CodeForm.ZIP:
            return lambda archive, tree, limits: unzip(archive, tree, limits=limits)
        case CodeForm.TAR_GZ:
            return lambda archive, tree, limits: extract(archive, tree, limits=limits, plain=True)
        case CodeForm.ARTIFACT:
            return lambda archive, tree, limits: extract(archive, tree, limits=limits)
