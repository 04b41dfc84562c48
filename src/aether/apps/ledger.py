"""The record of deployments and instances: every change of a status and the event that tells of it, in one
transaction, and the wake-up of whoever waits for it.

Each write about an app confirms the app's lease: a server that was overtaken is refused with LeaseLost and has
written nothing. A rollout whose deployment was cancelled meanwhile is refused with LostRollout. What should happen
next is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.apps.broadcast import Broadcast
from aether.apps.records import (
    CommandRun,
    DeploymentError,
    DeploymentRow,
    find_deployment,
    newest_config_version,
)
from aether.apps.vault import Variables, Vault
from aether.leases import Lease
from aether.model.database import DatabasePort
from aether.model.deployment import SETTLED, DeploymentStatus, check_move
from aether.model.errors import Conflict
from aether.model.names import new_id
from aether.model.processes import RELEASE
from aether.model.times import now_us
from aether.stores.database.tables import applications, configs, deployment_events, deployments, instances

LIVE_INSTANCES = ("starting", "ready", "draining")
DATABASE_PAUSE_SECS = 0.5
"""Before what the database could not be asked or told is tried again."""


class LostRollout(Exception):
    """The deployment is no longer in the state that the writer believed in."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to write about one deployment: the app's lease, and which of the deployment's owners this one is."""

    deployment_id: str
    app_id: str
    epoch: int
    lease: Lease


def app_lease(app_id: str) -> str:
    """The name of the lease under which one server runs an app and its rollouts."""
    return f"app/{app_id}"


def app_files(name: str) -> str:
    """What is held while it is decided whose the files of an app of that name are."""
    return f"files/{name}"


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
    """Cancel deployments that are under way, within the caller's transaction, which has locked them. Raises Conflict
    for one that is not."""
    for row in rows:
        check_move(row.status, DeploymentStatus.CANCELLED)
        await tx.execute(
            sa.update(deployments)
            .where(deployments.c.id == row.id)
            .values(status=DeploymentStatus.CANCELLED.value, cancel_requested=True, rollout_completed_at=now_us())
        )
        await add_event(tx, row.id, DeploymentStatus.CANCELLED, why)


class Ledger:
    def __init__(self, database: DatabasePort, broadcast: Broadcast, vault: Vault, owner: str) -> None:
        self._database = database
        self._broadcast = broadcast
        self.vault = vault
        self.owner = owner
        """Names this server process in leases."""

    async def claim(self, deployment_id: str, lease: Lease) -> tuple[Claim, DeploymentRow]:
        """Take a deployment that is under way over from whoever owned it. Raises LostRollout if it is settled,
        LeaseLost."""
        async with self._database.write() as tx:
            await lease.confirm(tx)
            row = await find_deployment(tx, deployment_id, lock=True)
            if row.status in SETTLED:
                raise LostRollout(f"deployment {deployment_id} is {row.status}")
            await tx.execute(
                sa.update(deployments)
                .where(deployments.c.id == deployment_id)
                .values(epoch=row.epoch + 1, lease_owner=self.owner)
            )
        return Claim(deployment_id, row.app_id, row.epoch + 1, lease), row

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

    async def begin_command(self, claim: Claim, run: CommandRun, message: str) -> None:
        """Record the instance that is about to run the release command."""
        async with self._database.write() as tx:
            await self._compare_and_set(
                tx, claim, DeploymentStatus.ROLLING_OUT, {"release_command": run.to_json()}
            )  # fmt: skip
            if not await _is_recorded(tx, run.instance_id):  # nobody may have heard that it was written
                await add_instance_in(tx, run.instance_id, claim.app_id, claim.deployment_id, 0, RELEASE)
            await add_event(tx, claim.deployment_id, RELEASE, message)
        self._broadcast.notify(claim.deployment_id, claim.app_id)

    async def end_command(self, claim: Claim, run: CommandRun, message: str) -> None:
        """Record how the release command ended."""
        async with self._database.write() as tx:
            await self._compare_and_set(
                tx, claim, DeploymentStatus.ROLLING_OUT, {"release_command": run.to_json()}
            )  # fmt: skip
            await set_instances_in(tx, [run.instance_id], "stopped" if run.ok else "failed")
            await add_event(tx, claim.deployment_id, RELEASE, message)
        self._broadcast.notify(claim.deployment_id, claim.app_id)

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
            await claim.lease.confirm(tx)
            mine = sa.select(applications).where(applications.c.id == claim.app_id)
            app = (await tx.execute(mine.with_for_update(key_share=True))).one_or_none()
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
                    "config_version": await _current_config(tx, self.vault, row),
                },
            )
            await tx.execute(
                sa.update(applications)
                .where(applications.c.id == claim.app_id)
                .values(active_deployment_id=claim.deployment_id, last_release=release)
            )
            await set_instances_in(tx, instance_ids, "ready")
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
        await claim.lease.confirm(tx)
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

    async def status_of(self, claim: Claim) -> tuple[DeploymentStatus | None, bool]:
        """The recorded status, None when the deployment's app was deleted; and whether the claim still stands."""
        async with self._database.read() as tx:
            found = await tx.execute(
                sa.select(deployments.c.status, deployments.c.epoch).where(deployments.c.id == claim.deployment_id)
            )
            row = found.one_or_none()
        return (None, False) if row is None else (DeploymentStatus(row.status), row.epoch == claim.epoch)

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

    async def add_instance(
        self, lease: Lease, instance_id: str, app_id: str, deployment_id: str, restarts: int, process: str
    ) -> None:
        """Record an instance that is about to start. May be repeated when nobody heard that it was written."""
        async with self._database.write() as tx:
            await lease.confirm(tx)
            if not await _is_recorded(tx, instance_id):
                await add_instance_in(tx, instance_id, app_id, deployment_id, restarts, process)
        self._broadcast.notify(app_id)

    async def set_instances(self, lease: Lease, app_id: str, instance_ids: Sequence[str], status: str) -> None:
        if not instance_ids:
            return
        async with self._database.write() as tx:
            await lease.confirm(tx)
            await set_instances_in(tx, instance_ids, status)
        self._broadcast.notify(app_id)

    async def is_live(self, instance_id: str) -> bool:
        """Whether the record says of an instance that it runs or is about to."""
        async with self._database.read() as tx:
            found = await tx.execute(sa.select(instances.c.status).where(instances.c.id == instance_id))
            return found.scalar_one_or_none() in LIVE_INSTANCES

    async def forget_instances(self, lease: Lease, instance_ids: Sequence[str]) -> None:
        async with self._database.write() as tx:
            await lease.confirm(tx)
            await tx.execute(sa.delete(instances).where(instances.c.id.in_(instance_ids)))

    async def ended_instances(self, app_id: str, process: str, beyond: int) -> Sequence[str]:
        """Ids of the ended instances of a process type except for the newest `beyond`."""
        async with self._database.read() as tx:
            found = await tx.execute(
                sa.select(instances.c.id)
                .where(
                    instances.c.app_id == app_id,
                    instances.c.process == process,
                    instances.c.status.in_(("stopped", "failed")),
                )
                .order_by(instances.c.created_at.desc(), instances.c.id.desc())
                .offset(beyond)
                .limit(1000)
            )
            return list(found.scalars())


