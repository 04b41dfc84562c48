"""Taking away for real: beside uploads and deployments, after kills, and what is told of it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from aether.apps.artifact_rows import find_artifact, need_artifact
from aether.apps.records import find_app
from aether.model.deployment import DeploymentStatus
from aether.model.errors import ArtifactGone, NotFound
from aether.model.names import new_id
from aether.model.times import now_us
from aether.observability.metrics import Metrics
from aether.registry.records import storage_key
from aether.registry.service import Registry
from aether.registry.sweeper import ArtifactSweeper, Keep, OrphanSweeper
from aether.registry.upload_rows import Said
from aether.registry.uploads import Announced
from aether.settings import load
from aether.stores.database.engine import Database
from aether.stores.database.tables import applications, artifacts, deployments
from aether.stores.keys import keyring
from aether.stores.objects.filesystem import FilesystemObjects
from aether.stores.objects.signing import UrlSigner, load_key
from support.server import Server, hello, server, wait_for


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Server]:
    with server(
        tmp_path / "up",
        AETHER_RETENTION_GRACE_SECS="0",
        AETHER_RETENTION_INTERVAL_SECS="0",
        AETHER_RETAIN_LATEST_PER_APP="2",
        AETHER_DEPLOYMENT_FAILED_TTL_SECS="0.001",
        AETHER_AUDIT_TTL_SECS="3600",
        AETHER_STOP_GRACE_SECS="1",
    ) as it:
        yield it


def collect(up: Server, *, dry_run: bool = False) -> dict[str, int]:
    status, done = up.api("POST", "/gc", {"dry_run": dry_run})
    assert status == 200, done
    assert all(row["error"] is None for row in done["items"]), done
    return {row["chore"]: row["deleted"] for row in done["items"]}


def test_old_artifacts_go_and_a_rollback_to_one_says_so(up: Server) -> None:
    made = [up.deploy("many", hello(f"r{n}")) for n in range(8)]
    assert collect(up, dry_run=True)["artifacts"] == 3
    stored = [d for d in made if up.api("HEAD", f"/artifacts/{d['digest']}")[0] == 200]
    assert len(stored) == 8, "a dry run takes nothing away"
    assert collect(up)["artifacts"] == 3
    there = [up.api("HEAD", f"/artifacts/{d['digest']}")[0] == 200 for d in made]
    assert there == [False] * 3 + [True] * 5
    assert len(list((up.data / "objects" / "artifacts").rglob("app.tar.gz"))) == 5
    status, said = up.api("POST", "/apps/many/rollback", {"version": 1})
    assert (status, said["code"]) == (410, "artifact_gone")
    assert "AETHER_RETAIN_LATEST_PER_APP" in said["message"]
    status, back = up.api("POST", "/apps/many/rollback", {"version": 4})
    assert status in (200, 201), back
    assert up.settled(back["id"])["status"] == "active"
    assert up.said("many") == "r3"
    assert up.deploy("many", hello("r0"))["status"] == "active", "what went can be uploaded again"
    assert up.said("many") == "r0"


def test_failed_deployments_go_with_events_and_logs_but_not_the_newest(up: Server) -> None:
    up.deploy("flaky", hello("fine"))
    bad = {"server.js": "console.log('oh no'); process.exit(3);"}
    first = up.deploy("flaky", bad)
    second = up.deploy("flaky", {"server.js": bad["server.js"] + "//"})
    assert [first["status"], second["status"]] == ["failed", "failed"]
    wait_for(lambda: len(up.instances()) == 1)
    logs = set((up.data / "logs" / "flaky").iterdir())
    assert collect(up)["deployments"] == 1
    rows = up.api("GET", "/deployments?app=flaky")[1]["items"]
    assert rows[0]["id"] == second["id"]
    assert first["id"] not in [row["id"] for row in rows]
    assert up.api("GET", f"/deployments/{first['id']}")[0] == 404
    assert len(logs - set((up.data / "logs" / "flaky").iterdir())) == 1
    assert up.said("flaky") == "fine"


def test_logs_and_releases_of_what_is_gone_go_and_those_of_what_is_there_stay(up: Server) -> None:
    up.deploy("stays", hello("here"))
    logs, releases = up.data / "logs", up.data / "releases"
    before = sorted(logs.glob("stays/*"))
    assert before
    for app in ("stays", "vanished"):
        (logs / app).mkdir(exist_ok=True)
        for name in ("0000-gone.log", "0000-gone.log.1"):
            (logs / app / name).write_text("x" * 100)
    (releases / "vanished" / "abc").mkdir(parents=True)
    (releases / "vanished" / "abc" / "file").write_text("x")
    would = collect(up, dry_run=True)
    assert (would["logs"], would["stranded"]) == (2, 1)
    assert (releases / "vanished").is_dir(), "a dry run takes nothing away"
    assert up.api("POST", "/gc", {"dry_run": True})[1]["items"][-2]["bytes"] == 400
    done = collect(up)
    assert (done["logs"], done["stranded"]) == (2, 1)
    assert sorted(logs.glob("stays/*")) == before
    assert not (logs / "vanished").exists()
    assert [item.name for item in releases.iterdir()] == ["stays"]
    assert up.said("stays") == "here"
    assert (collect(up)["logs"], collect(up)["stranded"]) == (0, 0)


def test_old_audit_rows_go_in_batches(up: Server) -> None:
    up.api("POST", "/apps", {"name": "young"})
    young = len(up.api("GET", "/audit?limit=100")[1]["items"])
    with contextlib.closing(sqlite3.connect(up.data / "aether.db", timeout=10)) as database, database:
        database.executemany(
            "insert into audit values (?, ?, 'ann', 'user', 'POST /apps', 'x', 'ok', 201, '', '', '')",
            [(f"old-{n}", 1_000_000 + n) for n in range(2500)],
        )
    assert collect(up, dry_run=True)["audit"] == 2500
    assert collect(up)["audit"] == 2500
    left = up.api("GET", "/audit?limit=100")[1]["items"]
    assert len(left) >= young
    assert not [row for row in left if row["actor"] == "ann"]


def test_collecting_beside_deployments_breaks_none(up: Server) -> None:
    """Old artifacts are deployed again in the moment in which they are due to go."""
    stop = threading.Event()

    def sweep() -> None:
        while not stop.is_set():
            collect(up)

    files = [hello(f"v{n}") for n in range(9)]
    for one in files:
        up.upload("busy", one)
    sweeping = threading.Thread(target=sweep)
    sweeping.start()
    try:
        for _ in range(12):
            done = deployed_at_last(up, random.choice(files))
            assert done["status"] == "active", done["error"]
    finally:
        stop.set()
        sweeping.join()


def deployed_at_last(up: Server, files: dict[str, str]) -> dict[str, Any]:
    """Without any grace a collection may come between an upload and its deployment, which then says so."""
    for _ in range(20):
        body = {"app": "busy", "digest": up.upload("busy", files), "command": "node server.js"}
        status, made = up.api("POST", "/deployments", body)
        if status != 404:
            assert status in (200, 201), made
            return up.settled(made["id"])
        assert "upload it first" in made["message"]
    raise AssertionError("collected twenty times before it could be deployed")


def test_kill9_in_the_middle_of_collecting_leaves_nothing_broken(up: Server) -> None:
    for n in range(12):
        up.upload("cut", hello(f"v{n}"))
    up.deploy("cut", hello("runs"))

    def ask() -> None:
        with contextlib.suppress(OSError, AssertionError):
            collect(up)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(random.uniform(0, 0.03))
    up.kill9()
    asking.join()
    up.start()
    wait_for(lambda: up.said("cut") == "runs")
    collect(up)
    stored = up.api("GET", "/artifacts?app=cut&limit=100")[1]["items"]
    assert len(stored) == 2
    for n in range(12):
        up.upload("cut", hello(f"v{n}"))
    assert up.deploy("cut", hello("v3"))["status"] == "active"


def test_an_object_without_a_row_goes_when_it_is_old(up: Server) -> None:
    digest = up.upload("kept", hello("x"))
    folder = up.data / "objects" / "artifacts" / "kept" / ("e" * 64)
    folder.mkdir(parents=True)
    orphan = folder / "app.tar.gz"
    orphan.write_bytes(b"left behind")
    assert collect(up)["orphans"] == 0, "an upload may be under way"
    os.utime(orphan, (1, 1))
    os.utime(up.data / "objects" / "artifacts" / "kept" / digest / "app.tar.gz", (1, 1))
    assert collect(up, dry_run=True)["orphans"] == 1
    assert orphan.exists()
    assert collect(up)["orphans"] == 1
    assert not orphan.exists()
    assert up.deploy("kept", hello("x"))["status"] == "active"


class World:
    """A real registry over a real database and folder, with one app, without a server around it."""

    def __init__(self, folder: Path, database: Database, objects: FilesystemObjects) -> None:
        settings = load({"AETHER_DATA_DIR": str(folder)})
        self.database, self.objects = database, objects
        sealer = keyring.load(folder, given="", file=None, in_use=())
        self.registry = Registry(database, objects, settings, Metrics(), sealer)
        self.sweeper = ArtifactSweeper(database, self.registry, Keep(1, 0.0))
        self.orphans = OrphanSweeper(database, objects, self.registry, 1.0)
        self.folder = folder / "objects"

    async def upload(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        announced = Announced("it", digest, len(content))
        made = await self.registry.uploads.presign(announced, "test")
        if made.upload_id is not None:
            pending = self.folder / "pending" / made.upload_id
            pending.parent.mkdir(exist_ok=True)
            pending.write_bytes(content)
            await self.registry.uploads.complete(announced, made.upload_id, Said(), "test")
        return digest

    async def deploy(self, digest: str) -> None:
        """What recording a deployment does about its artifact, in one transaction with the row."""
        async with self.database.write() as tx:
            app = await find_app(tx, "it")
            artifact = await find_artifact(tx, app, digest)
            await need_artifact(tx, artifact.id, digest)
            await tx.execute(
                sa.insert(deployments).values(
                    id=new_id(), app_id=app.id, artifact_id=artifact.id, digest=digest, config_version=0,
                    status=DeploymentStatus.PENDING.value, strategy="rolling", command="x", timeout_secs=1.0,
                    created_by="test", created_at=now_us(),
                )
            )  # fmt: skip

    async def check(self) -> None:
        """Whatever a deployment needs is stored, and whatever is stored is there."""
        async with self.database.read() as tx:
            needed = await tx.execute(
                sa.select(artifacts.c.status).join(deployments, deployments.c.artifact_id == artifacts.c.id)
            )
            assert set(needed.scalars()) <= {"stored"}
            rows = (await tx.execute(sa.select(artifacts.c.digest).where(artifacts.c.status == "stored"))).scalars()
            for digest in rows:
                assert await self.objects.size(storage_key("it", digest)) > 0

    async def settle(self) -> None:
        async with self.database.write() as tx:
            await tx.execute(sa.delete(deployments))


@pytest.fixture
async def world(tmp_path: Path, database: Database) -> AsyncIterator[World]:
    async with database.write() as tx:
        await tx.execute(sa.insert(applications).values(id=new_id(), name="it", owner="test", created_at=now_us()))
    objects = FilesystemObjects(tmp_path / "objects", UrlSigner(load_key(tmp_path / "signing.key")))
    await objects.open()
    yield World(tmp_path, database, objects)
    await objects.close()


async def test_a_deployment_either_keeps_its_artifact_or_is_told_that_it_is_gone(world: World) -> None:
    """Many interleavings: the same artifact is uploaded, deployed and collected at once."""
    kept = gone = 0
    for turn in range(60):
        digest = await world.upload(b"wanted")
        await world.upload(b"newer %d" % turn)

        async def ask(digest: str = digest, latest: float = (0.02, 0.3)[turn % 2]) -> bool:
            await asyncio.sleep(random.uniform(0, latest))
            try:
                await world.deploy(digest)
            except (ArtifactGone, NotFound):
                return False
            return True

        deployed, _, _ = await asyncio.gather(
            ask(), world.sweeper.sweep(dry_run=False), world.sweeper.sweep(dry_run=False)
        )
        kept, gone = kept + deployed, gone + (not deployed)
        await world.check()
        await world.orphans.sweep(dry_run=False)
        await world.check()
        again = await world.upload(b"wanted")
        assert again == digest
        await world.deploy(digest)
        await world.check()
        await world.settle()
    assert kept
    assert gone


async def test_an_upload_beside_a_purge_of_the_same_artifact_is_not_lost(world: World) -> None:
    for turn in range(40):
        digest = await world.upload(b"again")
        await world.upload(b"newer %d" % turn)

        async def upload_again() -> None:
            await asyncio.sleep(random.uniform(0, 0.02))
            await world.upload(b"again")

        await asyncio.gather(upload_again(), world.sweeper.sweep(dry_run=False))
        await world.check()
        assert digest == await world.upload(b"again")
        await world.check()
