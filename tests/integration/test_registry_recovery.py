"""What kill -9 leaves behind, and what nobody completed: processes are killed for real."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from aether.registry.collector import PendingCollector
from aether.stores.database.tables import applications, artifacts, uploads
from support.served import Served, digest_of, random_bytes, served

pytestmark = pytest.mark.usefixtures("database_url")

DATA = random_bytes(200_000)
KEY = f"artifacts/shop/{digest_of(DATA)}/app.tar.gz"

CHILD = """
import asyncio, os, signal, sys
from pathlib import Path
from aether.registry.upload_rows import Said
from aether.registry.uploads import Announced
from support.served import served

def die():
    os.kill(os.getpid(), signal.SIGKILL)

async def main(folder, point, upload_id, digest, size):
    async with served(Path(folder)) as api:
        real = getattr(api.objects, point.split("-")[1]) if "-" in point else None
        async def before(*args):
            die()
        async def after(*args):
            await real(*args)
            die()
        if real is not None:
            setattr(api.objects, point.split("-")[1], before if point.startswith("before") else after)
        await api.registry.uploads.complete(Announced("shop", digest, size), upload_id, Said(), "test")
        assert point == "answered"
        die()

asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5])))
"""

POINTS = ["before-claim", "after-claim", "after-sha256", "before-move", "after-move", "answered"]


async def killed_at(point: str, folder: Path) -> str:
    """Upload DATA, then run complete in a child that is killed at `point`; returns the upload's id."""
    async with served(folder) as api:
        await api.add_app("shop")
        signed = await api.presign("shop", DATA)
        await api.put(signed, DATA)
    upload_id = signed["upload_id"]
    arguments = [str(folder), point, upload_id, digest_of(DATA), str(len(DATA))]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    child = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", CHILD, *arguments], env=environ, timeout=60, check=False
    )
    assert child.returncode == -signal.SIGKILL
    return str(upload_id)


async def assert_stored(api: Served) -> None:
    assert api.files() == {KEY}
    assert (await api.call("GET", f"/artifacts/{digest_of(DATA)}/download"))[1] == DATA
    async with api.database.read() as tx:
        assert set((await tx.execute(sa.select(uploads.c.status))).scalars()) == {"completed"}
        assert await tx.scalar(sa.select(sa.func.count()).select_from(artifacts)) == 1


@pytest.mark.parametrize("point", POINTS)
async def test_a_repeated_complete_finishes_after_kill_9(tmp_path: Path, point: str) -> None:
    upload_id = await killed_at(point, tmp_path)
    async with served(tmp_path) as api:
        status, done = await api.complete("shop", DATA, upload_id)
        assert (status, done["duplicate"], done["verified"]) == (200, False, False)
        await assert_stored(api)


@pytest.mark.parametrize("point", POINTS)
async def test_recovery_finishes_after_kill_9(tmp_path: Path, point: str) -> None:
    upload_id = await killed_at(point, tmp_path)
    async with served(tmp_path) as api:
        assert await api.registry.recover() == (0 if point == "answered" else 1)
        await assert_stored(api)
        assert api.sample("artifacts_total") == 1
        status, done = await api.complete("shop", DATA, upload_id, idempotency_key="late")
        assert (status, done["duplicate"]) == (200, False)


@pytest.mark.parametrize("point", ["after-claim", "after-move"])
async def test_the_same_bytes_may_be_uploaded_anew_after_kill_9(tmp_path: Path, point: str) -> None:
    await killed_at(point, tmp_path)
    async with served(tmp_path) as api:
        assert (await api.upload("shop", DATA))["duplicate"] is False
        await api.registry.recover()
        await assert_stored(api)


async def test_recovery_fails_what_was_corrupted_meanwhile(tmp_path: Path) -> None:
    await killed_at("after-claim", tmp_path)
    async with served(tmp_path) as api:
        (claimed,) = api.files()
        assert claimed.startswith("claimed/")
        (tmp_path / "objects" / claimed).write_bytes(b"rotten")
        assert await api.registry.recover() == 0
        assert api.files() == set()


