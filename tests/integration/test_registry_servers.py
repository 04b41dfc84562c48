"""Several servers on one database and one store: one at a time works on an artifact, whatever becomes of it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from aether.model.errors import ServiceUnavailable
from aether.registry.sweeper import ArtifactSweeper, Keep
from aether.registry.upload_rows import Said
from aether.registry.uploads import Announced
from aether.stores.database.tables import artifacts, leases, uploads
from support.served import Served, digest_of, random_bytes, served

pytestmark = pytest.mark.usefixtures("database_url")

TTL_SECS = 1.5
DATA = random_bytes(200_000)
DIGEST = digest_of(DATA)
KEY = f"artifacts/shop/{DIGEST}/app.tar.gz"

CHILD = """
import asyncio, os, signal, sys
from pathlib import Path
from aether.model.errors import AetherError
from aether.registry import upload_rows
from aether.registry.upload_rows import Said
from aether.registry.uploads import Announced
from support.served import served

folder, ttl, point, number, upload_id, digest, size = sys.argv[1:]

def now():
    print("now", flush=True)
    os.kill(os.getpid(), int(number))

async def at_rest(api):
    # whoever stands still in the middle of a write keeps SQLite's only writer's lock: that is not the point here
    async with api.database.kind.turn():
        now()

async def main():
    async with served(Path(folder), lease_secs=float(ttl)) as api:
        when, _, name = point.partition("-")
        owner = upload_rows if name == "begin_completing" else api.objects
        real = getattr(owner, name)

        async def spied(*args, **more):
            if when == "before":
                await at_rest(api)
            found = await real(*args, **more)
            if name == "begin_completing":
                now()  # within its transaction
            elif when == "after":
                await at_rest(api)
            return found

        setattr(owner, name, spied)
        try:
            announced = Announced("shop", digest, int(size))
            done = await api.registry.uploads.complete(announced, upload_id, Said(), "child")
            print("stored", done.duplicate, flush=True)
        except AetherError as error:
            print(error.code, flush=True)

