"""The key-value store on SQLite: its clock, its bounds, and processes that share the file and are killed."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from pathlib import Path

import pytest

from aether.coordination.elections import Election
from aether.coordination.kept import kept_lease
from aether.model.errors import Compacted, LeaseGone, ServiceUnavailable
from aether.model.kv import Put
from aether.stores.kv import history
from aether.stores.kv.sqlite import SqliteKV
from aether.stores.local.uptime import boot_id, uptime
from support import kv_main
from support.spawned import Spawned, spawned

MAIN = Path(kv_main.__file__)


class Machine:
    """A clock that the test moves, and starts anew."""

    def __init__(self) -> None:
        self.now, self.boots = 1000.0, 1

    def store(self, path: Path) -> SqliteKV:
        return SqliteKV(path, boot=lambda: f"boot {self.boots}", now=lambda: self.now)


@pytest.fixture
async def opened() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def start(store: SqliteKV, opened: AsyncExitStack) -> SqliteKV:
    await store.open()
    opened.push_async_callback(store.close)
    return store


@pytest.fixture
async def kv(tmp_path: Path, opened: AsyncExitStack) -> SqliteKV:
    return await start(SqliteKV(tmp_path / "kv.db"), opened)


# --- leases


async def test_a_lease_ends_by_its_own_clock_and_never_before(tmp_path: Path, opened: AsyncExitStack) -> None:
    machine = Machine()
    kv = await start(machine.store(tmp_path / "kv.db"), opened)
    lease = await kv.grant(10)
    await kv.put("a", b"", lease=lease)
    machine.now += 9.9
    assert await kv.expire() == 0
    await kv.keep_alive(lease)
    machine.now += 9.9
    assert await kv.expire() == 0
    assert (await kv.lease(lease)).remaining_secs == pytest.approx(0.1)
    machine.now += 0.2
    with pytest.raises(LeaseGone):
        await kv.keep_alive(lease)
    with pytest.raises(LeaseGone):
        await kv.put("b", b"", lease=lease)
    async with kv.watch("") as watch, asyncio.timeout(20):
        await kv.expire()
        assert [event.kv.key for event in (await anext(watch)).events] == ["a"]


async def test_a_machine_that_was_started_anew_ends_every_lease_whatever_its_clock_says(
    tmp_path: Path, opened: AsyncExitStack
) -> None:
    machine = Machine()
    kv = machine.store(tmp_path / "kv.db")
    await kv.open()
    lease = await kv.grant(1000)
    await kv.put("a", b"", lease=lease)
    await kv.put("stays", b"")
    await kv.close()
    machine.now, machine.boots = 3.0, 2
    kv = await start(machine.store(tmp_path / "kv.db"), opened)
    assert [item.key for item in (await kv.list("")).items] == ["stays"]
    with pytest.raises(LeaseGone):
        await kv.keep_alive(lease)


async def test_a_store_that_was_closed_and_opened_goes_on_with_its_leases(
    tmp_path: Path, opened: AsyncExitStack
) -> None:
    first = SqliteKV(tmp_path / "kv.db")
    await first.open()
    lease = await first.grant(100)
    await first.put("a", b"", lease=lease)
    await first.close()
    kv = await start(SqliteKV(tmp_path / "kv.db"), opened)
    assert await kv.keep_alive(lease) == 100
    assert uptime() <= uptime()
    assert len(boot_id()) >= 32


# --- bounds


async def test_history_is_bounded_by_its_number_of_revisions(tmp_path: Path, opened: AsyncExitStack) -> None:
    kv = await start(SqliteKV(tmp_path / "kv.db", history_revisions=20), opened)
    first = await kv.put("kept", b"")
    for n in range(60):
        last = await kv.put("a", b"%d" % n)
    await kv.get("a", revision=last - 20)
    with pytest.raises(Compacted):
        await kv.get("a", revision=last - 26)
    assert await kv.get("kept") == await kv.get("kept", revision=last - 20)
    assert (await kv.list("kept")).items[0].mod_revision == first
    assert rows(tmp_path / "kv.db") <= 20 + 5 + 1


async def test_history_is_bounded_by_its_bytes(tmp_path: Path, opened: AsyncExitStack) -> None:
    kv = await start(SqliteKV(tmp_path / "kv.db", history_bytes=1_000_000), opened)
    for _ in range(30):
        last = await kv.put("a", bytes(100_000))
    assert rows(tmp_path / "kv.db") <= 11
    assert await kv.get("a", revision=last) is not None
    with pytest.raises(Compacted):
        await kv.get("a", revision=last - 15)
    await kv.delete("a")
    await kv.transact([], [Put(f"{n}", bytes(300_000)) for n in range(3)])
    await kv.delete_prefix("")
    assert (await kv.list("")).items == ()


def rows(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT count(*) FROM history").fetchone()[0])


# --- the file


async def test_writes_that_are_committed_together_fail_apart(kv: SqliteKV) -> None:
    lease = await kv.grant(60)
    await kv.revoke(lease)
    done = await asyncio.gather(
        *(kv.put(f"k{n:02}", b"", lease=lease if n % 3 == 1 else 0) for n in range(30)), return_exceptions=True
    )
    refused = [n for n, outcome in enumerate(done) if isinstance(outcome, LeaseGone)]
    assert refused == list(range(1, 30, 3))
    revisions = [outcome for outcome in done if isinstance(outcome, int)]
    assert revisions == list(range(revisions[0], revisions[0] + 20)), "what was refused took no revision"
    assert len((await kv.list("")).items) == 20


async def test_a_change_that_nobody_told_of_is_noticed(kv: SqliteKV, tmp_path: Path) -> None:
    async with kv.watch("") as watch, asyncio.timeout(20):
        waiting = asyncio.create_task(anext(watch))
        await asyncio.sleep(0)
        with closing(sqlite3.connect(tmp_path / "kv.db", isolation_level=None)) as silent:
            silent.execute("BEGIN IMMEDIATE")
            history.transact(silent, history.Clock("", 0), [], [Put("a", b"")], [])
            silent.execute("COMMIT")
        assert [event.kv.key for event in (await waiting).events] == ["a"]


async def test_a_file_that_another_holds_is_said_to_be_busy_and_used_again_afterwards(
    tmp_path: Path, opened: AsyncExitStack
) -> None:
    kv = await start(SqliteKV(tmp_path / "kv.db", patience_secs=0.2), opened)
    await kv.put("a", b"1")
    with closing(sqlite3.connect(tmp_path / "kv.db", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(ServiceUnavailable, match="another process"):
            await kv.put("a", b"2")
        found = await kv.get("a")
        assert found is not None
        assert found.value == b"1"
        holder.execute("ROLLBACK")
    await kv.put("a", b"3")


async def test_what_is_no_store_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    path.write_bytes(b"something else " * 1000)
    with pytest.raises(ServiceUnavailable):
        await SqliteKV(path).open()
    assert path.read_bytes() == b"something else " * 1000
    path.unlink()
    with closing(sqlite3.connect(path)) as newer:
        newer.execute("PRAGMA user_version=99")
    with pytest.raises(ServiceUnavailable, match="version"):
        await SqliteKV(path).open()
    with pytest.raises(ServiceUnavailable):
        await SqliteKV(path / "below" / "kv.db").open()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.endswith(".wake")) == []


async def test_a_store_that_is_closed_leaves_only_its_file(tmp_path: Path) -> None:
    kv = SqliteKV(tmp_path / "kv.db")
    await kv.open()
    await kv.put("a", b"")
    await kv.close()
    assert [p.name for p in tmp_path.iterdir()] == ["kv.db"]
    assert (tmp_path / "kv.db").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ServiceUnavailable):
        await kv.get("a")


# --- processes


async def run(stack: AsyncExitStack, path: Path, task: str, *names: str) -> list[Spawned]:
    found = [await stack.enter_async_context(spawned(MAIN, path, task, name)) for name in names]
    for process in found:
        assert await process.line() == "ready"
    return found


async def test_processes_that_race_lose_no_change(tmp_path: Path, kv: SqliteKV) -> None:
    await kv.put("n", b"0")
    async with AsyncExitStack() as stack, kv.watch("n") as watch:
        counting = await run(stack, tmp_path / "kv.db", "count", "one", "two")
        for process in counting:
            assert await process.line() == "done"
        seen: list[bytes] = []
        async with asyncio.timeout(20):
            while len(seen) < 80:
                seen += [event.kv.value for event in (await anext(watch)).events]
    assert seen == [b"%d" % n for n in range(1, 81)]
    assert [(k.key, k.version) for k in (await kv.list("by/")).items] == [("by/one", 40), ("by/two", 40)]


async def test_a_writer_that_is_killed_loses_nothing_that_was_acknowledged(tmp_path: Path, kv: SqliteKV) -> None:
    acknowledged: list[int] = []
    async with AsyncExitStack() as stack, kv.watch("") as watch, asyncio.timeout(60):
        (writer,) = await run(stack, tmp_path / "kv.db", "write", "w")
        acknowledged = [int(await writer.line()) for _ in range(50)]
        await writer.kill()
        acknowledged += map(int, await writer.rest())
        seen: list[int] = []
        while not seen or seen[-1] < acknowledged[-1]:
            seen += [event.kv.mod_revision for event in (await anext(watch)).events]
        last = await kv.put("after", b"")
        while seen[-1] < last:
            seen += [event.kv.mod_revision for event in (await anext(watch)).events]
    assert seen == list(range(acknowledged[0], last + 1)), "every revision once, and those acknowledged among them"
    assert len(list((tmp_path / "kv.db.wake").iterdir())) == 1, "the pipe of the dead is gone"


async def test_a_leader_that_is_killed_is_followed_after_its_lease(tmp_path: Path, kv: SqliteKV) -> None:
    async with AsyncExitStack() as stack, asyncio.timeout(60):
        (leader,) = await run(stack, tmp_path / "kv.db", "lead", "first")
        term = int(await leader.line())
        lease = await stack.enter_async_context(kept_lease(kv, 30))
        campaign = asyncio.create_task(Election(kv, "e").campaign(b"second", lease))
        while len((await kv.list("e/")).items) < 2:
            await asyncio.sleep(0.01)
        await leader.kill()
        leads = await campaign
        assert leads.term > term
        found = await Election(kv, "e").leader()
        assert found is not None
        assert (found.value, found.term) == (b"second", leads.term)
