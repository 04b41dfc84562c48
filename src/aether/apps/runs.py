"""One-off runs: a command in a new sandbox of one of an app's releases, beside the instances that serve.

A run is recorded before it starts and when it has ended. Whoever attached holds its leash, and its keeper ends it
when that is gone or its time is over, with or without a server; what a killed server left is taken up by `resume`.
What was run is kept for those who may change the app; variables that came with it are kept nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.apps.broadcast import Broadcast
from aether.apps.configs import check_env
from aether.apps.deployments import Author
from aether.apps.engine import Engine
from aether.apps.logs import RUN
from aether.apps.ports import Attached, Instance, Runtime
from aether.apps.records import AppRow, DeploymentRow, deployment_of, find_app, find_deployment, select_deployments
from aether.apps.tasks import Tasks
from aether.model.database import DatabasePort
from aether.model.errors import AetherError, BadRequest, Conflict, NotFound, ServiceUnavailable
from aether.model.instance import Console, InstanceExit
from aether.model.names import new_id
from aether.model.processes import check_command
from aether.model.times import now_us
from aether.stores.database.tables import applications, deployments, runs

MAX_TIMEOUT_SECS = 86_400.0
DEFAULT_TIMEOUT_SECS = 3600.0
MAX_LIVE = 10
"""Runs of one app at once."""
ENDED_KEPT = 20
"""How many ended runs of an app keep their record and log."""
FAREWELL_SECS = 5.0
SERVER_STOPPED = "the server was stopped"
CALLER_GONE = "its caller was gone"
_log = structlog.stdlib.get_logger("aether.apps")


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What to run; `release` None means the active one."""

    command: str
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    console: Console = Console.NONE
    timeout_secs: float = DEFAULT_TIMEOUT_SECS
    release: int | None = None


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run; times in microseconds since the epoch. `reason` says why it ended when not by itself."""

    id: str
    app: str
    deployment_id: str
    release: int | None
    command: str
    console: Console
    timeout_secs: float
    created_by: str
    created_at: int
    ended_at: int | None
    exit_code: int | None
    signal: int | None
    reason: str | None


@dataclass(slots=True)
class _Live:
    """A run that this server watches."""

    app_id: str
    app: str
    instance: Instance
    reason: str | None = None


class Session:
    """Somebody's hold on a run; to be closed, and then the run ends if it has not."""

    def __init__(self, row: RunRow, live: _Live, attached: Attached, runs: Runs) -> None:
        self.row = row
        self.instance = live.instance
        self.attached = attached
        self._live = live
        self._runs = runs

    async def stop(self, reason: str) -> None:
        """End the run in order."""
        self._live.reason = self._live.reason or reason
        await self.instance.stop(self._runs.grace_secs)

    async def ended(self) -> tuple[InstanceExit, str | None]:
        """How the run ended, and why when not by itself."""
        return await self.instance.wait(), self._live.reason

    def close(self, reason: str | None) -> None:
        self._live.reason = self._live.reason or reason
        self.attached.close()
        self._runs.left(self)


