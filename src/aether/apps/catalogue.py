"""Apps: made, found, listed with what runs of them, and deleted with everything they own.

A deletion is recorded first and then carried out step by step; each step may be repeated, so one that a killed
server left half-done is finished at the next start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.apps.broadcast import Broadcast
from aether.apps.engine import Engine
from aether.apps.formation import ProcessState, process_states, set_sizes
from aether.apps.ledger import app_files, app_lease, cancel_in
from aether.apps.ports import ArtifactObjects, ArtifactSource
from aether.apps.records import UNDER_WAY_VALUES, app_of, deployment_of, find_app, under_way
from aether.apps.runs import Runs
from aether.apps.tasks import Tasks
from aether.apps.volumes import AppVolumes
from aether.leases import Leases, hold
from aether.model.database import DatabasePort
from aether.model.deployment import DeploymentStatus
from aether.model.errors import AetherError, Conflict, NotFound
from aether.model.names import check_app_name, new_id
from aether.model.processes import WEB
from aether.model.times import now_us
from aether.stores.database.tables import (
    applications,
    artifacts,
    deployments,
    formations,
    instances,
    owners,
    uploads,
)

_log = structlog.stdlib.get_logger("aether.apps")


@dataclass(frozen=True, slots=True)
class ActiveRelease:
    version: int
    digest: str
    deployment_id: str
    created_at: int


@dataclass(frozen=True, slots=True)
class AppView:
    """An app and what runs of it; times in microseconds since the epoch."""

    id: str
    name: str
    owner: str
    created_at: int
    status: str
    release: ActiveRelease | None
    desired: int
    """Of web, as `ready` is."""
    ready: int
    processes: Sequence[ProcessState] = ()


class Catalogue:
    def __init__(
        self,
        database: DatabasePort,
        broadcast: Broadcast,
        engine: Engine,
        source: ArtifactSource,
        objects: ArtifactObjects,
        leases: Leases,
        runs: Runs,
        volumes: AppVolumes,
    ) -> None:
        self._database = database
        self._broadcast = broadcast
        self._engine = engine
        self._source = source
        self._objects = objects
        self._leases = leases
        self._runs = runs
        self._volumes = volumes
        self._tasks = Tasks()
        self._deletions: dict[str, asyncio.Task[None]] = {}

    async def create(self, name: str, owner: str) -> AppView:
        """Raises BadRequest for an illegal name and Conflict for one that is taken."""
        check_app_name(name)
        app_id = new_id()
        try:
            async with self._database.write() as tx:
                await hold(tx, app_files(name))
                await _hold_owner(tx, owner)
                await tx.execute(
                    sa.insert(applications).values(id=app_id, name=name, owner=owner, created_at=now_us())
                )
                lease = await self._leases.begin_in(tx, app_lease(app_id))
        except IntegrityError:
            raise Conflict(await self._why_taken(name)) from None
        self._engine.register(app_id, name, lease)
        self._broadcast.notify(app_id)
        return await self.get(name)

    async def get(self, name: str) -> AppView:
        async with self._database.read() as tx:
            app = await find_app(tx, name)
            row = (await tx.execute(_views().where(applications.c.id == app.id))).one()
            states = await process_states(tx, [app.id])
        return _view(row, states.get(app.id, ()))

    async def list(
        self, *, q: str = "", after: str | None = None, limit: int = 50, only: sa.ColumnElement[bool] | None = None
    ) -> Sequence[AppView]:
        """By name, `limit` + 1 at most; `q` is a part of the name, `after` the last name seen, `only` a condition
        on `applications`."""
        query = _views().where(applications.c.deleting_at.is_(None))
        if q:
            query = query.where(applications.c.name.contains(q, autoescape=True))
        if after is not None:
            query = query.where(applications.c.name > after)
        if only is not None:
            query = query.where(only)
        async with self._database.read() as tx:
            found = (await tx.execute(query.order_by(applications.c.name).limit(limit + 1))).all()
            states = await process_states(tx, [row.id for row in found])
        return [_view(row, states.get(row.id, ())) for row in found]

    async def transfer(self, name: str, owner: str) -> AppView:
        """Record another owner; the app goes on as it is. Raises NotFound."""
        async with self._database.write() as tx:
            await _hold_owner(tx, owner)
            app = await find_app(tx, name, lock=True)
            await tx.execute(sa.update(applications).where(applications.c.id == app.id).values(owner=owner))
        _log.info("app transferred", app=name, owner=owner)
        return await self.get(name)

    async def scale(self, name: str, sizes: Mapping[str, int]) -> AppView:
        """Record how many instances each process type wants and begin to run them. Raises BadRequest, NotFound."""
        async with self._database.write() as tx:
            app = await find_app(tx, name, lock=True)
            await set_sizes(tx, app.id, sizes)
        await self._engine.scale(app.id)
        self._broadcast.notify(app.id)
        _log.info("app scaled", app=name, **sizes)
        return await self.get(name)

    async def delete(self, name: str) -> None:
        """Take the app and all it owns away; returns when it is gone. Goes on when the caller is cancelled."""
        cancelled: list[str] = []
        async with self._database.write() as tx:
            app = app_of(await _find_any(tx, name))
            if app.deleting_at is None:
                await tx.execute(
                    sa.update(applications).where(applications.c.id == app.id).values(deleting_at=now_us())
                )
                rows = [deployment_of(row) for row in (await tx.execute(under_way(app.id))).all()]
                await cancel_in(tx, rows, "the app is being deleted")
                cancelled = [row.id for row in rows]
        self._broadcast.notify(app.id, *cancelled)
        await asyncio.shield(self._carry_out(app.id, name))

    async def finish_deletions(self) -> None:
        """Take up the deletions that an earlier server did not finish."""
        async with self._database.read() as tx:
            found = (await tx.execute(sa.select(applications).where(applications.c.deleting_at.is_not(None)))).all()
        for row in found:
            self._carry_out(row.id, row.name)

    async def close(self) -> None:
        await self._tasks.close()

    def _carry_out(self, app_id: str, name: str) -> asyncio.Task[None]:
        task = self._deletions.get(app_id)
        if task is None or task.done():
            task = self._deletions[app_id] = self._tasks.start(self._erase(app_id, name), f"delete {name}")
            task.add_done_callback(lambda _: self._deletions.pop(app_id, None))
        return task

    async def _erase(self, app_id: str, name: str) -> None:
        await self._runs.drop(app_id, name)
        await self._engine.drop(app_id, name)
        await self._source.discard_app(name)
        await self._volumes.delete_all(name)
        async with self._database.read() as tx:
            keys = list((await tx.execute(sa.select(uploads.c.id).where(uploads.c.app_id == app_id))).scalars())
        for upload_id in keys:
            for folder in ("pending", "claimed"):
                await self._objects.delete(f"{folder}/{upload_id}")
        await self._delete_objects(name)
        async with self._database.write() as tx:
            await self._leases.end_in(tx, app_lease(app_id))
            await tx.execute(sa.select(applications.c.id).where(applications.c.id == app_id).with_for_update())
            for table in (deployments, artifacts):
                await tx.execute(sa.delete(table).where(table.c.app_id == app_id))
            await tx.execute(sa.delete(applications).where(applications.c.id == app_id))
        # an upload that was being completed when the deletion began may have stored its object meanwhile
        await self._delete_objects(name)
        self._leases.forget(app_lease(app_id))
        self._broadcast.notify(app_id)
        _log.info("app deleted", app=name)

    async def _delete_objects(self, name: str) -> None:
        stored = [key async for key, _, _ in self._objects.list(f"artifacts/{name}/")]
        for key in stored:
            await self._objects.delete(key)

    async def _why_taken(self, name: str) -> str:
        try:
            await self.get(name)
        except AetherError:
            return f"the app '{name}' is still being deleted; try again in a moment"
        return f"there is already an app '{name}'"


async def _hold_owner(tx: AsyncConnection, owner: str) -> None:
    """Keep a team from being deleted until the app that it owns is on record. Raises NotFound."""
    query = sa.select(owners.c.name).where(owners.c.name == owner).with_for_update(read=True)
    if await tx.scalar(query) is None:
        raise NotFound(f"there is no user or team '{owner}'")


async def _find_any(tx: AsyncConnection, name: str) -> sa.Row[*tuple[Any, ...]]:
    query = sa.select(applications).where(applications.c.name == name).with_for_update(key_share=True)
    row = (await tx.execute(query)).one_or_none()
    if row is None:
        raise NotFound(f"there is no app '{name}'")
    return row


def _views() -> sa.Select[*tuple[Any, ...]]:
    active = deployments.alias("active")
    newest = (
        sa.select(deployments.c.status)
        .where(deployments.c.app_id == applications.c.id)
        .order_by(deployments.c.created_at.desc(), deployments.c.id.desc())
        .limit(1)
        .scalar_subquery()
    )
    ready = (
        sa.select(sa.func.count())
        .select_from(instances)
        .where(
            instances.c.app_id == applications.c.id,
            instances.c.deployment_id == applications.c.active_deployment_id,
            instances.c.process == WEB,
            instances.c.status == "ready",
        )
        .scalar_subquery()
    )
    wanted = (
        sa.select(formations.c.quantity)
        .where(formations.c.app_id == applications.c.id, formations.c.process == WEB)
        .scalar_subquery()
    )
    return sa.select(
        applications.c.id,
        applications.c.name,
        applications.c.owner,
        applications.c.created_at,
        active.c.id.label("deployment_id"),
        active.c.release,
        active.c.digest,
        active.c.rollout_completed_at,
        newest.label("newest"),
        ready.label("ready"),
        wanted.label("wanted"),
    ).outerjoin(active, active.c.id == applications.c.active_deployment_id)


def _view(row: sa.Row[*tuple[Any, ...]], processes: Sequence[ProcessState]) -> AppView:
    release = None
    if row.deployment_id is not None:
        release = ActiveRelease(row.release, row.digest, row.deployment_id, row.rollout_completed_at)
    running = [state for state in processes if state.kind != "cron" and state.desired]
    return AppView(
        id=row.id,
        name=row.name,
        owner=row.owner,
        created_at=row.created_at,
        status=app_status(
            has_release=release is not None,
            ready=all(state.ready for state in running),
            newest=row.newest,
            stopped=not running,
        ),
        release=release,
        desired=(0 if release is None else 1) if row.wanted is None else row.wanted,
        ready=row.ready,
        processes=processes,
    )


def app_status(*, has_release: bool, ready: bool, newest: str | None, stopped: bool = False) -> str:
    """running, starting, degraded, stopped, failed or empty: what a user should know first about an app. `ready`
    says that every process type which is to run has an instance that is ready, `stopped` that none is to run."""
    if has_release and stopped:
        return "stopped"
    if has_release and ready:
        return "running"
    if newest in UNDER_WAY_VALUES:
        return "starting"
    if has_release:
        return "degraded"
    return "failed" if newest == DeploymentStatus.FAILED.value else "empty"
