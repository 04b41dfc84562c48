"""A queue of each kind, for tests that hold for all of them; `open` gives another client of the same queue, as
another process would have."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aether.model.queue import Limits, Queue
from aether.stores.queue.sqlite import SqliteQueue

KINDS = ["sqlite"]
LIMITS = Limits(visibility_secs=300.0, max_deliveries=3, max_length=8, max_dead=3)
"""Time is not what takes a delivery from its consumer in most tests."""


class Queues:
    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.path = folder / "queue.db"
        self._opened: list[SqliteQueue] = []

    async def open(self, limits: Limits = LIMITS) -> Queue:
        queue = SqliteQueue(self.path, limits)
        await queue.open()
        self._opened.append(queue)
        return queue

    async def close(self) -> None:
        for queue in self._opened:
            await queue.close()


@asynccontextmanager
async def queues(kind: str, folder: Path) -> AsyncIterator[Queues]:
    made = Queues(kind, folder)
    try:
        yield made
    finally:
        await made.close()
