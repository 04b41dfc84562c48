"""How much of the disk each part of a data directory takes, within a time that a person waits for."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PATIENCE_SECS = 3.0
_LOOK_AT_CLOCK_EVERY = 512
_PARTS = {"artifacts": "objects", "releases": "releases", "logs": "logs", "volumes": "volumes"}
_BLOCK = 512
"""Of `st_blocks`, whatever the file system's own is."""


@dataclass(frozen=True, slots=True)
class Use:
    """`bytes` on disk; at least so many when the time was over before everything was seen."""

    part: str
    bytes: int
    whole: bool = True


def disk_use(data: Path, patience_secs: float = PATIENCE_SECS) -> list[Use]:
    """Artifacts, releases, logs, volumes and database. What cannot be read is left out."""
    end = time.monotonic() + patience_secs
    found = [_use(part, data / folder, end) for part, folder in _PARTS.items()]
    database = 0
    for path in data.glob("aether.db*"):
        with contextlib.suppress(OSError):
            database += path.stat().st_blocks * _BLOCK
    return [*found, Use("database", database)]


def told(found: list[Use]) -> str:
    return ", ".join(f"{use.part} {'' if use.whole else 'at least '}{_size(use.bytes)}" for use in found)


def _use(part: str, folder: Path, end: float) -> Use:
    total = 0
    seen: set[tuple[int, int]] = set()
    for count, entry in enumerate(_below(folder)):
        with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
            status = entry.stat(follow_symlinks=False)
            if status.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
            total += status.st_blocks * _BLOCK
        if count % _LOOK_AT_CLOCK_EVERY == 0 and time.monotonic() > end:
            return Use(part, total, whole=False)
    return Use(part, total)


def _below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Without recursion: a volume may be nested as deep as an app likes."""
    waiting = [str(folder)]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError:  # gone meanwhile, never made, or not ours to read
            continue
        for entry in entries:
            yield entry
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
