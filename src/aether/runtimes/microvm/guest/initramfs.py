"""The archive that the kernel unpacks first: /init, compiled here, and the modules it loads.

The format is cpio's "newc" (Documentation/driver-api/early-userspace/buffer-format.rst of the kernel), by hand:
owners, times and inode numbers are fixed, and the console's device node needs no root.
"""

from __future__ import annotations

import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from aether.model.errors import ServiceUnavailable

SOURCE = Path(__file__).parent / "source"
_FLAGS = ("-std=gnu11", "-Os", "-static", "-Wall", "-Wextra", "-s", "-Wl,--build-id=none")
_COMPILE_SECS = 120.0
_CONSOLE = (5, 1)


def sources() -> list[Path]:
    """The files that /init is compiled from, in a fixed order."""
    return sorted(SOURCE.glob("*.[ch]"))


def compile_init() -> bytes:
    """The program /init, static. Raises ServiceUnavailable without a C compiler and its C library's archive."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise ServiceUnavailable("the guest's first program cannot be made here: install gcc and libc6-dev")
    with tempfile.TemporaryDirectory(prefix="aether-init-") as folder:
        names = [file.name for file in sources() if file.suffix == ".c"]
        try:
            done = subprocess.run(
                [compiler, *_FLAGS, "-o", f"{folder}/init", *names],
                cwd=SOURCE,  # names without a path leave none in the program
                capture_output=True,
                timeout=_COMPILE_SECS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ServiceUnavailable("the guest's first program took too long to compile") from error
        if done.returncode != 0:
            said = done.stderr.decode("utf-8", "replace").strip().split("\n")[0]
            raise ServiceUnavailable(f"the guest's first program cannot be compiled ({said}): install gcc, libc6-dev")
        return Path(folder, "init").read_bytes()


def initramfs(init: bytes, modules: Sequence[Path]) -> bytes:
    """The archive with `init` and `modules`, which are loaded in their order."""
    writer = _Cpio()
    for folder in ("dev", "proc", "sys", "system", "modules"):
        writer.add(folder, stat.S_IFDIR | 0o755)
    writer.add("dev/console", stat.S_IFCHR | 0o600, device=_CONSOLE)
    writer.add("init", stat.S_IFREG | 0o755, init)
    for module in modules:
        writer.add(f"modules/{module.name}", stat.S_IFREG | 0o644, module.read_bytes())
    writer.add("modules/list", stat.S_IFREG | 0o644, "".join(f"{module.name}\n" for module in modules).encode())
    return writer.finish()


class _Cpio:
    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._count += 1
        raw = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (self._count, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(raw), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + raw
        self._parts += [head, bytes(-len(head) % 4), content, bytes(-len(content) % 4)]

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)
