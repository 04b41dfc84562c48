"""The record of cron runs: one row per moment of a schedule that was run or skipped, never two for the same moment.

A run is recorded together with its instance before it starts, so that a successor finds and adopts it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.apps.broadcast import Broadcast
from aether.apps.job import JobEnd
from aether.apps.ledger import add_instance_in, set_instances_in
from aether.leases import Lease
from aether.model.database import DatabasePort
from aether.model.names import new_id
from aether.model.times import now_us
from aether.stores.database.tables import applications, cron_runs, deployments

RUNS_KEPT = 100
"""Of each cron process of an app."""


class RunStatus(StrEnum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class CronRun:
    """One moment of a cron process; `id` is also that of its instance. Times in microseconds since the epoch."""

    id: str
    app_id: str
    deployment_id: str
    process: str
    scheduled_at: int
    status: RunStatus
    message: str
    exit_code: int | None
    started_at: int | None
    ended_at: int | None


class CronRecords:
    def __init__(self, database: DatabasePort, broadcast: Broadcast) -> None:
        self._database = database
        self._broadcast = broadcast

    async def begin(
        self, lease: Lease, app_id: str, deployment_id: str, process: str, scheduled_at: int
    ) -> CronRun | None:
        """Record a run that is about to start; None when that moment is on record, or the release is not the app's
        any more. Raises LeaseLost."""
        run = CronRun(
            new_id(), app_id, deployment_id, process, scheduled_at, RunStatus.RUNNING, "", None, now_us(), None
        )
        async with self._database.write() as tx:
            await lease.confirm(tx)
            active = await tx.execute(
                sa.select(applications.c.id).where(
                    applications.c.id == app_id,
                    applications.c.active_deployment_id == deployment_id,
                    applications.c.deleting_at.is_(None),
                )
            )
            if active.one_or_none() is None or not await _insert(tx, run):
                return None
            await add_instance_in(tx, run.id, app_id, deployment_id, 0, process)
            await set_instances_in(tx, [run.id], "ready")
        self._broadcast.notify(app_id)
        return run

    async def skip(
        self, lease: Lease, app_id: str, deployment_id: str, process: str, scheduled_at: int, why: str
    ) -> None:
        """Record that a moment was not run. Raises LeaseLost."""
        run = CronRun(
            new_id(), app_id, deployment_id, process, scheduled_at, RunStatus.SKIPPED, why, None, None, None
        )
        async with self._database.write() as tx:
            await lease.confirm(tx)
            if await _insert(tx, run):
                await _forget_old(tx, app_id, process)
        self._broadcast.notify(app_id)

    async def end(self, lease: Lease, run: CronRun, end: JobEnd) -> None:
        """Record how a run ended. Raises LeaseLost."""
        expired = end.exit is not None and end.exit.expired
        status = RunStatus.SUCCEEDED if end.ok else RunStatus.TIMED_OUT if expired else RunStatus.FAILED
        async with self._database.write() as tx:
            await lease.confirm(tx)
            await tx.execute(
                sa.update(cron_runs)
                .where(cron_runs.c.id == run.id)
                .values(
                    status=status.value,
                    message=str(end),
                    exit_code=None if end.exit is None else end.exit.code,
                    ended_at=now_us(),
                )
            )
            await set_instances_in(tx, [run.id], "stopped" if end.ok else "failed")
            await _forget_old(tx, run.app_id, run.process)
        self._broadcast.notify(run.app_id)

    async def under_way(self, app_ids: Collection[str]) -> Sequence[CronRun]:
        """Runs that are not known to have ended."""
        async with self._database.read() as tx:
            found = await tx.execute(sa.select(cron_runs).where(cron_runs.c.status == RunStatus.RUNNING.value))
            return [run_of(row) for row in found if row.app_id in app_ids]

    async def considered(self, app_id: str, deployment_id: str, process: str) -> int:
        """Up to when a schedule is decided by the record: its newest moment, or when its release became active."""
        async with self._database.read() as tx:
            newest = await tx.execute(
                sa.select(sa.func.max(cron_runs.c.scheduled_at)).where(
                    cron_runs.c.app_id == app_id, cron_runs.c.process == process
                )
            )
            began = await tx.execute(
                sa.select(deployments.c.rollout_completed_at).where(deployments.c.id == deployment_id)
            )
            return max(newest.scalar_one_or_none() or 0, began.scalar_one_or_none() or now_us())


async def last_runs(tx: AsyncConnection, app_ids: Sequence[str]) -> Mapping[tuple[str, str], CronRun]:
    """The newest moment on record, by app and process type."""
    newest = (
        sa.select(cron_runs.c.app_id, cron_runs.c.process, sa.func.max(cron_runs.c.scheduled_at).label("at"))
        .where(cron_runs.c.app_id.in_(app_ids))
        .group_by(cron_runs.c.app_id, cron_runs.c.process)
        .subquery()
    )
    found = await tx.execute(
        sa.select(cron_runs).join(
            newest,
            sa.and_(
                cron_runs.c.app_id == newest.c.app_id,
                cron_runs.c.process == newest.c.process,
                cron_runs.c.scheduled_at == newest.c.at,
            ),
        )
    )
    return {(row.app_id, row.process): run_of(row) for row in found}


def run_of(row: sa.Row[*tuple[object, ...]]) -> CronRun:
    values = dict(row._mapping)  # pyright: ignore[reportPrivateUsage]
    values["status"] = RunStatus(str(values["status"]))
    return CronRun(**values)  # pyright: ignore[reportArgumentType]


async def _insert(tx: AsyncConnection, run: CronRun) -> bool:
    """False when the moment is on record."""
    known = await tx.execute(
        sa.select(cron_runs.c.id).where(
            cron_runs.c.app_id == run.app_id,
            cron_runs.c.process == run.process,
            cron_runs.c.scheduled_at == run.scheduled_at,
        )
    )
    if known.one_or_none() is not None:
        return False
    values = {column.name: getattr(run, column.name) for column in cron_runs.columns}
    await tx.execute(sa.insert(cron_runs).values({**values, "status": run.status.value}))
    return True


async def _forget_old(tx: AsyncConnection, app_id: str, process: str) -> None:
    mine = cron_runs.c.app_id == app_id, cron_runs.c.process == process
    old = sa.select(cron_runs.c.scheduled_at).where(*mine).order_by(cron_runs.c.scheduled_at.desc())
    oldest_kept = (await tx.execute(old.offset(RUNS_KEPT - 1).limit(1))).scalar_one_or_none()
    if oldest_kept is not None:
        await tx.execute(
            sa.delete(cron_runs).where(
                *mine, cron_runs.c.scheduled_at < oldest_kept, cron_runs.c.status != RunStatus.RUNNING.value
            )
        )
