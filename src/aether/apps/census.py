"""What there is to take up: the record and the machine, read together, for the apps whose leases this server has.

What to do about it is decided in `aether.apps.reconcile` and done by the engine.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from aether.apps.cron_records import CronRecords, CronRun
from aether.apps.ledger import LIVE_INSTANCES, app_lease, cancel_in
from aether.apps.ports import Runtime
from aether.apps.reconcile import Plan, RecordedDeployment, RecordedInstance, reconcile
from aether.apps.records import UNDER_WAY_VALUES, command_run, find_deployment
from aether.leases import Leases
from aether.model.database import DatabasePort
from aether.model.deployment import UNDER_WAY, DeploymentStatus
from aether.model.processes import WEB, ProcessTypes
from aether.stores.database.tables import applications, deployments, formations, instances, runs


@dataclass(frozen=True, slots=True)
class Found:
    plan: Plan
    names: Mapping[str, str]
    """By id, of the apps that are not being deleted."""
    sizes: Mapping[str, Mapping[str, int]]
    """By id of the app: how many instances of each process type somebody said it is to have."""
    jobs: Sequence[CronRun]
    """Runs of cron processes that are not known to have ended."""
    was_ready: set[str]
    """Instances that served when they were last written about."""


class Census:
    def __init__(self, database: DatabasePort, runtime: Runtime, leases: Leases, cron: CronRecords) -> None:
        self._database = database
        self._runtime = runtime
        self._leases = leases
        self._cron = cron

    async def claim_apps(self) -> Sequence[str]:
        """Ids of the apps whose leases this server has by now. One that is deleted is left to whoever deletes it:
        its lease, once given back, is his."""
        query = sa.select(applications.c.id)
        if not self._leases.alone:
            query = query.where(applications.c.deleting_at.is_(None))
        async with self._database.read() as tx:
            ids = list((await tx.execute(query)).scalars())
        held = await self._leases.claim_all([app_lease(app_id) for app_id in ids])
        return [app_id for app_id in ids if app_lease(app_id) in held]

    async def take(self, mine: Collection[str]) -> Found:
        """What to do about the apps `mine`."""
        async with self._database.read() as tx:
            apps = [app for app in await tx.execute(sa.select(applications)) if app.id in mine]
            sizes: dict[str, dict[str, int]] = {}
            for size in await tx.execute(sa.select(formations)):
                sizes.setdefault(size.app_id, {})[size.process] = size.quantity
            wanted = await tx.execute(
                sa.select(deployments).where(
                    deployments.c.status.in_([*UNDER_WAY_VALUES, DeploymentStatus.ACTIVE.value])
                )
            )
            live = await tx.execute(sa.select(instances).where(instances.c.status.in_(LIVE_INSTANCES)))
            pointer = {app.id: app.active_deployment_id for app in apps}
            deleting = {app.id for app in apps if app.deleting_at is not None}
            recorded = [
                RecordedDeployment(
                    d.id,
                    d.app_id,
                    DeploymentStatus(d.status),
                    d.strategy,
                    pointer[d.app_id] == d.id,
                    d.app_id in deleting,
                    _desired(d.processes, sizes.get(d.app_id, {})),
                    _command(d.release_command),
                )
                for d in wanted
                if d.app_id in pointer
            ]
            rows = [
                RecordedInstance(i.id, i.app_id, i.deployment_id, i.status, i.created_at, i.process)
                for i in live
                if i.app_id in pointer
            ]
        jobs = await self._cron.under_way(mine)
        plan = reconcile(recorded, rows, await self._known(mine), [run.id for run in jobs])
        names = {app.id: app.name for app in apps if app.deleting_at is None}
        return Found(plan, names, sizes, jobs, {row.id for row in rows if row.status == "ready"})

    async def cancel_overtaken(self, plan: Plan) -> None:
        if not plan.cancel:
            return
        async with self._database.write() as tx:
            rows = [await find_deployment(tx, deployment_id, lock=True) for deployment_id in sorted(plan.cancel)]
            overtaken = [row for row in rows if row.status in UNDER_WAY]
            await cancel_in(tx, overtaken, "a newer deployment took its place")

    async def mark_gone(self, plan: Plan) -> Sequence[str]:
        """Record the end of what is gone or to be removed; returns what is to be removed.

        Recorded first, looked for once more afterwards: an earlier owner may just be starting one (see
        `Replica.abandon`)."""
        ids = [*plan.gone, *plan.remove]
        if not ids:
            return []
        async with self._database.write() as tx:
            await tx.execute(
                sa.update(instances)
                .where(instances.c.id.in_(ids), instances.c.status.in_(LIVE_INSTANCES))
                .values(status="stopped", stopped_at=sa.func.coalesce(instances.c.stopped_at, instances.c.created_at))
            )
        late = set(plan.gone).intersection(await self._runtime.known()) if plan.gone else set[str]()
        return [*plan.remove, *sorted(late)]

    async def _known(self, mine: Collection[str]) -> Sequence[str]:
        """Instances on this machine that are this server's business; alone, also those without a record."""
        known = await self._runtime.known()
        if self._leases.alone or not known:
            async with self._database.read() as tx:  # runs have their own keeper of the books
                running = set((await tx.execute(sa.select(runs.c.id).where(runs.c.ended_at.is_(None)))).scalars())
            return [instance_id for instance_id in known if instance_id not in running]
        async with self._database.read() as tx:
            found = await tx.execute(sa.select(instances.c.id, instances.c.app_id).where(instances.c.id.in_(known)))
            owner = {row.id: row.app_id for row in found}
        return [instance_id for instance_id in known if owner.get(instance_id) in mine]


def _desired(processes: str, sizes: Mapping[str, int]) -> Mapping[str, int]:
    types = ProcessTypes.from_json(processes)
    return {process: sizes.get(process, 1) for process in (WEB, *types.workers)}


def _command(recorded: str | None) -> str | None:
    run = command_run(recorded)
    return None if run is None or run.ok is not None else run.instance_id
