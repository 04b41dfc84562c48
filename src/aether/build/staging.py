"""Copies of trees for builds, which may write anywhere: real copies (or clones, where the file system has them)."""

import errno
import fcntl
import os
import shutil
import sys
from pathlib import Path

from aether.model.errors import LocalIOError

_FICLONE = 0x40049409
_NEVER = frozenset({b".git", b".hg", b".svn", b".jj", b".venv"})
_NO_CLONE = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM}


class _Copier:
    def __init__(self) -> None:
        self._clone = sys.platform == "linux"

    def file(self, source: bytes, target: bytes) -> None:
        """Copy content and permissions; the two share no storage that a write could reach."""
        with open(source, "rb", buffering=0) as reader, open(target, "xb", buffering=0) as writer:
            mode = os.fstat(reader.fileno()).st_mode
            if not self._cloned(reader.fileno(), writer.fileno()):
                shutil.copyfileobj(reader, writer, 1 << 20)
            os.fchmod(writer.fileno(), mode & 0o777 | 0o200)

    def _cloned(self, source: int, target: int) -> bool:
        if not self._clone:
            return False
        try:
            fcntl.ioctl(target, _FICLONE, source)
        except OSError as error:
            if error.errno not in _NO_CLONE:
                raise
            self._clone = False
            return False
        return True


def copy_tree(source: Path, target: Path, leave: frozenset[bytes] = frozenset()) -> None:
    """Copy the folder `source` to `target`, merging into what is there; links stay links; special files are skipped.

    `leave` names paths relative to `source` that are not copied. Raises LocalIOError.
    """
    copier = _Copier()
    pending = [(os.fsencode(source), os.fsencode(target), b"")]
    try:
        while pending:
            folder, copy, prefix = pending.pop()
            os.makedirs(copy, exist_ok=True)
            with os.scandir(folder) as items:
                for item in items:
                    name = prefix + item.name
                    if name in leave:
                        continue
                    there = copy + b"/" + item.name
                    if item.is_symlink():
                        os.symlink(os.readlink(item.path), there)
                    elif item.is_dir(follow_symlinks=False):
                        pending.append((item.path, there, name + b"/"))
                    elif item.is_file(follow_symlinks=False):
                        copier.file(item.path, there)
    except OSError as error:
        raise LocalIOError(f"cannot copy {source} to {target}: {error.strerror}") from error


def stage(project: Path, scratch: Path, leave: frozenset[bytes]) -> None:
    """Make `scratch` an exact copy of `project` without version control and the folders in `leave`."""
    if scratch.exists():
        shutil.rmtree(scratch)
    copy_tree(project, scratch, leave=leave | _NEVER)
