"""Code images: what a function was uploaded as, as a read-only file system that a guest mounts.

Made without root and without mounting anything, by mksquashfs over a folder that our own readers unpacked: the same
tree gives the same bytes, whatever archive it came in. Images are kept under the digest of what they were made from
and of how, and are never changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from aether.artifact.extract import ExtractLimits
from aether.artifact.headers import FIXED_MTIME
from aether.model.errors import ServiceUnavailable
from aether.model.function_instance import Code, CodeForm
from aether.runtimes.code import LIMITS, CodeStore, file_digest, unpacker
from aether.runtimes.locks import PART

BUILDER = "squashfs-1"
"""Part of every key: change it whenever the same input would give another image."""

_MAKE_SECS = 300.0
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


class ImageStore(CodeStore[Image]):
    """Code images in a folder of this machine."""

    def __init__(self, folder: Path, *, limits: ExtractLimits = LIMITS) -> None:
        super().__init__(folder, BUILDER, limits)

    async def image(self, code: Code) -> Image:
        """The image of `code`; see `CodeStore.get`."""
        return await self.get(code)

    def _make(self, archive: Path, form: CodeForm, key: str) -> None:
        target = self.folder / (key + _SUFFIX)
        with tempfile.TemporaryDirectory(prefix=key + PART, dir=self.folder) as work:
            tree, made = Path(work) / "tree", Path(work) / "image"
            unpacker(form)(archive, tree, self._limits)
            make_image(tree, made)
            with made.open("rb") as file:
                os.fsync(file.fileno())
            note = Path(work) / "digest"
            note.write_text(file_digest(made))
            note.chmod(0o600)
            # the digest first: an image that has its final name is whole
            note.replace(target.with_suffix(".digest"))
            made.replace(target)

    def _found(self, key: str) -> Image | None:
        target = self.folder / (key + _SUFFIX)
        try:
            size = target.stat().st_size
            digest = target.with_suffix(".digest").read_text()
        except FileNotFoundError:
            return None
        return Image(target, digest, size)

    def _parts(self, key: str) -> tuple[Path, ...]:
        target = self.folder / (key + _SUFFIX)
        return target, target.with_suffix(".digest")
