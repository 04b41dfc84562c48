"""A process of its own on a queue of SQLite, for tests that kill it: `queue_main.py FILE TASK NAME`.

Says what it has done on stdout, a line at a time, and ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from aether.model.queue import Queue
from aether.stores.queue.sqlite import SqliteQueue

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.queues import LIMITS


def say(text: object) -> None:
    print(text, flush=True)


async def hold(queue: Queue, name: str) -> None:
    """Take one and never come to an end with it."""
    (delivery,) = await queue.take("jobs", name, wait_secs=60)
    say(delivery.message.id)


async def work(queue: Queue, name: str) -> None:
    """Say the body of every message, and acknowledge it."""
    while True:
        for delivery in await queue.take("jobs", name, wait_secs=60):
            say(delivery.message.body.decode())
            assert await queue.acknowledge(delivery)


async def main(path: Path, task: str, name: str) -> None:
    queue = SqliteQueue(path, LIMITS)
    await queue.open()
    say("ready")
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    working = asyncio.create_task({"hold": hold, "work": work}[task](queue, name))
    await reader.read()
    working.cancel()
    await asyncio.wait((working,))
    await queue.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
