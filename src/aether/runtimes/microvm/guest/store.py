"""Everything a guest boots from, made on this machine when it is first needed and kept by what it was made from."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from aether.model.errors import NotFound
from aether.model.function_instance import RegisteredRuntimes, RuntimeImage
from aether.runtimes.locks import LOCK, PART, locked, sweep_parts
from aether.runtimes.microvm.guest import initramfs, kernel, rootfs
from aether.runtimes.microvm.images import BUILDER, make_image

VERSION = "5"
"""Part of every key: change it whenever the same sources would give another guest."""


@dataclass(frozen=True, slots=True)
class Guest:
    """What a machine of one runtime boots: an ELF kernel, its first archive, and a read-only root file system.

    Kernel and archive hold nothing secret and can be read by the monitor's own user; `command` is put before the
    entry point of a function."""

    kernel: Path
    initramfs: Path
    rootfs: Path
    command: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    rehearsal: tuple[str, ...]
    """Run once before a snapshot is made: what starts later finds its files in memory. Empty for what is registered:
    nothing is known of it that ends by itself."""


_COMMANDS = {
    "node": ("/usr/bin/node",),
    "python": ("/usr/bin/python3",),
}
_ENV = (("PATH", "/usr/bin"), ("HOME", "/tmp"), ("LANG", "C.UTF-8"))
_ENV_OF_IMAGES = (("PATH", "/usr/local/bin:/usr/bin:/bin"), *_ENV[1:])
_MORE_ENV = {
    "node": (("NODE_ENV", "production"),),
    # the code is read-only, and what is printed is a log
    "python": (("PYTHONDONTWRITEBYTECODE", "1"), ("PYTHONUNBUFFERED", "1")),
}


class GuestStore:
    """Guests in a folder of this machine; each part is made once however many ask and however many processes do.

    What changes on the machine (a newer Node.js, another kernel) is seen by the next process that asks.
    """

    def __init__(
        self, folder: Path, kernel_root: Path = Path("/"), registered: RegisteredRuntimes | None = None
    ) -> None:
        self._folder = folder
        self._registered = registered
        self._kernel_root = kernel_root
        self._making: dict[str, asyncio.Task[Guest]] = {}
        self._made: dict[str, Guest] = {}

    async def guest(self, runtime: str) -> Guest:
        """The guest of `runtime`. Raises NotFound, or ServiceUnavailable with what is missing on this machine, and
        for a registered one whatever fetching it does."""
        if runtime not in _COMMANDS:
            if self._registered is not None and await self._registered.has(runtime):
                return await self._of_image(await self._registered.fetch(runtime))
            raise NotFound(f"there is no runtime called '{runtime}'; here are {', '.join(_COMMANDS)}")
        if (found := self._made.get(runtime)) is not None:
            return found
        task = self._making.get(runtime)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self._guest, runtime))
            self._making[runtime] = task
            task.add_done_callback(lambda done: self._finished(runtime, done))
        return await asyncio.shield(task)

    async def _of_image(self, image: RuntimeImage) -> Guest:
        """Asked for anew every time: what a name means, and whether its file is here, is not for this to remember."""
        kernel_file, archive = await self.base()
        return Guest(kernel_file, archive, image.rootfs, image.command, _ENV_OF_IMAGES, rehearsal=())

    def _finished(self, runtime: str, task: asyncio.Task[Guest]) -> None:
        del self._making[runtime]
        if not task.cancelled() and task.exception() is None:
            self._made[runtime] = task.result()

    async def base(self) -> tuple[Path, Path]:
        """The kernel and the first archive, which all guests share. Raises ServiceUnavailable."""
        return await asyncio.to_thread(self._base)

    def sweep(self) -> int:
        """Remove what killed builds left; returns how many. Blocks."""
        return sweep_parts(self._folder) if self._folder.is_dir() else 0

    def _guest(self, runtime: str) -> Guest:
        image, archive = self._base()
        return Guest(
            kernel=image,
            initramfs=archive,
            rootfs=self._part(f"{runtime}.sqfs", rootfs.sources(runtime), 0o600, lambda work: _rootfs(runtime, work)),
            command=_COMMANDS[runtime],
            env=_ENV + _MORE_ENV[runtime],
            rehearsal=(*_COMMANDS[runtime], f"/{rootfs.REHEARSALS[runtime][0]}"),
        )

    def _base(self) -> tuple[Path, Path]:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        package = kernel.find_kernel(self._kernel_root)
        modules = kernel.module_files(package)
        return (
            self._part("vmlinux", [package.image], 0o444, lambda _: kernel.unpack_kernel(package.image.read_bytes())),
            self._part(
                "initramfs",
                [*modules, *initramfs.sources()],
                0o444,
                lambda _: initramfs.initramfs(initramfs.compile_init(), modules),
            ),
        )

    def _part(self, name: str, sources: Iterable[Path], mode: int, make: Callable[[Path], bytes]) -> Path:
        target = self._folder / f"{_key(sources)}-{name}"
        if target.exists():
            return target
        with (
            locked(self._folder / (target.name + LOCK)),
            tempfile.TemporaryDirectory(prefix=target.name + PART, dir=self._folder) as work,
        ):
            if not target.exists():
                made = Path(work) / "made"
                made.touch(mode=0o600)
                made.write_bytes(make(Path(work)))
                made.chmod(mode)
                made.replace(target)
        return target


def _key(sources: Iterable[Path]) -> str:
    """A name for the state of files: a package that is upgraded changes their sizes or times."""
    hashed = sha256(f"{VERSION} {BUILDER}".encode())
    for file in sources:
        seen = file.stat()
        hashed.update(b"\0%b %d %d" % (os.fsencode(file), seen.st_size, seen.st_mtime_ns))
    return hashed.hexdigest()[:32]


def _rootfs(runtime: str, work: Path) -> bytes:
    tree, image = work / "tree", work / "image"
    rootfs.make_tree(runtime, tree)
    make_image(tree, image)
    return image.read_bytes()