class Runs:
    """See the module. Call `resume` once after the engine's, and `close` while callers can still be spoken to."""

    def __init__(
        self, database: DatabasePort, broadcast: Broadcast, engine: Engine, runtime: Runtime, grace_secs: float
    ) -> None:
        self._database = database
        self._broadcast = broadcast
        self._engine = engine
        self._runtime = runtime
        self.grace_secs = grace_secs
        self._tasks = Tasks()
        self._live: dict[str, _Live] = {}
        self._closing = False
        self._sessions: set[Session] = set()
        self._left = asyncio.Event()

    async def start(self, app_name: str, request: RunRequest, author: Author) -> RunRow:
        """Record and start a run. Raises NotFound (no such app, or release), BadRequest, Conflict when too many run,
        and what the runtime raises."""
        check_request(request)
        if self._closing:
            raise ServiceUnavailable("the server is stopping")
        run_id = new_id()
        async with self._database.write() as tx:
            app = await find_app(tx, app_name, lock=True)
            release = await _release(tx, app, request.release)
            alive = sa.select(sa.func.count()).where(runs.c.app_id == app.id, runs.c.ended_at.is_(None))
            if (await tx.scalar(alive) or 0) >= MAX_LIVE:
                raise Conflict(
                    f"{app.name} has {MAX_LIVE} runs under way, the most at once: wait, or end one with "
                    "'aether run --stop ID' ('aether run --list' names them)"
                )
            await tx.execute(
                sa.insert(runs).values(
                    id=run_id,
                    app_id=app.id,
                    deployment_id=release.id,
                    command=request.command,
                    console=request.console.value,
                    timeout_secs=request.timeout_secs,
                    created_by=author.name,
                    created_at=now_us(),
                )
            )
        # the start goes on when its caller is gone: a run that nobody attaches to is ended by its keeper
        starting = self._tasks.start(self._start(run_id, app, release, request), f"start a run of {app.name}")
        if (failure := await asyncio.shield(starting)) is not None:
            raise failure
        return await self.get(app_name, run_id)

    async def _start(
        self, run_id: str, app: AppRow, release: DeploymentRow, request: RunRequest
    ) -> AetherError | None:
        try:
            spec = await self._engine.spec_of(release)
            instance = await self._runtime.start(
                replace(
                    spec,
                    instance_id=run_id,
                    process=RUN,
                    command=request.command,
                    env={**spec.env, **request.env},
                    console=request.console,
                    timeout_secs=request.timeout_secs,
                )
            )
        except (AetherError, OSError) as error:
            await self._record(run_id, None, f"could not be started: {error}")
            return error if isinstance(error, AetherError) else ServiceUnavailable(f"the run cannot start: {error}")
        self._watch(run_id, _Live(app.id, app.name, instance))
        self._broadcast.notify(app.id)
        return None

    async def attach(self, app_name: str, run_id: str) -> Session:
        """Take hold of a run that was started with a console. Raises NotFound, Conflict."""
        row = await self.get(app_name, run_id)
        live = self._live.get(run_id)
        if live is None or row.ended_at is not None:
            raise Conflict(f"run {run_id} has ended")
        try:
            session = Session(row, live, await live.instance.open_console(), self)
        except ConnectionError as error:
            raise Conflict(f"nobody can attach to run {run_id}: it is detached, or somebody is") from error
        except OSError as error:
            raise Conflict(f"run {run_id} has ended") from error
        self._sessions.add(session)
        return session

    def left(self, session: Session) -> None:
        self._sessions.discard(session)
        self._left.set()

    async def stop(self, app_name: str, run_id: str, author: Author) -> RunRow:
        """End a run: SIGTERM, then SIGKILL after the grace. Raises Conflict when it has ended."""
        row = await self.get(app_name, run_id)
        live = self._live.get(run_id)
        if live is None or row.ended_at is not None:
            raise Conflict(f"run {run_id} has ended")
        live.reason = live.reason or f"stopped by {author.name}"
        await live.instance.stop(self.grace_secs)
        await self._until_recorded(run_id)
        return await self.get(app_name, run_id)

    async def get(self, app_name: str, run_id: str) -> RunRow:
        async with self._database.read() as tx:
            app = await find_app(tx, app_name)
            found = (await tx.execute(_select().where(runs.c.id == run_id, runs.c.app_id == app.id))).one_or_none()
        if found is None:
            raise NotFound(f"app '{app_name}' has no run '{run_id}'")
        return _row(found)

    async def list(
        self, app_name: str, *, before: tuple[int, str] | None = None, limit: int = 50
    ) -> Sequence[RunRow]:
        """Newest first, `limit` + 1 at most; `before` is (created_at, id) of the last one seen."""
        async with self._database.read() as tx:
            app = await find_app(tx, app_name)
            query = _select().where(runs.c.app_id == app.id)
            if before is not None:
                query = query.where(sa.tuple_(runs.c.created_at, runs.c.id) < sa.tuple_(*map(sa.literal, before)))
            query = query.order_by(runs.c.created_at.desc(), runs.c.id.desc()).limit(limit + 1)
            return [_row(row) for row in await tx.execute(query)]

    # --- over restarts

    async def resume(self) -> None:
        """Take up the runs of an earlier server: those that nobody can be attached to any more are ended."""
        query = sa.select(runs.c.id, runs.c.app_id, runs.c.console, applications.c.name)
        query = query.join(applications, applications.c.id == runs.c.app_id).where(runs.c.ended_at.is_(None))
        async with self._database.read() as tx:
            left = (await tx.execute(query)).all()
        for row in left:
            try:
                instance = await self._runtime.adopt(row.id)
            except (AetherError, OSError) as error:
                _log.error("a run could not be taken up", run=row.id, error=str(error))
                instance = None
            if instance is None:
                await self._record(row.id, None, "lost with the server that started it")
                continue
            live = _Live(row.app_id, row.name, instance)
            if row.console:
                live.reason = "the server was killed"
                self._tasks.start(instance.stop(self.grace_secs), f"end a run of {row.name}")
            self._watch(row.id, live)

    async def drop(self, app_id: str, app: str) -> None:
        """End and forget every run of a deleted app."""
        mine = [live for live in self._live.values() if live.app_id == app_id]
        await asyncio.gather(*(live.instance.stop(self.grace_secs) for live in mine))
        async with self._database.read() as tx:
            ids = list((await tx.execute(sa.select(runs.c.id).where(runs.c.app_id == app_id))).scalars())
        for run_id in ids:
            await self._until_recorded(run_id)
            await self._runtime.remove(run_id)
            await self._runtime.drop_logs(run_id, app)

    async def close(self) -> None:
        """End every run: what it was doing does not come back with the next start, as instances do."""
        self._closing = True
        ids = list(self._live)
        for live in self._live.values():
            live.reason = live.reason or SERVER_STOPPED
        await asyncio.gather(*(live.instance.stop(self.grace_secs) for live in self._live.values()))
        for run_id in ids:
            await self._until_recorded(run_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECS):
                while self._sessions:  # who is attached is to hear how the run ended
                    self._left.clear()
                    await self._left.wait()
        await self._tasks.close()

    # --- the end of a run

    def _watch(self, run_id: str, live: _Live) -> None:
        self._live[run_id] = live
        self._tasks.start(self._see_off(run_id, live), f"run of {live.app}")

    async def _see_off(self, run_id: str, live: _Live) -> None:
        ended = await live.instance.wait()
        try:
            await self._record(run_id, ended, live.reason)
            await self._runtime.remove(run_id)
            await self._prune(live)
        except (AetherError, OSError) as error:
            # the next start's reconciliation records it and takes away what is left
            _log.warning("an ended run could not be cleared away", run=run_id, error=str(error))
        finally:
            del self._live[run_id]
            self._broadcast.notify(live.app_id, run_id)

    async def _until_recorded(self, run_id: str) -> None:
        with self._broadcast.subscribe(run_id) as changed:
            while run_id in self._live:
                changed.clear()
                await changed.wait()

    async def _record(self, run_id: str, ended: InstanceExit | None, reason: str | None) -> None:
        values: dict[str, Any] = {"ended_at": now_us(), "reason": reason}
        if ended is not None:
            values |= {"exit_code": ended.code, "signal": ended.signal}
            if ended.out_of_memory or ended.expired:
                values["reason"] = str(ended)
            elif ended.code == 0:
                values["reason"] = None  # it came to its end all the same
        async with self._database.write() as tx:
            await tx.execute(sa.update(runs).where(runs.c.id == run_id, runs.c.ended_at.is_(None)).values(values))

    async def _prune(self, live: _Live) -> None:
        query = sa.select(runs.c.id).where(runs.c.app_id == live.app_id, runs.c.ended_at.is_not(None))
        query = query.order_by(runs.c.created_at.desc(), runs.c.id.desc()).offset(ENDED_KEPT).limit(1000)
        async with self._database.read() as tx:
            surplus = list((await tx.execute(query)).scalars())
        for run_id in surplus:
            await self._runtime.drop_logs(run_id, live.app)
        if surplus:
            async with self._database.write() as tx:
                await tx.execute(sa.delete(runs).where(runs.c.id.in_(surplus)))


