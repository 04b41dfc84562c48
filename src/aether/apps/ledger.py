"""The record of deployments and instances: every change of a status and the event that tells of it, in one
transaction, and the wake-up of whoever waits for it.

Each write of a rollout carries the epoch under which its owner works; a writer that lost its lease, or whose
deployment was cancelled meanwhile, is refused with LostRollout and has written nothing. What should happen next is
decided elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.apps.broadcast import Broadcast
from aether.apps.records import (
    DeploymentError,
    DeploymentRow,
    config_env,
    find_deployment,
    newest_config_version,
)
from aether.model.database import DatabasePort
from aether.model.deployment import SETTLED, DeploymentStatus, check_move
from aether.model.errors import Conflict
from aether.model.names import new_id
from aether.model.times import now_us
from aether.stores.database.tables import applications, configs, deployment_events, deployments, instances

LEASE_SLACK_US = 60_000_000
LIVE_INSTANCES = ("starting", "ready", "draining")


class LostRollout(Exception):
    """The deployment is no longer in the state, or under the epoch, that the writer believed in."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to write about one deployment."""

    deployment_id: str
    app_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Event:
    id: int
    deployment_id: str
    phase: str
    message: str
    timestamp: int


async def add_event(tx: AsyncConnection, deployment_id: str, phase: str, message: str) -> None:
    await tx.execute(
        sa.insert(deployment_events).values(
            deployment_id=deployment_id, phase=phase, message=message, timestamp=now_us()
        )
    )


async def cancel_in(tx: AsyncConnection, rows: Sequence[DeploymentRow], why: str) -> None:
    """Cancel deployments that are under way, within the caller's transaction. Raises Conflict for one that is not."""
    for row in rows:
        check_move(row.status, DeploymentStatus.CANCELLED)
        await tx.execute(
            sa.update(deployments)
            .where(deployments.c.id == row.id)
            .values(status=DeploymentStatus.CANCELLED.value, cancel_requested=True, rollout_completed_at=now_us())
        )
        await add_event(tx, row.id, DeploymentStatus.CANCELLED, why)


