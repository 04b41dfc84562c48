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

from aether.apps.broadcast import Broadcast
from aether.apps.engine import Engine
from aether.apps.ledger import cancel_in
from aether.apps.ports import ArtifactObjects, ArtifactSource
from aether.apps.records import UNDER_WAY_VALUES, WEB, app_of, deployment_of, find_app, select_deployments
from aether.apps.tasks import Tasks
from aether.model.database import DatabasePort
from aether.model.deployment import DeploymentStatus
from aether.model.errors import AetherError, BadRequest, Conflict, NotFound
from aether.model.names import check_app_name, new_id
from aether.model.times import now_us
from aether.stores.database.tables import applications, artifacts, deployments, formations, instances, uploads

MAX_INSTANCES = 50
"""Of one process type of one app."""
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
    ready: int


class Catalogue:
    def __init__(
        self,
        database: DatabasePort,
        broadcast: Broadcast,
        engine: Engine,
        source: ArtifactSource,
        objects: ArtifactObjects,
    ) -> None:
        self._database = database
        self._broadcast = broadcast
        self._engine = engine
        self._source = source
        self._objects = objects
        self._tasks = Tasks()
        self._deletions: dict[str, asyncio.Task[None]] = {}

    async def create(self, name: str, owner: str) -> AppView:
        """Raises BadRequest for an illegal name and Conflict for one that is taken."""
        check_app_name(name)
        app_id = new_id()
        try:
            async with self._database.write() as tx:
                await tx.execute(
                    sa.insert(applications).values(id=app_id, name=name, owner=owner, created_at=now_us())
                )
        except IntegrityError:
            raise Conflict(await self._why_taken(name)) from None
        self._engine.register(app_id, name)
        return await self.get(name)

    async def get(self, name: str) -> AppView:
        async with self._database.read() as tx:
            app = await find_app(tx, name)
            row = (await tx.execute(_views().where(applications.c.id == app.id))).one()
        return _view(row)

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
            found = await tx.execute(query.order_by(applications.c.name).limit(limit + 1))
            return [_view(row) for row in found]

    async def scale(self, name: str, sizes: Mapping[str, int]) -> AppView:
        """Record how many instances each process type wants and begin to run them. Raises BadRequest, NotFound."""
        check_sizes(sizes)
        async with self._database.write() as tx:
            app = await find_app(tx, name)
            for process, wanted in sizes.items():
                row = formations.c.app_id == app.id, formations.c.process == process
                changed = await tx.execute(sa.update(formations).where(*row).values(quantity=wanted))
                if not changed.rowcount:
                    await tx.execute(
                        sa.insert(formations).values(app_id=app.id, process=process, quantity=wanted)
                    )  # fmt: skip
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
                query = select_deployments().where(
                    deployments.c.app_id == app.id, deployments.c.status.in_(UNDER_WAY_VALUES)
                )
                rows = [deployment_of(row) for row in (await tx.execute(query)).all()]
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
        await self._engine.drop(app_id, name)
        await self._source.discard_app(name)
        async with self._database.read() as tx:
            keys = list((await tx.execute(sa.select(uploads.c.id).where(uploads.c.app_id == app_id))).scalars())
        for upload_id in keys:
            for folder in ("pending", "claimed"):
                await self._objects.delete(f"{folder}/{upload_id}")
        await self._delete_objects(name)
        async with self._database.write() as tx:
            for table in (deployments, artifacts):
                await tx.execute(sa.delete(table).where(table.c.app_id == app_id))
            await tx.execute(sa.delete(applications).where(applications.c.id == app_id))
        # an upload that was being completed when the deletion began may have stored its object meanwhile
        await self._delete_objects(name)
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


async def _find_any(tx: Any, name: str) -> sa.Row[*tuple[Any, ...]]:
    row = (await tx.execute(sa.select(applications).where(applications.c.name == name))).one_or_none()
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


def _view(row: sa.Row[*tuple[Any, ...]]) -> AppView:
    release = None
    if row.deployment_id is not None:
        release = ActiveRelease(row.release, row.digest, row.deployment_id, row.rollout_completed_at)
    return AppView(
        id=row.id,
        name=row.name,
        owner=row.owner,
        created_at=row.created_at,
        status=app_status(
            has_release=release is not None, ready=row.ready, newest=row.newest, stopped=row.wanted == 0
        ),
        release=release,
        desired=(0 if release is None else 1) if row.wanted is None else row.wanted,
        ready=row.ready,
    )


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Raise BadRequest naming the process type that is unknown or out of bounds."""
    if not sizes:
        raise BadRequest('say how many, as in {"web": 3}')
    for process, wanted in sizes.items():
        if process != WEB:
            raise BadRequest(f"there is no process type '{process[:40]}'; there is '{WEB}'", {"field": process[:40]})
        if not 0 <= wanted <= MAX_INSTANCES:
            raise BadRequest(f"{process} must be 0 to {MAX_INSTANCES}, not {wanted}", {"field": process})


def app_status(*, has_release: bool, ready: int, newest: str | None, stopped: bool = False) -> str:
    """running, starting, degraded, stopped, failed or empty: what a user should know first about an app."""
    if has_release and stopped:
        return "stopped"
    if has_release and ready:
        return "running"
    if newest in UNDER_WAY_VALUES:
        return "starting"
    if has_release:
        return "degraded"
    return "failed" if newest == DeploymentStatus.FAILED.value else "empty"
