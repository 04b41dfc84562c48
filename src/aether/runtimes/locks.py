"""A lock that a file stands for: one builder of a thing, among threads and processes, and none after a kill."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

LOCK, PART = ".lock", ".part-"
"""What is made in a folder is locked by `NAME.lock` and grows in a folder `NAME.part-…` beside it."""


def sweep_parts(folder: Path) -> int:
    """Remove what killed builders left in `folder`; returns how many. Safe beside builders at work. Blocks."""
    removed = 0
    for item in sorted(folder.glob(f"*{LOCK}")):
        with locked(item, wait=False) as held:
            if not held:
                continue
            for left in folder.glob(f"{item.name.removesuffix(LOCK)}{PART}*"):
                shutil.rmtree(left)
                removed += 1
            item.unlink(missing_ok=True)
    return removed


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Generator[bool]:
    """Hold the lock file `path` against other threads and processes; yields whether it is held."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            if not _is_at(fd, path):
                continue  # whoever held it has removed it: it keeps nobody else out any more
            yield True
            return
        finally:
            os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
