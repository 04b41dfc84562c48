"""Code images: what a function was uploaded as, as a read-only file system that a guest mounts.

Made without root and without mounting anything, by mksquashfs over a folder that our own readers unpacked: the same
tree gives the same bytes, whatever archive it came in. Images are kept under the digest of what they were made from
and of how, and are never changed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from aether.artifact.extract import ExtractLimits, extract
from aether.artifact.headers import FIXED_MTIME
from aether.artifact.unzip import unzip
from aether.model.errors import BadRequest, DigestMismatch, ServiceUnavailable
from aether.model.function_instance import Code, CodeForm
from aether.runtimes.microvm.locks import LOCK, PART, locked, sweep_parts

BUILDER = "squashfs-1"
"""Part of every key: change it whenever the same input would give another image."""

LIMITS = ExtractLimits(max_bytes=1 << 30, max_entries=100_000, max_ratio=200)
_MAKE_SECS = 300.0
_READ = 1 << 20
_SUFFIX = ".sqfs"

_OPTIONS = (
    *("-noappend", "-no-progress", "-quiet", "-reproducible"),
    *("-all-root", "-root-mode", "755", "-no-xattrs", "-no-exports"),
    *("-all-time", str(FIXED_MTIME), "-mkfs-time", str(FIXED_MTIME)),
    # stored as it is: reading is what a cold start waits for, and an emulated processor inflates slowly
    *("-noI", "-noD", "-noF", "-noX"),
)


@dataclass(frozen=True, slots=True)
class Image:
    """A file system image; `digest` is the SHA-256 of its bytes and `size` how many there are."""

    path: Path
    digest: str
    size: int


def make_image(tree: Path, target: Path) -> None:
    """Write the image of the folder `tree` to `target`, mode 0600. Blocks.

    Raises ServiceUnavailable where mksquashfs (Debian's squashfs-tools) is missing, fails or takes too long.
    """
    program = shutil.which("mksquashfs", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if program is None:
        raise ServiceUnavailable("images cannot be made here: mksquashfs is missing; install squashfs-tools")
    try:
        done = subprocess.run(
            [program, os.fspath(tree), os.fspath(target), *_OPTIONS],
            env={"PATH": os.defpath, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_MAKE_SECS,
            check=False,
            umask=0o077,
        )
    except subprocess.TimeoutExpired as error:
        raise ServiceUnavailable(f"making an image took longer than {_MAKE_SECS:.0f} seconds") from error
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1]
        raise ServiceUnavailable(f"an image could not be made: {said or f'mksquashfs exited with {done.returncode}'}")
    target.chmod(0o600)


def file_digest(path: Path) -> str:
    """The SHA-256 of a file in hex. Blocks."""
    hashed = sha256()
    with path.open("rb", buffering=0) as source:
        while block := source.read(_READ):
            hashed.update(block)
    return hashed.hexdigest()


class ImageStore:
    """Code images in a folder of this machine, each made once however many ask and however many processes do."""

    def __init__(self, folder: Path, *, limits: ExtractLimits = LIMITS) -> None:
        self.folder = folder
        self._limits = limits
        self._making: dict[str, asyncio.Task[Image]] = {}

    async def image(self, code: Code) -> Image:
        """The image of `code`; made if there is none yet.

        A caller that goes away ends nobody else's waiting. Raises BadRequest (InvalidArchive, ArchiveTooLarge) for
        what may not be unpacked, DigestMismatch, ServiceUnavailable, OSError of the disk.
        """
        key = self.key(code)
        task = self._making.get(key)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self._image, code, key))
            self._making[key] = task
            task.add_done_callback(lambda done: self._made(key, done))
        return await asyncio.shield(task)

    def _made(self, key: str, task: asyncio.Task[Image]) -> None:
        del self._making[key]
        if not task.cancelled():
            task.exception()  # whoever waits has it; those that went away will not ask

    def key(self, code: Code) -> str:
        """What the image of `code` is kept under."""
        digest = code.digest
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise BadRequest("the digest of code is 64 lower-case hexadecimal digits")
        limits = self._limits
        text = f"{BUILDER}\n{code.form}\n{digest}\n{limits.max_bytes} {limits.max_entries} {limits.max_ratio}\n"
        return sha256(text.encode()).hexdigest()

    def sweep(self) -> int:
        """Remove what killed builds left; returns how many files and folders. Safe beside builds under way."""
        return sweep_parts(self.folder)

    def _image(self, code: Code, key: str) -> Image:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = self.folder / (key + _SUFFIX)
        if (found := self._found(target)) is not None:
            return found
        lock = self.folder / (key + LOCK)
        with locked(lock):
            if (found := self._found(target)) is not None:
                return found
            self._make(code, target)
            lock.unlink(missing_ok=True)
        found = self._found(target)
        if found is None:
            raise ServiceUnavailable("the image vanished while it was made")
        return found

    def _make(self, code: Code, target: Path) -> None:
        if (actual := file_digest(code.archive)) != code.digest:
            raise DigestMismatch(f"the code's digest is {actual}, not {code.digest}")
        with tempfile.TemporaryDirectory(prefix=target.stem + PART, dir=self.folder) as work:
            tree, made = Path(work) / "tree", Path(work) / "image"
            unpacker(code.form)(code.archive, tree, self._limits)
            make_image(tree, made)
            with made.open("rb") as file:
                os.fsync(file.fileno())
            note = Path(work) / "digest"
            note.write_text(file_digest(made))
            note.chmod(0o600)
            # the digest first: an image that has its final name is whole
            note.replace(target.with_suffix(".digest"))
            made.replace(target)

    def _found(self, target: Path) -> Image | None:
        try:
            size = target.stat().st_size
            digest = target.with_suffix(".digest").read_text()
        except FileNotFoundError:
            return None
        return Image(target, digest, size)


def unpacker(form: CodeForm) -> Callable[[Path, Path, ExtractLimits], object]:
    """What unpacks an archive of `form` into a new folder."""
    match form:
        case CodeForm.ZIP:
            return lambda archive, tree, limits: unzip(archive, tree, limits=limits)
        case CodeForm.TAR_GZ:
            return lambda archive, tree, limits: extract(archive, tree, limits=limits, plain=True)
        case CodeForm.ARTIFACT:
            return lambda archive, tree, limits: extract(archive, tree, limits=limits)