def check_request(request: RunRequest) -> None:
    """Raise BadRequest naming the field that is wrong."""
    check_env(request.env)
    check_command(request.command, "command")
    if not 1 <= request.timeout_secs <= MAX_TIMEOUT_SECS:
        raise BadRequest(f"timeout_secs must be 1 to {MAX_TIMEOUT_SECS:.0f}", {"field": "timeout_secs"})


async def _release(tx: AsyncConnection, app: AppRow, number: int | None) -> DeploymentRow:
    if number is None:
        if app.active_deployment_id is None:
            raise NotFound(f"app '{app.name}' has no release yet; deploy it first")
        return await find_deployment(tx, app.active_deployment_id)
    query = select_deployments().where(deployments.c.app_id == app.id, deployments.c.release == number)
    if (found := (await tx.execute(query)).one_or_none()) is None:
        raise NotFound(f"app '{app.name}' has no release {number}")
    return deployment_of(found)


def _select() -> sa.Select[*tuple[Any, ...]]:
    return (
        sa.select(runs, applications.c.name.label("app"), deployments.c.release)
        .join(applications, applications.c.id == runs.c.app_id)
        .join(deployments, deployments.c.id == runs.c.deployment_id)
    )


def _row(row: sa.Row[*tuple[Any, ...]]) -> RunRow:
    return RunRow(
        id=row.id,
        app=row.app,
        deployment_id=row.deployment_id,
        release=row.release,
        command=row.command,
        console=Console(row.console),
        timeout_secs=row.timeout_secs,
        created_by=row.created_by,
        created_at=row.created_at,
        ended_at=row.ended_at,
        exit_code=row.exit_code,
        signal=row.signal,
        reason=row.reason,
    )
