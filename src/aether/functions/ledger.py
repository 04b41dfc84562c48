"""Records of invocations on their way from the data path to where they are kept: in batches, bounded, never waited
for. What cannot be kept is counted."""

from __future__ import annotations

import asyncio
from collections import deque

import structlog

from aether.functions.ports import InvocationSink
from aether.model.errors import AetherError
from aether.model.function_instance import Invocation

BATCH = 500
EVERY_SECS = 0.5
MOST = 20_000
_log = structlog.stdlib.get_logger("aether.functions")


class InvocationLedger:
    def __init__(self, sink: InvocationSink) -> None:
        self._sink = sink
        self._held: deque[Invocation] = deque()
        self._some = asyncio.Event()
        self.dropped = 0

    def add(self, invocation: Invocation) -> None:
        if len(self._held) >= MOST:
            self.dropped += 1
            return
        self._held.append(invocation)
        if len(self._held) == 1:
            self._some.set()

    async def run(self) -> None:
        """Keep what comes, for ever."""
        while True:
            await self._some.wait()
            # those of the same moment share a transaction
            await asyncio.sleep(EVERY_SECS)
            self._some.clear()
            await self.flush()

    async def flush(self) -> None:
        """Keep what there is, unless the store is away; then it stays for the next time."""
        while self._held:
            batch = [self._held.popleft() for _ in range(min(BATCH, len(self._held)))]
            try:
                await self._sink.add(batch)
            except AetherError as error:
                self._held.extendleft(reversed(batch))
                self._some.set()
                _log.warning("invocations could not be recorded yet", waiting=len(self._held), error=error.message)
                return
