"""Logs of ended instances of functions: the newest are kept, whoever they are of."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

_SUFFIX = ".log"


def trim_logs(folder: Path, held: Collection[str], keep: int) -> int:
    """Remove the logs below `folder` of all instances but those `held` and the `keep` that wrote last; returns how
    many instances' logs went. Blocks."""
    found: dict[str, list[Path]] = {}
    for path in folder.rglob(f"*{_SUFFIX}*"):
        name = path.name.partition(_SUFFIX)[0]
        if name and name not in held:
            found.setdefault(name, []).append(path)
    newest = sorted(found, key=lambda name: max(_written(path) for path in found[name]), reverse=True)
    for name in newest[keep:]:
        for path in found[name]:
            path.unlink(missing_ok=True)
    return len(newest[keep:])


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
