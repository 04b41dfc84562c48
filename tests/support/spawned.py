"""A Python process that a test starts, talks to by lines and may kill."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path


class Spawned:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def line(self) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            line = await self._process.stdout.readline()
        assert line, "the process has ended"
        return line.decode().strip()

    async def rest(self) -> list[str]:
        """What it said until it was killed, as far as it got a line out."""
        assert self._process.stdout is not None
        return [
            line.strip() for line in (await self._process.stdout.read()).decode().splitlines(True) if line[-1] == "\n"
        ]

    async def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        await self._process.wait()


@asynccontextmanager
async def spawned(main: Path, *arguments: str | Path) -> AsyncIterator[Spawned]:
    """The process ends when its stdin does, at the end of the context."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, main, *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield Spawned(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(30):
                await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise
