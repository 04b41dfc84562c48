"""What a root file system must have for the guest's /init to run functions from it, looked at without mounting it.

The superblock is read here; which files there are is told by unsquashfs where that is installed. Whether the command
then works is seen by the first function.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aether.model.errors import BadRequest, ServiceUnavailable

FOLDERS = ("app", "dev", "proc", "tmp")
"""Where /init mounts something."""
MAX_WORDS = 64
MAX_WORDS_BYTES = 4096
MAX_LISTED = 300_000
_MAGIC = b"hsqs"
_SUPERBLOCK = struct.Struct("<4sIIIIHHHHHHQQ")
_COMPRESSIONS = {1: "gzip", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}
_SECTOR = 512
_LIST_SECS = 60.0
_MAX_LINKS = 20
_ROOT = "squashfs-root"


@dataclass(frozen=True, slots=True)
class Entry:
    """`mode` as `ls -l` writes it; `target` is that of a link."""

    mode: str
    target: str = ""


def check_init(init: Sequence[str]) -> tuple[str, ...]:
    """The words of a command as they are kept. Raises BadRequest."""
    if not init:
        raise _refused("init", "a runtime needs a command that is put before the entrypoint")
    if len(init) > MAX_WORDS or sum(len(word.encode("utf-8", "surrogatepass")) for word in init) > MAX_WORDS_BYTES:
        raise _refused("init", f"the command has at most {MAX_WORDS} words and {MAX_WORDS_BYTES} bytes")
    if any(not word or not word.isprintable() for word in init):
        raise _refused("init", "the words of the command are printable and not empty")
    parts = init[0].split("/")
    if parts[0] or any(part in ("", ".", "..") for part in parts[1:]):
        raise _refused("init", f"the command begins with an absolute path such as /usr/bin/node, not '{init[0]}'")
    return tuple(init)


def check_image(path: Path, init: Sequence[str]) -> None:
    """Raises BadRequest, with what is missing, for a file that no guest can have as its root. Blocks."""
    with path.open("rb") as file:
        check_superblock(file.read(_SUPERBLOCK.size), os.fstat(file.fileno()).st_size)
    program = shutil.which("unsquashfs", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if program is not None:
        check_entries(_listed(program, path), init)


def check_superblock(start: bytes, size: int) -> None:
    """`start` are the first bytes of a file of `size` bytes. Raises BadRequest."""
    if not start.startswith(_MAGIC) or len(start) < _SUPERBLOCK.size:
        raise _refused("rootfs", "the root file system is no squashfs image; make one with mksquashfs")
    values = _SUPERBLOCK.unpack(start)
    compression, major, minor, used = values[5], values[9], values[10], values[12]
    if (major, minor) != (4, 0):
        raise _refused("rootfs", f"the image is of squashfs {major}.{minor}; guests read 4.0")
    if compression not in _COMPRESSIONS:
        known = ", ".join(_COMPRESSIONS.values())
        raise _refused("rootfs", f"the image is compressed in a way that guests cannot read; they read {known}")
    if used > size // _SECTOR * _SECTOR:
        raise _refused("rootfs", f"the image is cut: it has {size} bytes of {used}, padded to {_SECTOR}")


def check_entries(entries: Mapping[str, Entry], init: Sequence[str]) -> None:
    """`entries` by their path without a leading slash. Raises BadRequest."""
    missing = [
        f"the folder /{name}" for name in FOLDERS if (found := entries.get(name)) is None or found.mode[0] != "d"
    ]
    program = _resolved(entries, init[0])
    if program is None:
        missing.append(f"the program {init[0]}")
    elif program.mode[0] != "-" or program.mode[9] not in "xt":
        missing.append(f"the right of everybody to execute {init[0]}")
    if missing:
        raise _refused("rootfs", f"the image lacks {', '.join(missing)}")


def parse_listing(lines: Iterable[str]) -> dict[str, Entry]:
    """What `unsquashfs -lln` says. Raises BadRequest for more than can be looked through."""
    found: dict[str, Entry] = {}
    for line in lines:
        at = line.find(f" {_ROOT}/")
        if at < 0 or len(line) < 10:
            continue  # the root itself, and what is said before the list
        mode, name = line[:10], line[at + len(_ROOT) + 2 :].rstrip("\n")
        target = ""
        if mode[0] == "l":
            name, _, target = name.partition(" -> ")
        found[name] = Entry(mode, target)
        if len(found) > MAX_LISTED:
            raise _refused("rootfs", f"the image has more than {MAX_LISTED} files and folders")
    return found


def _resolved(entries: Mapping[str, Entry], path: str) -> Entry | None:
    """What `path` leads to, through links, inside of the image."""
    todo = [part for part in reversed(path.split("/")) if part]
    done: list[str] = []
    found: Entry | None = None
    links = 0
    while todo:
        part = todo.pop()
        if part == "..":
            done = done[:-1]
            continue
        found = entries.get("/".join((*done, part)))
        if found is None:
            return None
        if found.mode[0] != "l":
            done = [*done, part]
            continue
        links += 1
        if links > _MAX_LINKS:
            return None
        if found.target.startswith("/"):
            done = []
        todo.extend(part for part in reversed(found.target.split("/")) if part not in ("", "."))
    return found


def _listed(program: str, image: Path) -> dict[str, Entry]:
    """To a file first, which no full pipe can hold up."""
    with tempfile.TemporaryFile("w+", dir=image.parent, encoding="utf-8", errors="surrogateescape") as out:
        try:
            done = subprocess.run(
                [program, "-no-progress", "-lln", os.fspath(image)],
                env={"PATH": os.defpath, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.PIPE,
                timeout=_LIST_SECS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise _refused("rootfs", f"the image could not be looked through in {_LIST_SECS:g} seconds") from error
        except OSError as error:
            raise ServiceUnavailable(f"the image cannot be looked through here: {error.strerror}") from error
        if done.returncode != 0:
            said = done.stderr.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1]
            why = said or f"unsquashfs exited with {done.returncode}"
            raise _refused("rootfs", f"the image cannot be read: {why}")
        out.seek(0)
        return parse_listing(out)


def _refused(field: str, message: str) -> BadRequest:
    return BadRequest(message, {"field": field})
