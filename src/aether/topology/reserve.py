"""A little disk space kept aside, so that a server can start on a full disk and serve what runs.

A start must record some things (whose the apps are, above all). The file is given up only by a start that finds the
disk full, never by a running server, whose changes would eat it and leave nothing for the start after a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from aether.observability.logging import logger

RESERVE_BYTES = 2 * 1024 * 1024
_NAME = "reserve"
_PAUSE_SECS = 60.0
_log = logger(__name__)


def give_up_if_full(folder: Path) -> bool:
    """Free the reserve when there is hardly any other space; whether it did."""
    path = folder / _NAME
    if _free(folder) >= RESERVE_BYTES or not path.exists():
        return False
    path.unlink(missing_ok=True)
    _log.warning("the disk of the data directory is full; the reserve is used to start", hint="free some space")
    return True


def keep(folder: Path) -> bool:
    """Make the reserve where there is none and space is plenty; whether there is one. Never raises OSError."""
    path = folder / _NAME
    try:
        if path.exists() and path.stat().st_size == RESERVE_BYTES:
            return True
        if _free(folder) < 2 * RESERVE_BYTES:
            return False
        part = path.with_name(f"{_NAME}.part")
        with part.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        part.replace(path)
    except (OSError, AttributeError) as error:  # not every system and filesystem can set space aside
        _log.debug("no reserve could be made", error=str(error))
        return False
    return True


async def keep_up(folder: Path, stop: asyncio.Event) -> None:
    """Make the reserve again when space has come back, until `stop` is set."""
    while not stop.is_set():
        await asyncio.to_thread(keep, folder)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PAUSE_SECS):
                await stop.wait()


def _free(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize
