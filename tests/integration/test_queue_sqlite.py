"""The queue on SQLite: its clock, and processes that share the file and are killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from aether.model.errors import QueueFull
from aether.model.queue import Lengths
from aether.stores.queue.sqlite import SqliteQueue
from support import queue_main
from support.queues import LIMITS
from support.spawned import Spawned, spawned

MAIN = Path(queue_main.__file__)


class Machine:
    """A clock that the test moves, and starts anew."""

    def __init__(self) -> None:
        self.now, self.boots = 1000.0, 1

    def queue(self, path: Path) -> SqliteQueue:
        return SqliteQueue(path, LIMITS, boot=lambda: f"boot {self.boots}", now=lambda: self.now)


async def test_the_time_of_a_delivery_is_its_own_clock_s_and_ends_with_the_boot(tmp_path: Path) -> None:
    machine = Machine()
    queue = machine.queue(tmp_path / "queue.db")
    await queue.open()
    await queue.enqueue("jobs", b"a")
    (first,) = await queue.take("jobs", "one")
    machine.now += 299.0
    assert await queue.claim_stale("jobs", "two") == []
    await queue.extend(first)
    machine.now += 299.0
    assert await queue.claim_stale("jobs", "two") == []
    machine.now += 2.0
    (second,) = await queue.claim_stale("jobs", "two")
    await queue.close()
    machine.now, machine.boots = 5.0, 2
    queue = machine.queue(tmp_path / "queue.db")
    await queue.open()
    (third,) = await queue.claim_stale("jobs", "three")
    assert (second.number, third.number) == (2, 3)
    await queue.close()
    assert [p.name for p in tmp_path.iterdir()] == ["queue.db"]


# --- processes


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as made:
        yield made


@pytest.fixture
async def queue(tmp_path: Path) -> AsyncIterator[SqliteQueue]:
    made = SqliteQueue(tmp_path / "queue.db", LIMITS)
    await made.open()
    yield made
    await made.close()


async def run(stack: AsyncExitStack, path: Path, task: str, *names: str) -> list[Spawned]:
    found = [await stack.enter_async_context(spawned(MAIN, path, task, name)) for name in names]
    for process in found:
        assert await process.line() == "ready"
    return found


async def test_the_job_of_a_consumer_that_is_killed_is_claimed_by_another(
    tmp_path: Path, queue: SqliteQueue, stack: AsyncExitStack
) -> None:
    (holder,) = await run(stack, tmp_path / "queue.db", "hold", "holder")
    enqueued = await queue.enqueue("jobs", b"a")
    assert await holder.line() == enqueued.id
    await holder.kill()
    assert await queue.claim_stale("jobs", "heir") == [], "nobody knows yet that it is dead"
    assert await queue.forfeit("jobs", "holder") == 1
    (heir,) = await queue.claim_stale("jobs", "heir")
    assert (heir.message.id, heir.number) == (enqueued.id, 2)
    assert await queue.acknowledge(heir)


async def test_consumers_in_processes_do_every_job_and_none_twice(
    tmp_path: Path, queue: SqliteQueue, stack: AsyncExitStack
) -> None:
    workers = await run(stack, tmp_path / "queue.db", "work", "one", "two")
    said = [asyncio.create_task(worker.rest()) for worker in workers]
    async with asyncio.timeout(60):
        for n in range(40):
            while True:
                try:
                    await queue.enqueue("jobs", b"%d" % n)
                    break
                except QueueFull:
                    await asyncio.sleep(0.005)
        while await queue.lengths("jobs") != Lengths(0, 0, 0):
            await asyncio.sleep(0.01)
        for worker in workers:
            await worker.kill()
        done = [line for task in said for line in await task]
    assert sorted(map(int, done)) == list(range(40))
