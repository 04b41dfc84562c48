"""What goes into an archive: entries (name in the archive, source on disk, kind) and a plain walk of a folder.

Nothing is left out here; what a project packs and why not is decided in `aether.build.ignore`.
Names are bytes because file names are bytes: newlines and non-UTF-8 survive.
"""

import os
import stat
from typing import NamedTuple

from aether.model.errors import ConfigError, LocalIOError

FILE, DIRECTORY, LINK = "f", "d", "l"

_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


class Entry(NamedTuple):
    """One member of the archive: `name` relative with '/', `source` its path on disk (unused for a directory)."""

    name: bytes
    source: bytes
    kind: str


def show(name: bytes) -> str:
    """`name` for a message: control bytes and bytes that are not UTF-8 are escaped."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def kind_of(item: "os.DirEntry[bytes]", name: bytes) -> str:
    """The kind of a directory item; raises ConfigError for devices, named pipes and sockets."""
    if item.is_symlink():
        return LINK
    if item.is_file(follow_symlinks=False):
        return FILE
    if item.is_dir(follow_symlinks=False):
        return DIRECTORY
    what = _SPECIAL.get(stat.S_IFMT(item.stat(follow_symlinks=False).st_mode), "not a regular file")
    raise ConfigError(f"'{show(name)}' is {what} and cannot be packed: remove it or list it in .aetherignore")


def scan(root: "bytes | str | os.PathLike[str]", prefix: bytes = b"") -> list[Entry]:
    """Every entry below `root` (itself left out), each name starting with `prefix`; order is unspecified.

    Raises ConfigError for devices, pipes and sockets, LocalIOError when a folder cannot be read.
    """
    found: list[Entry] = []
    pending = [(os.fsencode(root), prefix)]
    while pending:
        folder, base = pending.pop()
        try:
            with os.scandir(folder) as items:
                for item in items:
                    name = base + item.name
                    kind = kind_of(item, name)
                    found.append(Entry(name, item.path, kind))
                    if kind == DIRECTORY:
                        pending.append((item.path, name + b"/"))
        except OSError as error:
            raise LocalIOError(f"cannot read folder '{show(folder)}': {error.strerror}") from error
    return found
