"""Deployments that came to nothing, some time later: their rows, events and logs go. Releases stay.

Which those are is a pure rule; taking them away begins with the logs, so that a kill in the middle leaves the rows by
which the rest is found again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa

from aether.apps.ledger import LIVE_INSTANCES
from aether.apps.ports import Runtime
from aether.model.database import DatabasePort
from aether.model.deployment import DeploymentStatus
from aether.retention import Swept
from aether.stores.database.tables import applications, deployments, instances

NOTHING_CAME = (DeploymentStatus.FAILED, DeploymentStatus.CANCELLED, DeploymentStatus.ROLLED_BACK)
_BATCH = 100


@dataclass(frozen=True, slots=True)
class Past:
    """A deployment as far as its age decides; `ended_at` in microseconds since the epoch."""

    id: str
    app_id: str
    status: DeploymentStatus
    release: int | None
    ended_at: int | None
    live: bool = False
    """It has an instance that has not ended."""


def forgotten(newest_first: Sequence[Past], before: int) -> list[str]:
    """Ids of deployments that came to nothing and ended before `before`; the newest of each app stays, because it
    says what the app's state is."""
    seen: set[str] = set()
    gone: list[str] = []
    for past in newest_first:
        newest = past.app_id not in seen
        seen.add(past.app_id)
        if newest or past.live or past.release is not None or past.status not in NOTHING_CAME:
            continue
        if past.ended_at is not None and past.ended_at < before:
            gone.append(past.id)
    return gone


class DeploymentSweeper:
    """The chore `deployments`. `clock` returns seconds since the epoch; a `ttl_secs` of 0 keeps everything."""

    name = "deployments"

    def __init__(
        self, database: DatabasePort, runtime: Runtime, ttl_secs: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._runtime = runtime
        self._ttl = ttl_secs
        self._clock = clock

    async def sweep(self, *, dry_run: bool) -> Swept:
        if not self._ttl:
            return Swept()
        async with self._database.read() as tx:
            gone = forgotten(await _past(tx), int((self._clock() - self._ttl) * 1_000_000))
        if not dry_run:
            for start in range(0, len(gone), _BATCH):
                await self._forget(gone[start : start + _BATCH])
        return Swept(len(gone))

    async def _forget(self, ids: Sequence[str]) -> None:
        async with self._database.read() as tx:
            found = await tx.execute(
                sa.select(instances.c.id, applications.c.name)
                .join(applications, applications.c.id == instances.c.app_id)
                .where(instances.c.deployment_id.in_(ids))
            )
            logs = [(row.id, row.name) for row in found]
        for instance_id, app in logs:
            await self._runtime.drop_logs(instance_id, app)
        async with self._database.write() as tx:
            await tx.execute(
                sa.delete(deployments).where(
                    deployments.c.id.in_(ids), deployments.c.status.in_([status.value for status in NOTHING_CAME])
                )
            )


class Prunable(Protocol):
    async def prune(self, *, dry_run: bool) -> int: ...


class UnpackedSweeper:
    """The chore `unpacked`: folders of releases that no rollout has tidied up after."""

    name = "unpacked"

    def __init__(self, engine: Prunable) -> None:
        self._engine = engine

    async def sweep(self, *, dry_run: bool) -> Swept:
        return Swept(await self._engine.prune(dry_run=dry_run))


async def _past(tx: Any) -> list[Past]:
    live = (
        sa.select(sa.func.count())
        .select_from(instances)
        .where(instances.c.deployment_id == deployments.c.id, instances.c.status.in_(LIVE_INSTANCES))
        .scalar_subquery()
    )
    found = await tx.execute(
        sa.select(
            deployments.c.id,
            deployments.c.app_id,
            deployments.c.status,
            deployments.c.release,
            deployments.c.rollout_completed_at,
            live.label("live"),
        ).order_by(deployments.c.created_at.desc(), deployments.c.id.desc())
    )
    return [
        Past(row.id, row.app_id, DeploymentStatus(row.status), row.release, row.rollout_completed_at, bool(row.live))
        for row in found
    ]
