"""A process of its own on a key-value store of SQLite, for tests that kill it: `kv_main.py FILE TASK NAME`.

Says what it has done on stdout, a line at a time, and ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from aether.coordination.elections import Election
from aether.coordination.kept import kept_lease
from aether.model.kv import KV, Put, unchanged
from aether.stores.kv.sqlite import SqliteKV


def say(text: object) -> None:
    print(text, flush=True)


async def count(kv: KV, name: str) -> None:
    """Add one to `n` 40 times, by compare-and-swap."""
    done = 0
    while done < 40:
        seen = await kv.get("n")
        assert seen is not None
        swap = await kv.transact([unchanged(seen)], [Put("n", b"%d" % (int(seen.value) + 1)), Put(f"by/{name}", b"")])
        done += swap.succeeded
    say("done")


async def write(kv: KV, name: str) -> None:
    """Write without an end, and say every revision that was acknowledged."""
    number = 0
    while True:
        number += 1
        say(await kv.put(f"{name}/{number:06}", b"x" * 100))


async def lead(kv: KV, name: str) -> None:
    async with kept_lease(kv, 1) as lease:
        leads = await Election(kv, "e").campaign(name.encode(), lease)
        say(leads.term)
        await lease.lost.wait()
        say("lost")


async def main(path: Path, task: str, name: str) -> None:
    kv = SqliteKV(path)
    await kv.open()
    say("ready")
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    working = asyncio.create_task({"count": count, "write": write, "lead": lead}[task](kv, name))
    await reader.read()
    working.cancel()
    await asyncio.wait((working,))
    await kv.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
