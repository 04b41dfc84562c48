"""The data directory: made private, and owned by one server alone or shared by several of one machine.

`up.lock` is held exclusively by a server that is alone and shared by those that are not; `start.lock` is held while a
server starts, so that of several that start at once exactly one is the first, and clears up what killed ones left.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from aether.model.errors import LocalIOError


@dataclass(frozen=True, slots=True)
class Claim:
    """`alone`: no other server has this database. `first`: no other one runs on this folder at the moment."""

    alone: bool
    first: bool
    started: Callable[[], None] = lambda: None
    """To be called when what killed servers left has been taken up: the next server may start."""


@contextmanager
def owned(folder: Path) -> Generator[Claim]:
    """Make `folder` (0700) and hold its lock. Raises LocalIOError when it cannot be made or is in use."""
    with _locks(folder) as (_, lock):
        if not _take(lock, fcntl.LOCK_EX):
            raise LocalIOError(
                f"another server{_whose(folder)} already runs on {folder}; "
                "stop it, or set AETHER_DATA_DIR to another folder"
            )
        yield Claim(alone=True, first=True)


@contextmanager
def shared(folder: Path) -> Generator[Claim]:
    """As `owned`, beside others that share it; they start one after the other. Raises LocalIOError when a server
    that is alone has the folder."""
    with _locks(folder) as (start, lock):
        # those that start at the same moment follow one another: each does so in seconds
        fcntl.flock(start, fcntl.LOCK_EX)
        first = _take(lock, fcntl.LOCK_EX)
        if not _take(lock, fcntl.LOCK_SH):
            raise LocalIOError(
                f"'aether up'{_whose(folder)} runs on {folder} and has it to itself; "
                "stop it, or set AETHER_DATA_DIR to another folder"
            )
        yield Claim(alone=False, first=first, started=lambda: fcntl.flock(start, fcntl.LOCK_UN))


@contextmanager
def _locks(folder: Path) -> Generator[tuple[IO[bytes], IO[bytes]]]:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
        (folder / "run").mkdir(mode=0o700, exist_ok=True)
        start, lock = (os.fdopen(_open(folder / name), "r+b") for name in ("start.lock", "up.lock"))
    except OSError as error:
        raise LocalIOError(f"the data directory {folder} cannot be used: {error.strerror or error}") from error
    with start, lock:
        yield start, lock


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _take(lock: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def announce(folder: Path, api: str, ca_file: Path | None = None) -> None:
    """Tell local clients where the server is, and whose certificates it shows if its own authority made them."""
    known: dict[str, str | int] = {"api": api, "pid": os.getpid()}
    if ca_file is not None:
        known["ca"] = str(ca_file)
    part = folder / "up.json.part"
    part.write_text(json.dumps(known) + "\n")
    part.chmod(0o644)
    part.replace(folder / "up.json")


def withdraw(folder: Path, api: str) -> None:
    """Take back what `announce` told, unless another server has told of itself since."""
    try:
        told = json.loads((folder / "up.json").read_text())["api"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if told == api:
        (folder / "up.json").unlink(missing_ok=True)


def _whose(folder: Path) -> str:
    try:
        known = json.loads((folder / "up.json").read_text())
        return f" (process {int(known['pid'])}, {known['api']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