def remaining_secs(timeout_secs: float, started_at: int | None, now: int) -> float:
    """Until a rollout must have ended, asked once by each server that takes it up; `started_at` and `now` are in
    microseconds since the epoch. Never more than its timeout, for the wall clock may have been set back meanwhile."""
    if started_at is None:
        return timeout_secs
    return min(timeout_secs, timeout_secs - (now - started_at) / 1e6)


async def _is_recorded(tx: AsyncConnection, instance_id: str) -> bool:
    known = await tx.execute(sa.select(instances.c.id).where(instances.c.id == instance_id))
    return known.one_or_none() is not None


async def add_instance_in(
    tx: AsyncConnection, instance_id: str, app_id: str, deployment_id: str, restarts: int, process: str
) -> None:
    await tx.execute(
        sa.insert(instances).values(
            id=instance_id,
            app_id=app_id,
            deployment_id=deployment_id,
            process=process,
            status="starting",
            restarts=restarts,
            created_at=now_us(),
        )
    )


async def set_instances_in(tx: AsyncConnection, instance_ids: Sequence[str], status: str) -> None:
    values: dict[str, Any] = {"status": status}
    if status not in LIVE_INSTANCES:
        values["stopped_at"] = now_us()
    await tx.execute(sa.update(instances).where(instances.c.id.in_(instance_ids)).values(**values))


async def _current_config(tx: AsyncConnection, vault: Vault, row: DeploymentRow) -> int:
    """The config version that a promoted deployment stands for: its own, or a copy of it put on top.

    A name that has become a secret since stays one, or a rollback would show its value again.
    """
    newest = await newest_config_version(tx, row.app_id)
    if row.rollback_of is None or row.config_version == newest:
        return row.config_version
    before = await vault.config(tx, row.app_id, newest)
    restored = (await vault.config(tx, row.app_id, row.config_version)).keeping(before.secrets)
    if restored == before:
        return newest
    await add_config(tx, vault, row.app_id, newest + 1, restored, row.created_by)
    return newest + 1


async def add_config(
    tx: AsyncConnection, vault: Vault, app_id: str, version: int, variables: Variables, author: str
) -> None:
    await vault.name_key(tx)
    await tx.execute(
        sa.insert(configs).values(
            id=new_id(),
            app_id=app_id,
            version=version,
            env=vault.seal_config(app_id, version, variables),
            created_by=author,
            created_at=now_us(),
        )
    )


def refuse_settled(row: DeploymentRow) -> None:
    if row.status in SETTLED:
        raise Conflict(f"deployment {row.id} is {row.status}; only a deployment under way can be cancelled")