async def test_a_server_killed_while_receiving_leaves_nothing_after_its_next_start(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom support.served import served\n"
        "async def main():\n"
        "    async with served(Path(sys.argv[1])) as api:\n"
        "        await api.add_app('shop')\n"
        "        signed = await api.presign('shop', b'x' * 5_000_000)\n"
        "        print(api.port, signed['url'], flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        script,
        str(tmp_path),
        env=environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    line = b""
    while b"/objects/" not in line:
        line = await child.stdout.readline()
    port, url = line.decode().split()
    _, writer = await asyncio.open_connection("127.0.0.1", int(port))
    writer.write(f"PUT {url} HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n".encode() + b"x" * 3_000_000)
    await writer.drain()
    while not any(part.stat().st_size for part in (tmp_path / "objects" / ".parts").iterdir()):
        await asyncio.sleep(0.005)
    child.kill()
    await child.wait()
    writer.close()
    async with served(tmp_path) as api:
        assert api.files() == set()


# --- collecting


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as one:
        await one.add_app("shop")
        yield one


def collector(api: Served, *, ahead_secs: float) -> PendingCollector:
    clock = lambda: time.time() + ahead_secs  # noqa: E731 - a fake clock
    return PendingCollector(api.database, api.objects, api.settings, api.metrics, clock)


async def test_expired_uploads_are_collected_and_others_are_not(api: Served) -> None:
    signed = await api.presign("shop", DATA)
    await api.put(signed, DATA)
    assert await collector(api, ahead_secs=86_000).collect() == 0
    assert await collector(api, ahead_secs=86_500).collect() == 1
    assert api.files() == set()
    status, error = await api.complete("shop", DATA, signed["upload_id"])
    assert (status, error["code"]) in ((409, "conflict"), (404, "not_found"))
    assert api.sample("artifact_pending_gc_runs_total") == 2
    assert api.sample("artifact_pending_gc_deleted_total") == 1


async def test_a_late_put_after_complete_is_collected_and_the_artifact_stays(api: Served) -> None:
    signed = await api.presign("shop", DATA)
    await api.put(signed, DATA)
    await api.complete("shop", DATA, signed["upload_id"])
    await api.put(signed, DATA)
    assert await collector(api, ahead_secs=0).collect() == 0
    assert await collector(api, ahead_secs=1000).collect() == 1
    assert api.files() == {KEY}


async def test_an_interrupted_complete_is_not_collected(tmp_path: Path) -> None:
    await killed_at("after-claim", tmp_path)
    async with served(tmp_path) as api:
        assert await collector(api, ahead_secs=90_000).collect() == 0
        assert await api.registry.recover() == 1
        await assert_stored(api)


async def test_collecting_beside_uploads_harms_none(api: Served) -> None:
    """A collector that runs all the time with every upload just expiring: each complete wins or is refused,
    and no artifact is ever acknowledged without its object."""
    stop = asyncio.Event()

    async def collect() -> None:
        while not stop.is_set():
            await collector(api, ahead_secs=86_400 - 0.05).collect()

    async def upload(n: int) -> tuple[bytes, int]:
        data = DATA + bytes([n])
        signed = await api.presign("shop", data)
        await api.put(signed, data)
        status, _ = await api.complete("shop", data, signed["upload_id"])
        return data, status

    collecting = asyncio.create_task(collect())
    results = [result for n in range(6) for result in await asyncio.gather(*(upload(n * 8 + i) for i in range(8)))]
    stop.set()
    await collecting
    assert {status for _, status in results} <= {200, 400, 404, 409}
    for data, status in results:
        found, body = await api.call("GET", f"/artifacts/{digest_of(data)}/download")
        assert (found, body) == (200, data) if status == 200 else found == 404


async def test_uploads_of_a_deleted_app_are_collected(api: Served) -> None:
    signed = await api.presign("shop", DATA)
    await api.put(signed, DATA)
    async with api.database.write() as tx:
        await tx.execute(sa.delete(applications))
    assert await collector(api, ahead_secs=1000).collect() == 1
    assert api.files() == set()


async def test_the_loop_ends_when_told(api: Served) -> None:
    stop = asyncio.Event()
    running = asyncio.create_task(collector(api, ahead_secs=0).run(stop))
    while api.sample("artifact_pending_gc_runs_total") == 0:
        await asyncio.sleep(0.005)
    stop.set()
    async with asyncio.timeout(2):
        await running
