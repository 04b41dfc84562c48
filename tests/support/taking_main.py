"""Takes a snapshot from the folder that is named, says so, and waits for a test that kills it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from unittest.mock import patch

from aether.runtimes.microvm import snapshots


def main() -> None:
    store = snapshots.SnapshotStore(Path(sys.argv[1]))

    def read(place: Path, *, sealed: bool = True) -> snapshots.Snapshot:
        print("taken", flush=True)
        sys.stdin.read()
        raise AssertionError("it was to be killed here")

    with patch.object(snapshots, "_read", read):
        asyncio.run(store.take("a" * 40))


if __name__ == "__main__":
    main()
