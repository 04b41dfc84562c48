"""Brief writers of SQLite share a transaction: none is lost, none is told too early, none takes another with it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from aether.model.errors import NotFound, ServiceUnavailable
from aether.model.names import new_id
from aether.stores.database.engine import Database
from aether.stores.database.tables import applications
from support.databases import fresh_sqlite, opened


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with opened(fresh_sqlite(tmp_path)) as made:
        yield made


async def add(database: Database, name: str, *, brief: bool = True, error: Exception | None = None) -> None:
    async with database.write(brief=brief) as tx:
        row = {"id": new_id(), "name": name, "owner": "ann", "created_at": 1}
        await tx.execute(sa.insert(applications), row)
        if error is not None:
            raise error


async def names(database: Database) -> set[str]:
    async with database.read() as tx:
        return set((await tx.execute(sa.select(applications.c.name))).scalars())


def commits(database: Database) -> list[int]:
    """Grows by one with every commit."""
    seen: list[int] = []
    sa.event.listen(database.engine.sync_engine, "commit", lambda _: seen.append(1))
    return seen


async def test_those_that_wait_at_once_share_one_commit(database: Database) -> None:
    seen = commits(database)
    await asyncio.gather(*(add(database, f"n{n}") for n in range(50)))
    assert len(seen) == 1
    assert await names(database) == {f"n{n}" for n in range(50)}
    await add(database, "alone")
    assert len(seen) == 2


async def test_each_sees_what_those_before_it_did(database: Database) -> None:
    await add(database, "one")

    async def bump() -> None:
        async with database.write(brief=True) as tx:
            seen = (await tx.execute(sa.select(applications.c.last_release))).scalar_one()
            await tx.execute(sa.update(applications).values(last_release=seen + 1))

    await asyncio.gather(*(bump() for _ in range(30)))
    async with database.read() as tx:
        assert (await tx.execute(sa.select(applications.c.last_release))).scalar_one() == 30


async def test_one_that_fails_takes_back_only_its_own(database: Database) -> None:
    told = await asyncio.gather(
        add(database, "first", error=NotFound("no")), add(database, "a"), add(database, "a"),
        add(database, "b", error=NotFound("no")), add(database, "plain", brief=False), add(database, "plain"),
        add(database, "c"), return_exceptions=True,
    )  # fmt: skip
    kinds = [type(one) for one in told]
    none = type(None)
    assert kinds == [NotFound, none, IntegrityError, NotFound, none, IntegrityError, none]
    assert await names(database) == {"a", "plain", "c"}


async def test_nobody_is_told_before_it_is_kept(database: Database) -> None:
    async def acknowledged(name: str) -> bool:
        await add(database, name)
        return name in await names(database)

    assert all(await asyncio.gather(*(acknowledged(f"n{n}") for n in range(20))))


async def test_cancelled_at_any_moment_it_is_all_or_nothing(database: Database) -> None:
    async def pair(n: int, m: int) -> None:
        async with database.write(brief=True) as tx:
            for half in "ab":
                row = {"id": new_id(), "name": f"{half}{n}.{m}", "owner": "ann", "created_at": 1}
                await tx.execute(sa.insert(applications), row)

    for n in range(30):
        tasks = [asyncio.create_task(pair(n, m)) for m in range(4)]
        for _ in range(n):
            await asyncio.sleep(0.0001)
        for task in tasks[n % 4 :: 2]:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        found = await names(database)
        for m, outcome in enumerate(ended):
            if outcome is None:
                assert f"a{n}.{m}" in found
    found = await names(database)
    assert {name[1:] for name in found if name[0] == "a"} == {name[1:] for name in found if name[0] == "b"}
    await add(database, "end")


WRITERS = """
import asyncio, sys
import sqlalchemy as sa
from aether.stores.database.engine import Database
from aether.stores.database.tables import applications
async def main():
    database = Database(sys.argv[1])
    async def write(start):
        for n in range(start, 1_000_000, 8):
            async with database.write(brief=True) as tx:
                row = {"id": f"i{n}", "name": f"n{n}", "owner": "x", "created_at": n}
                await tx.execute(sa.insert(applications), row)
            print(n, flush=True)
    await asyncio.gather(*map(write, range(8)))
asyncio.run(main())
"""


async def test_kill_9_loses_nothing_acknowledged(tmp_path: Path) -> None:
    url = fresh_sqlite(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", WRITERS, url], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    acknowledged = [int(child.stdout.readline()) for _ in range(150)]
    child.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in child.stdout.read().split()]
    child.wait()
    child.stdout.close()
    async with opened(url) as database:
        found = await names(database)
    assert found >= {f"n{n}" for n in acknowledged}
    assert len(found) <= len(acknowledged) + 8


async def test_when_the_disk_is_full_all_are_told_so(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a full disk is tested on a tmpfs, and mounting one needs root: run as root to test it")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    try:
        async with opened(fresh_sqlite(folder)) as database:
            await add(database, "before")
            filler = folder / "filler"
            with filler.open("wb", buffering=0) as out:
                free = os.statvfs(folder)
                out.write(bytes(free.f_bavail * free.f_frsize))
            told: set[str] = set()
            for attempt in range(40):
                wanted = [f"n{attempt}.{n}" for n in range(10)]
                ended = await asyncio.gather(*(add(database, name) for name in wanted), return_exceptions=True)
                told |= {name for name, outcome in zip(wanted, ended, strict=True) if outcome is None}
                refused = [outcome for outcome in ended if outcome is not None]
                assert all(isinstance(outcome, ServiceUnavailable) for outcome in refused), refused
                if refused:
                    break
            assert refused
            assert await names(database) == told | {"before"}
            filler.unlink()
            await add(database, "after")
            assert await names(database) == told | {"before", "after"}
    finally:
        subprocess.run(["umount", str(folder)], check=True)
