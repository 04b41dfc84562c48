"""Packing a tree into an artifact (signature; see `pack`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aether.artifact.tree import Entry


@dataclass(frozen=True, slots=True)
class Packed:
    """A written artifact. Sizes are bytes; digests are 64 lower-case hex characters."""

    artifact: Path
    manifest: Path
    digest: str
    content_digest: str
    size_bytes: int
    tar_bytes: int
    files: int


def pack(
    entries: Sequence[Entry],
    out_dir: Path,
    *,
    level: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Packed:
    """Write `app-<digest>.tar.gz` and `app-<digest>.manifest.json` into `out_dir`; `progress(done, total)` counts entries."""
    raise NotImplementedError
