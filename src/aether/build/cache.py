"""Installed dependencies kept between deploys: one folder per key, complete or absent, made once under a lock."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from aether.build.tools import cache_home
from aether.model.errors import LocalIOError

_UNUSED_DAYS = 30
_KEEP = 24
_SAFE_S = 86400.0


def key_of(facts: Mapping[str, object]) -> str:
    """The key for everything that shapes an installation: 40 hex characters, the same for equal facts."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def digest_file(path: Path) -> str | None:
    """SHA-256 of a file, None if there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def digest_tree(folder: Path, leave: frozenset[bytes] = frozenset()) -> dict[str, str]:
    """SHA-256 of each file below `folder` by its relative path; empty if there is no such folder.

    `leave` names folders directly in `folder` that are left out."""
    found: dict[str, str] = {}
    for base, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if base != str(folder) or os.fsencode(name) not in leave)
        for name in files:
            path = Path(base, name)
            found[str(path.relative_to(folder))] = digest_file(path) or ""
    return found


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Generator[None]:
    """Hold an exclusive lock on the file `path`, made if absent; `waiting` is called if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def obtain(
    key: str, make: Callable[[Path], None], *, fresh: bool = False, waiting: Callable[[], None] | None = None
) -> tuple[Path, bool]:
    """The folder kept under `key` and whether it was there already; else `make(folder)` fills it.

    `make` works in `<key>.part`, always the same path, because some install scripts write paths into what they
    build. If it raises, nothing is kept. `fresh` makes anew whatever is kept. Raises LocalIOError.
    """
    home = cache_home() / "deps"
    folder = home / key
    if not fresh and _touch(folder):
        return folder, True
    try:
        with locked(home / f"{key}.lock", waiting):
            if not fresh and _touch(folder):
                return folder, True
            part = home / f"{key}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            try:
                make(part)
                if fresh:
                    shutil.rmtree(folder, ignore_errors=True)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise LocalIOError(f"cannot keep dependencies in {home}: {error.strerror}") from error
    _forget_old(home, folder)
    return folder, False


def _touch(folder: Path) -> bool:
    try:
        os.utime(folder)
    except FileNotFoundError:
        return False
    return True


def _forget_old(home: Path, current: Path) -> None:
    """Drop what was long unused, and beyond a number what was not used for a day."""
    now = time.time()
    aged: list[tuple[float, Path]] = []
    for item in home.iterdir():
        if item.suffix in (".lock", ".part") or item == current:
            continue
        try:
            aged.append((now - item.stat().st_mtime, item))
        except FileNotFoundError:
            continue
    for rank, (age, item) in enumerate(sorted(aged)):
        if age > _UNUSED_DAYS * _SAFE_S or (rank >= _KEEP and age > _SAFE_S):
            gone = item.with_name(f"{item.name}.gone.part")
            try:
                item.rename(gone)
            except OSError:
                continue
            shutil.rmtree(gone, ignore_errors=True)