class Ledger:
    def __init__(self, database: DatabasePort, broadcast: Broadcast, owner: str) -> None:
        self._database = database
        self._broadcast = broadcast
        self.owner = owner
        """Names this server process in leases."""

    async def claim(self, deployment_id: str) -> tuple[Claim, DeploymentRow]:
        """Take a deployment that is under way over from whoever owned it. Raises LostRollout if it is settled."""
        async with self._database.write() as tx:
            row = await find_deployment(tx, deployment_id)
            if row.status in SETTLED:
                raise LostRollout(f"deployment {deployment_id} is {row.status}")
            await tx.execute(
                sa.update(deployments)
                .where(deployments.c.id == deployment_id)
                .values(epoch=row.epoch + 1, lease_owner=self.owner, lease_expires_at=lease_end(row.longest_secs))
            )
        return Claim(deployment_id, row.app_id, row.epoch + 1), row

    async def move(
        self,
        claim: Claim,
        before: DeploymentStatus,
        after: DeploymentStatus,
        message: str,
        *,
        notes: Sequence[tuple[str, str]] = (),
        error: DeploymentError | None = None,
    ) -> None:
        """Change the status by compare-and-set; `notes` are (phase, message) events recorded with it."""
        check_move(before, after)
        values: dict[str, Any] = {"status": after.value}
        if before is DeploymentStatus.PENDING:
            values["rollout_started_at"] = now_us()
        if after in SETTLED:
            values["rollout_completed_at"] = now_us()
        if error is not None:
            values["error"] = error.to_json()
        async with self._database.write() as tx:
            await self._compare_and_set(tx, claim, before, values)
            for phase, text in notes:
                await add_event(tx, claim.deployment_id, phase, text)
            await add_event(tx, claim.deployment_id, after, message)
        self._broadcast.notify(claim.deployment_id, claim.app_id)

    async def note(self, claim: Claim, status: DeploymentStatus, phase: str, message: str) -> None:
        """Record an event that changes nothing."""
        async with self._database.write() as tx:
            await self._compare_and_set(tx, claim, status, {"status": status.value})
            await add_event(tx, claim.deployment_id, phase, message)
        self._broadcast.notify(claim.deployment_id)

    async def step(self, claim: Claim, step: int, message: str) -> None:
        """Record that traffic moves on to a step, before it does."""
        async with self._database.write() as tx:
            await self._compare_and_set(tx, claim, DeploymentStatus.ROLLING_OUT, {"rollout_step": step})
            await add_event(tx, claim.deployment_id, DeploymentStatus.ROLLING_OUT, message)
        self._broadcast.notify(claim.deployment_id)

    async def promote(self, claim: Claim, instance_ids: Sequence[str], notes: Sequence[tuple[str, str]]) -> int:
        """rolling_out → active: the release gets its number, the app points at it, the old release is superseded.

        The variables of a release that was rolled back to become the app's newest config, so that the next
        change starts from what runs. Returns the release number.
        """
        async with self._database.write() as tx:
            app = (await tx.execute(sa.select(applications).where(applications.c.id == claim.app_id))).one_or_none()
            if app is None or app.deleting_at is not None:
                raise LostRollout("the app is being deleted")
            row = await find_deployment(tx, claim.deployment_id)
            release = app.last_release + 1
            if app.active_deployment_id is not None:
                ended = await tx.execute(
                    sa.update(deployments)
                    .where(
                        deployments.c.id == app.active_deployment_id,
                        deployments.c.status == DeploymentStatus.ACTIVE.value,
                    )
                    .values(status=DeploymentStatus.SUPERSEDED.value)
                )
                if ended.rowcount:
                    text = f"release {release} took over"
                    await add_event(tx, app.active_deployment_id, DeploymentStatus.SUPERSEDED, text)
            await self._compare_and_set(
                tx,
                claim,
                DeploymentStatus.ROLLING_OUT,
                {
                    "status": DeploymentStatus.ACTIVE.value,
                    "release": release,
                    "rollout_completed_at": now_us(),
                    "config_version": await _current_config(tx, row),
                },
            )
            await tx.execute(
                sa.update(applications)
                .where(applications.c.id == claim.app_id)
                .values(active_deployment_id=claim.deployment_id, last_release=release)
            )
            await _set_instances(tx, instance_ids, "ready")
            for phase, text in notes:
                await add_event(tx, claim.deployment_id, phase, text)
            text = f"release {release} serves all requests"
            await add_event(tx, claim.deployment_id, DeploymentStatus.ACTIVE, text)
        self._broadcast.notify(claim.deployment_id, claim.app_id)
        if app.active_deployment_id is not None:
            self._broadcast.notify(app.active_deployment_id)
        return release

    async def _compare_and_set(
        self, tx: AsyncConnection, claim: Claim, before: DeploymentStatus, values: dict[str, Any]
    ) -> None:
        done = await tx.execute(
            sa.update(deployments)
            .where(
                deployments.c.id == claim.deployment_id,
                deployments.c.status == before.value,
                deployments.c.epoch == claim.epoch,
            )
            .values(**values)
        )
        if done.rowcount != 1:
            raise LostRollout(f"deployment {claim.deployment_id} is no longer {before} under epoch {claim.epoch}")

    async def status_of(self, deployment_id: str) -> DeploymentStatus | None:
        """The recorded status, or None when the deployment's app was deleted."""
        async with self._database.read() as tx:
            found = await tx.execute(sa.select(deployments.c.status).where(deployments.c.id == deployment_id))
            value = found.scalar_one_or_none()
        return None if value is None else DeploymentStatus(value)

    async def events(self, deployment_id: str, after: int) -> tuple[Sequence[Event], DeploymentRow]:
        """Events with an id above `after` and the deployment, from one snapshot."""
        async with self._database.read() as tx:
            row = await find_deployment(tx, deployment_id)
            found = await tx.execute(
                sa.select(deployment_events)
                .where(deployment_events.c.deployment_id == deployment_id, deployment_events.c.id > after)
                .order_by(deployment_events.c.id)
            )
            return [Event(e.id, e.deployment_id, e.phase, e.message, e.timestamp) for e in found], row

    async def add_instance(self, instance_id: str, app_id: str, deployment_id: str, restarts: int) -> None:
        async with self._database.write() as tx:
            await tx.execute(
                sa.insert(instances).values(
                    id=instance_id,
                    app_id=app_id,
                    deployment_id=deployment_id,
                    status="starting",
                    restarts=restarts,
                    created_at=now_us(),
                )
            )
        self._broadcast.notify(app_id)

    async def set_instances(self, app_id: str, instance_ids: Sequence[str], status: str) -> None:
        if not instance_ids:
            return
        async with self._database.write() as tx:
            await _set_instances(tx, instance_ids, status)
        self._broadcast.notify(app_id)

    async def forget_instances(self, instance_ids: Sequence[str]) -> None:
        async with self._database.write() as tx:
            await tx.execute(sa.delete(instances).where(instances.c.id.in_(instance_ids)))

    async def ended_instances(self, app_id: str, beyond: int) -> Sequence[str]:
        """Ids of the app's ended instances except for the newest `beyond`."""
        async with self._database.read() as tx:
            found = await tx.execute(
                sa.select(instances.c.id)
                .where(instances.c.app_id == app_id, instances.c.status.in_(("stopped", "failed")))
                .order_by(instances.c.created_at.desc(), instances.c.id.desc())
                .offset(beyond)
                .limit(1000)
            )
            return list(found.scalars())


def lease_end(timeout_secs: float) -> int:
    """Rollouts end by their deadline, so a lease that lasts a little longer needs no renewal."""
    return now_us() + int(timeout_secs * 1_000_000) + LEASE_SLACK_US


def deadline_us(row: DeploymentRow) -> int:
    """When the rollout must have ended, in microseconds since the epoch; kept over restarts of the server."""
    return (row.rollout_started_at or now_us()) + int(row.timeout_secs * 1_000_000)


async def _set_instances(tx: AsyncConnection, instance_ids: Sequence[str], status: str) -> None:
    values: dict[str, Any] = {"status": status}
    if status not in LIVE_INSTANCES:
        values["stopped_at"] = now_us()
    await tx.execute(sa.update(instances).where(instances.c.id.in_(instance_ids)).values(**values))


async def _current_config(tx: AsyncConnection, row: DeploymentRow) -> int:
    """The config version that a promoted deployment stands for: its own, or a copy of it put on top."""
    newest = await newest_config_version(tx, row.app_id)
    if row.rollback_of is None or row.config_version == newest:
        return row.config_version
    env = await config_env(tx, row.app_id, row.config_version)
    if env == await config_env(tx, row.app_id, newest):
        return newest
    await add_config(tx, row.app_id, newest + 1, env, row.created_by)
    return newest + 1


async def add_config(tx: AsyncConnection, app_id: str, version: int, env: dict[str, str], author: str) -> None:
    await tx.execute(
        sa.insert(configs).values(
            id=new_id(),
            app_id=app_id,
            version=version,
            env=json.dumps(env, sort_keys=True, separators=(",", ":")),
            created_by=author,
            created_at=now_us(),
        )
    )


def refuse_settled(row: DeploymentRow) -> None:
    if row.status in SETTLED:
        raise Conflict(f"deployment {row.id} is {row.status}; only a deployment under way can be cancelled")
