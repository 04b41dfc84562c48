"""Transactions on real databases: isolation, contention, cancellation, outages and killed processes."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from aether.model.errors import ServiceUnavailable
from aether.model.names import new_id
from aether.model.times import now_us
from aether.stores.database import ending
from aether.stores.database.engine import Database
from aether.stores.database.tables import applications, configs
from support.databases import opened


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with opened(database_url, pool_size=6, timeout_secs=0.5) as made:
        yield made


only_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


async def add_app(tx: object, name: str) -> str:
    app_id = new_id()
    row = {"id": app_id, "name": name, "owner": "ann", "created_at": now_us()}
    await tx.execute(sa.insert(applications).values(row))  # type: ignore[attr-defined]
    return app_id


async def names(database: Database) -> set[str]:
    async with database.read() as tx:
        return set((await tx.execute(sa.select(applications.c.name))).scalars())


async def test_a_write_is_seen_after_it_ended(database: Database) -> None:
    async with database.write() as tx:
        await add_app(tx, "one")
        assert await names(database) == set()
    assert await names(database) == {"one"}


async def test_an_error_rolls_everything_back(database: Database) -> None:
    async def fail() -> None:
        async with database.write() as tx:
            await add_app(tx, "one")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        await fail()
    assert await names(database) == set()


async def test_rules_are_held_by_the_database(database: Database) -> None:
    async with database.write() as tx:
        await add_app(tx, "one")
    with pytest.raises(IntegrityError):
        async with database.write() as tx:
            await add_app(tx, "one")
    async with database.write() as tx:
        row = {"id": new_id(), "app_id": "none", "version": 1, "env": "{}", "created_by": "x", "created_at": 1}
        with pytest.raises(IntegrityError):
            await tx.execute(sa.insert(configs).values(row))


async def test_writes_inside_a_read_are_dropped(database: Database) -> None:
    async with database.read() as tx:
        await add_app(tx, "one")
    assert await names(database) == set()


async def test_many_writers_take_turns_and_none_is_lost(database_url: str) -> None:
    async def bump() -> None:
        async with database.write() as tx:
            seen = (await tx.execute(sa.select(applications.c.last_release).with_for_update())).scalar_one()
            await tx.execute(sa.update(applications).values(last_release=seen + 1))

    async with opened(database_url) as database:
        async with database.write() as tx:
            await add_app(tx, "one")
        await asyncio.gather(*(bump() for _ in range(50)))
        async with database.read() as tx:
            assert (await tx.execute(sa.select(applications.c.last_release))).scalar_one() == 50


@only_sqlite
async def test_a_writer_that_waits_too_long_is_told_so(database: Database) -> None:
    async with database.write():
        with pytest.raises(ServiceUnavailable, match="writers"):
            async with database.write():
                pass


@only_sqlite
async def test_another_process_holding_the_lock_is_an_outage_not_a_crash(database: Database, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "aether.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(ServiceUnavailable, match="locked"):
        async with database.write() as tx:
            await add_app(tx, "one")
    other.execute("ROLLBACK")
    other.close()
    async with database.write() as tx:
        await add_app(tx, "one")


async def test_the_pool_is_bounded(database: Database) -> None:
    async with asyncio.timeout(10):
        opened = [database.read() for _ in range(6)]
        for one in opened:
            await one.__aenter__()
        with pytest.raises(ServiceUnavailable, match="no connection"):
            await database.check()
        for one in opened:
            await one.__aexit__(None, None, None)
        await database.check()


async def test_a_cancelled_writer_leaves_nothing_and_frees_the_lock(database: Database) -> None:
    inside = asyncio.Event()

    async def slow() -> None:
        async with database.write() as tx:
            await add_app(tx, "one")
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(slow())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with database.write() as tx:
        await add_app(tx, "two")
    assert await names(database) == {"two"}


async def test_cancelling_at_any_moment_is_all_or_nothing(database: Database) -> None:
    """Walk a cancellation over every suspension point of a transaction."""

    async def pair(n: int) -> None:
        async with database.write() as tx:
            await add_app(tx, f"a{n}")
            await add_app(tx, f"b{n}")

    for n in range(40):
        task = asyncio.create_task(pair(n))
        for _ in range(n):
            await asyncio.sleep(0.0002)
        task.cancel()
        await asyncio.wait([task])
    found = await names(database)
    assert {name[1:] for name in found if name[0] == "a"} == {name[1:] for name in found if name[0] == "b"}
    async with database.write() as tx:
        await add_app(tx, "end")


WRITER = """
import asyncio, sys
import sqlalchemy as sa
from aether.stores.database import ending
from aether.stores.database.engine import Database
from aether.stores.database.tables import applications
async def main():
    database = Database(sys.argv[1])
    n = 0
    while True:
        async with database.write() as tx:
            row = {"id": f"i{n}", "name": f"n{n}", "owner": "x", "created_at": n}
            await tx.execute(sa.insert(applications).values(row))
        print(n, flush=True)
        n += 1
asyncio.run(main())
"""


async def test_kill_9_loses_nothing_acknowledged(database: Database, database_url: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", WRITER, database_url], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    acknowledged = -1
    while acknowledged < 100:
        acknowledged = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    acknowledged = max([acknowledged, *(int(line) for line in child.stdout.read().split())])
    child.wait()
    child.stdout.close()
    found = await names(database)
    assert found >= {f"n{n}" for n in range(acknowledged + 1)}
    assert len(found) <= acknowledged + 2


async def test_a_full_disk_is_an_outage_that_ends(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a full disk is tested on a tmpfs, and mounting one needs root: run as root to test it")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    try:
        database = Database(f"sqlite+aiosqlite:///{folder}/aether.db")
        await database.open()
        async with database.write() as tx:
            await add_app(tx, "before")
        filler = folder / "filler"
        with filler.open("wb", buffering=0) as out:
            free = os.statvfs(folder)
            out.write(bytes(free.f_bavail * free.f_frsize))

        async def write_much() -> None:
            for n in range(200):
                async with database.write() as tx:
                    await add_app(tx, f"n{n}")

        with pytest.raises(ServiceUnavailable, match="full"):
            await write_much()
        assert "before" in await names(database)
        filler.unlink()
        async with database.write() as tx:
            await add_app(tx, "after")
        assert {"before", "after"} <= await names(database)
        await database.close()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


async def test_a_cancellation_in_the_step_in_which_the_commit_ends_still_counts() -> None:
    async def ends_with_the_cancellation() -> int:
        outer.cancel()
        return 1

    async def caller() -> None:
        await ending.to_the_end(ends_with_the_cancellation())
        await asyncio.Event().wait()

    outer = asyncio.create_task(caller())
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(5):
            await outer
    assert outer.cancelled()
