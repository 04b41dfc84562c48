"""Artifacts on this machine: the folder of an app in the cache, and what is kept there."""

from __future__ import annotations

import os
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.context import Context

KEPT = 3
DOCUMENTS = (".manifest.json", ".sbom.json", ".sig", ".provenance.json")
"""What lies beside `app-<digest>.tar.gz` and goes with it."""


def folder_of(context: Context, app: str) -> Path:
    """Where the artifacts of an app are kept when the user names no folder."""
    from aether.client.session import cache_dir

    return Path(cache_dir(context.environ)) / "artifacts" / app


def prune(folder: Path, newest: Path) -> None:
    """Keep the newest artifacts of an app and drop the rest; the registry has what was deployed."""

    def age(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    others = sorted((path for path in folder.glob("app-*.tar.gz") if path.name != newest.name), key=age, reverse=True)
    for artifact in others[KEPT - 1 :]:
        # the artifact goes last: while it is there, what a killed command left is found again
        for ending in DOCUMENTS:
            artifact.with_name(artifact.name.removesuffix(".tar.gz") + ending).unlink(missing_ok=True)
        artifact.unlink(missing_ok=True)
    for part in folder.glob(".pack-*.part"):
        if not _is_alive(part.name):
            part.unlink(missing_ok=True)


def _is_alive(name: str) -> bool:
    """Whether the process that writes the unfinished file `name` (`.pack-PID-...`) may still be there."""
    pid = name.split("-")[1]
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, PermissionError):
        return True
    return True


def find(context: Context, digest: str, app: str | None = None) -> Path | None:
    """The artifact with this digest in the cache, of `app` when given."""
    from aether.client.session import cache_dir

    home = Path(cache_dir(context.environ)) / "artifacts"
    found = sorted(home.glob(f"{app or '*'}/app-{digest}.tar.gz"))
    return found[0] if found else None


def digest_in(name: str) -> str | None:
    """The digest that the name of an artifact carries."""
    digest = name.removeprefix("app-").removesuffix(".tar.gz")
    is_named = name == f"app-{digest}.tar.gz" and len(digest) == 64 and set(digest) <= set("0123456789abcdef")
    return digest if is_named else None
