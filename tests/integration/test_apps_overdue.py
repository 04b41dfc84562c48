"""What the database could not be told of instances is on record once it is back: the newest of each, in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from aether.apps.deployments import Author, DeployRequest
from aether.apps.ledger import app_lease
from aether.apps.overdue import Overdue, Unrecorded
from aether.apps.tasks import Tasks
from aether.identity.roles import DEFAULT_TEAM
from aether.leases import Lease, LeaseLost
from support.databases import LocalServer, execute, opened, rows
from support.plane import DIGEST, plane


@dataclass
class Scene:
    server: LocalServer
    overdue: Overdue
    lease: Lease
    app_id: str
    deployment_id: str

    def record(self) -> dict[str, str]:
        return {str(name): str(status) for name, status in rows(self.server.url, "select id, status from instances")}

    async def until(self, wanted: dict[str, str]) -> None:
        async with asyncio.timeout(30):
            while await asyncio.to_thread(self.record) != wanted:
                await asyncio.sleep(0.05)


@pytest.fixture
async def scene(own_postgresql: LocalServer, tmp_path: Path) -> AsyncIterator[Scene]:
    async with opened(own_postgresql.url, timeout_secs=1.0) as database:
        it, tasks = plane(tmp_path, database), Tasks()
        app = await it.catalogue.create("shop", DEFAULT_TEAM)
        await it.add_artifact("shop")
        row, _ = await it.deployments.create(DeployRequest(app="shop", digest=DIGEST, command="run"), Author("ann"))
        lease = it.leases.held(app_lease(app.id))
        assert lease is not None
        yield Scene(own_postgresql, Overdue(it.engine.ledger, tasks), lease, app.id, row.id)
        await tasks.close()


async def test_the_newest_status_is_told_once_the_database_is_back(scene: Scene) -> None:
    def about(instance: str, status: str) -> tuple[Lease, str, str, str]:
        return scene.lease, scene.app_id, instance, status

    new = Unrecorded(scene.deployment_id, 0, "web")
    scene.overdue.started(scene.lease, scene.app_id, "a", new)
    await scene.overdue.record(*about("a", "ready"))
    await scene.until({"a": "ready"})
    await asyncio.to_thread(scene.server.stop, signal.SIGQUIT)
    scene.overdue.started(scene.lease, scene.app_id, "b", new)
    for instance, status in (("b", "ready"), ("a", "draining"), ("a", "stopped")):
        await scene.overdue.record(*about(instance, status))
    await asyncio.to_thread(scene.server.start)
    await scene.until({"a": "stopped", "b": "ready"})
    await scene.overdue.record(*about("b", "failed"))
    assert await asyncio.to_thread(scene.record) == {"a": "stopped", "b": "failed"}, "nothing older comes after it"


async def test_an_app_that_another_server_runs_by_then_is_left_to_it(scene: Scene) -> None:
    taken = "update leases set owner = 'other', epoch = epoch + 1"
    await asyncio.to_thread(execute, scene.server.url, taken)
    await asyncio.to_thread(scene.server.stop, signal.SIGQUIT)
    scene.overdue.started(scene.lease, scene.app_id, "a", Unrecorded(scene.deployment_id, 0, "web"))
    await asyncio.to_thread(scene.server.start)
    async with asyncio.timeout(30):
        while not scene.lease.lost:
            await asyncio.sleep(0.05)
    assert await asyncio.to_thread(scene.record) == {}
    with pytest.raises(LeaseLost):
        await scene.overdue.record(scene.lease, scene.app_id, "a", "ready")
