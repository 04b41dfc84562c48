"""Makes a snapshot under the folder that is named, in a process that a test kills."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from aether.runtimes.microvm.qemu import QemuRuntime

sys.path.insert(0, str(Path(__file__).parents[1]))  # pytest does that for tests


async def main() -> None:
    from support.microvm import options

    await QemuRuntime(Path(sys.argv[1]), options(snapshots=True)).make_snapshot("node")


if __name__ == "__main__":
    asyncio.run(main())
