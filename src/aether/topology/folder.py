"""The data directory of one server: made private, owned by one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from aether.model.errors import LocalIOError


@contextmanager
def owned(folder: Path) -> Generator[None]:
    """Make `folder` (0700) and hold its lock. Raises LocalIOError when it cannot be made or is in use."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
        (folder / "run").mkdir(mode=0o700, exist_ok=True)
        lock = os.open(folder / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LocalIOError(f"the data directory {folder} cannot be used: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LocalIOError(
                f"another server{_whose(folder)} already runs on {folder}; "
                "stop it, or set AETHER_DATA_DIR to another folder"
            ) from None
        yield
    finally:
        os.close(lock)


def announce(folder: Path, api: str) -> None:
    """Tell local clients where the server is."""
    part = folder / "up.json.part"
    part.write_text(json.dumps({"api": api, "pid": os.getpid()}) + "\n")
    part.chmod(0o644)
    part.replace(folder / "up.json")


def withdraw(folder: Path) -> None:
    (folder / "up.json").unlink(missing_ok=True)


def _whose(folder: Path) -> str:
    try:
        known = json.loads((folder / "up.json").read_text())
        return f" (process {int(known['pid'])}, {known['api']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
