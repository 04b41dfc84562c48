"""Where members of an archive go on disk: folders held by handles that follow no link, and no name taken twice.

Which members there are and whether they may be is decided by the readers (`reader` for tar, `zipreader` for zip).
"""

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from aether.artifact.inflate import InvalidArchive
from aether.artifact.reader import Member, Pieces
from aether.artifact.tree import DIRECTORY, show

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def is_new(member: Member, known: dict[bytes, str], folders: "Folders") -> bool:
    """Record `member` and make the folders it needs; False for a folder that is there already."""
    before = known.get(member.name)
    if before is not None:
        if before == member.kind == DIRECTORY:
            return False
        raise InvalidArchive(f"'{show(member.name)}' is in the archive twice")
    parent = member.name.rpartition(b"/")[0]
    absent: list[bytes] = []
    while (kind := known.get(parent)) is None:
        absent.append(parent)
        parent = parent.rpartition(b"/")[0]
    if kind != DIRECTORY:
        raise InvalidArchive(f"'{show(member.name)}' lies below '{show(parent)}', which is not a folder")
    for folder in reversed(absent):
        folders.make(folder)
        known[folder] = DIRECTORY
    known[member.name] = member.kind
    return True


def refuse_clashes(names: Iterable[bytes]) -> None:
    """Raises InvalidArchive when some file systems cannot tell two of `names` apart: equal but for case or Unicode
    composition."""
    seen: dict[str, bytes] = {}
    for name in names:
        key = unicodedata.normalize("NFC", name.decode("utf-8", "surrogateescape")).casefold()
        if (other := seen.setdefault(key, name)) is not name:
            raise InvalidArchive(f"'{show(other)}' and '{show(name)}' are one name where case does not count")


class Folders:
    """Handles of the folders on the way to the current one; members of one folder follow each other."""

    def __init__(self, root: Path) -> None:
        self._path: list[bytes] = []
        self._handles = [os.open(root, _FOLDER)]
        self._current = b""
        self._chmod = False

    def __enter__(self) -> "Folders":
        probe = os.open(b".probe", _NEW, 0o755, dir_fd=self._handles[0])
        try:
            self._chmod = os.fstat(probe).st_mode & 0o777 != 0o755
        finally:
            os.close(probe)
            os.unlink(b".probe", dir_fd=self._handles[0])
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            os.close(handle)

    def _enter(self, folder: bytes) -> int:
        if folder != self._current:
            parts = folder.split(b"/") if folder else []
            same = 0
            for ours, theirs in zip(self._path, parts, strict=False):
                if ours != theirs:
                    break
                same += 1
            while len(self._path) > same:
                self._path.pop()
                os.close(self._handles.pop())
            self._current = b"/".join(self._path)
            for part in parts[same:]:
                self._handles.append(os.open(part, _FOLDER, dir_fd=self._handles[-1]))
                self._path.append(part)
            self._current = folder
        return self._handles[-1]

    def make(self, name: bytes) -> None:
        parent, _, last = name.rpartition(b"/")
        folder = self._enter(parent)
        os.mkdir(last, 0o755, dir_fd=folder)
        if self._chmod:
            os.chmod(last, 0o755, dir_fd=folder)

    def link(self, name: bytes, target: bytes) -> None:
        parent, _, last = name.rpartition(b"/")
        os.symlink(target, last, dir_fd=self._enter(parent))

    def file(self, member: Member, stream: Pieces) -> None:
        parent, _, last = member.name.rpartition(b"/")
        mode = 0o755 if member.executable else 0o644
        fd = os.open(last, _NEW, mode, dir_fd=self._enter(parent))
        try:
            if self._chmod:
                os.fchmod(fd, mode)
            stream.each(member.size, lambda part: _write_all(fd, part))
        finally:
            os.close(fd)


def _write_all(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]