asyncio.run(main())
"""
POINTS = [
    "after-begin_completing", "before-claim", "after-claim", "before-sha256", "after-sha256", "before-move",
    "after-move",
]  # fmt: skip


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Served, Served]]:
    async with served(tmp_path, lease_secs=TTL_SECS) as one, served(tmp_path, lease_secs=TTL_SECS) as two:
        await one.add_app("shop")
        yield one, two


async def child(folder: Path, point: str, number: signal.Signals, upload_id: str) -> asyncio.subprocess.Process:
    """A server that begins to complete DATA and gets a signal at `point`; returns when it has got there."""
    arguments = [str(folder), str(TTL_SECS), point, str(int(number)), upload_id, DIGEST, str(len(DATA))]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, *arguments, env=environ, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    while (line := await process.stdout.readline()) != b"now\n":
        assert line, "it ended before"
    return process


async def check_stored_once(api: Served) -> None:
    assert api.files() == {KEY}
    assert (await api.call("GET", f"/artifacts/{DIGEST}/download"))[1] == DATA
    async with api.database.read() as tx:
        assert await tx.scalar(sa.select(sa.func.count()).select_from(artifacts)) == 1
        assert set((await tx.execute(sa.select(uploads.c.status))).scalars()) == {"completed"}
        query = sa.select(sa.func.count()).select_from(leases).where(leases.c.name.startswith("artifact/"))
        assert await tx.scalar(query) == 0, "leases come and go with the work"
    events = (await api.call("GET", f"/artifacts/{DIGEST}/events"))[1]["items"]
    assert [row["event"] for row in events].count("completed") == 1


async def test_one_upload_completed_at_two_servers_at_once(pair: tuple[Served, Served]) -> None:
    one, two = pair
    signed = await one.presign("shop", DATA)
    await one.put(signed, DATA)
    answers = await asyncio.gather(
        *(api.complete("shop", DATA, signed["upload_id"]) for _ in range(10) for api in (one, two))
    )
    assert [(status, done["duplicate"]) for status, done in answers] == [(200, False)] * 20
    await check_stored_once(two)


async def test_uploads_of_the_same_bytes_at_two_servers_at_once(pair: tuple[Served, Served]) -> None:
    signed = [await pair[n % 2].presign("shop", DATA) for n in range(8)]
    for n, upload in enumerate(signed):
        assert await pair[n % 2].put(upload, DATA) == 200
    answers = await asyncio.gather(
        *(pair[(n + 1) % 2].complete("shop", DATA, upload["upload_id"]) for n, upload in enumerate(signed))
    )
    assert sorted((status, done["duplicate"]) for status, done in answers) == [(200, False)] + [(200, True)] * 7
    await check_stored_once(pair[0])


async def test_wrong_bytes_completed_at_two_servers_at_once_fail_everywhere(pair: tuple[Served, Served]) -> None:
    signed = await pair[0].presign("shop", DATA)
    await pair[0].put(signed, b"x" * len(DATA))
    answers = await asyncio.gather(
        *(api.complete("shop", DATA, signed["upload_id"]) for _ in range(5) for api in pair)
    )
    codes = sorted(error["code"] for _, error in answers)
    assert codes == ["conflict"] * 9 + ["digest_mismatch"]
    assert pair[0].files() == set()


@pytest.mark.parametrize("point", POINTS)
async def test_a_killed_server_s_upload_is_finished_by_another(tmp_path: Path, point: str) -> None:
    async with served(tmp_path, lease_secs=TTL_SECS) as api:
        await api.add_app("shop")
        signed = await api.presign("shop", DATA)
        await api.put(signed, DATA)
        killed = await child(tmp_path, point, signal.SIGKILL, signed["upload_id"])
        assert await killed.wait() == -signal.SIGKILL
        status, done = await api.complete("shop", DATA, signed["upload_id"])
        assert (status, done["duplicate"]) == (200, False)
        await check_stored_once(api)


@pytest.mark.parametrize("point", ["after-claim", "after-move"])
async def test_a_killed_server_s_upload_is_finished_without_anybody_asking(tmp_path: Path, point: str) -> None:
    async with served(tmp_path, lease_secs=TTL_SECS) as api:
        await api.add_app("shop")
        signed = await api.presign("shop", DATA)
        await api.put(signed, DATA)
        killed = await child(tmp_path, point, signal.SIGKILL, signed["upload_id"])
        await killed.wait()
        assert await api.registry.recover() == 0, "its lease may still be held"
        async with asyncio.timeout(30):
            while not await api.registry.recover():
                await asyncio.sleep(TTL_SECS / 5)
        await check_stored_once(api)


@pytest.mark.parametrize("point", POINTS[1:])
async def test_a_frozen_server_is_overtaken_and_harmless_when_it_thaws(tmp_path: Path, point: str) -> None:
    async with served(tmp_path, lease_secs=TTL_SECS) as api:
        await api.add_app("shop")
        signed = await api.presign("shop", DATA)
        await api.put(signed, DATA)
        frozen = await child(tmp_path, point, signal.SIGSTOP, signed["upload_id"])
        status, done = await api.complete("shop", DATA, signed["upload_id"])
        assert (status, done["duplicate"]) == (200, False)
        await check_stored_once(api)
        frozen.send_signal(signal.SIGCONT)
        assert frozen.stdout is not None
        said = (await frozen.stdout.read()).decode().split()
        assert await frozen.wait() == 0
        assert "service_unavailable" in said
        assert "stored" not in said
        await check_stored_once(api)


async def test_a_server_that_was_overtaken_deletes_nothing(pair: tuple[Served, Served]) -> None:
    """The one that purges stands still between the row and the bytes; meanwhile another stores them again."""
    one, two = pair
    await one.upload("shop", DATA)
    async with one.database.read() as tx:
        artifact_id = await tx.scalar(sa.select(artifacts.c.id))
    sweeper = ArtifactSweeper(one.database, one.registry, Keep(1, 0.0))
    await two.upload("shop", random_bytes(10))
    reached, go_on = asyncio.Event(), asyncio.Event()
    listed = one.objects.list

    async def slow(prefix: str) -> AsyncIterator[tuple[str, int, float]]:
        reached.set()
        await go_on.wait()
        async for entry in listed(prefix):
            yield entry

    one.objects.list = slow
    await _freeze(one)
    sweeping = asyncio.create_task(sweeper.sweep(dry_run=False))
    await reached.wait()
    assert (await two.upload("shop", DATA))["duplicate"] is False
    go_on.set()
    with pytest.raises(ServiceUnavailable):
        await sweeping
    assert KEY in two.files()
    assert (await two.call("GET", f"/artifacts/{DIGEST}/download"))[1] == DATA
    async with two.database.read() as tx:
        row = (await tx.execute(sa.select(artifacts).where(artifacts.c.id == artifact_id))).one()
        assert (row.status, row.purged_at) == ("stored", None)


async def _freeze(api: Served) -> None:
    """Renew no lease of this server any more, as a process that stands still would."""
    locks: Any = api.registry.tools.locks
    locks._leases._renewing.cancel()


async def test_a_lease_that_nobody_renews_lapses_for_others(pair: tuple[Served, Served]) -> None:
    one, two = pair
    app_id = await one.add_app("other")
    async with AsyncExitStack() as stack:
        hold = await stack.enter_async_context(one.registry.alone_with(app_id, DIGEST))
        hold.check()
        async with two.registry.tools.locks.if_free(app_id, DIGEST) as theirs:
            assert theirs is None
        await _freeze(one)
        async with two.registry.alone_with(app_id, DIGEST) as taken:
            taken.check()
            with pytest.raises(ServiceUnavailable):
                hold.check()
            with pytest.raises(ServiceUnavailable):
                async with one.database.write() as tx:
                    await hold.confirm(tx)
    announced = Announced("shop", DIGEST, len(DATA))
    made = await two.registry.uploads.presign(announced, "test")
    assert made.upload_id is not None
    with pytest.raises(Exception, match="nothing was uploaded"):
        await two.registry.uploads.complete(announced, made.upload_id, Said(), "test")
