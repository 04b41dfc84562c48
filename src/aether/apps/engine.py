"""The apps of this server as a running whole: taken up at start, changed by deployments, put down at the end.

One runner per app, under the app's lease; rollouts of an app follow one another. What is there to take up is read in
`aether.apps.census`; how a rollout goes is decided in `aether.rollout.machine`. Where several servers share the
database, each looks now and then for apps that nobody runs any more, takes those up, and lets go of what it has lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import SQLAlchemyError

from aether.apps.broadcast import Broadcast
from aether.apps.census import Census
from aether.apps.cron import Crontab
from aether.apps.cron_records import CronRecords
from aether.apps.launch import Launcher, ReleaseLaunch
from aether.apps.ledger import Claim, Ledger, LostRollout, app_lease
from aether.apps.masking import Masker
from aether.apps.overdue import Overdue
from aether.apps.ports import ArtifactSource, Router, Runtime
from aether.apps.reconcile import AppPlan
from aether.apps.records import UNDER_WAY_VALUES, DeploymentRow, find_deployment, sizes_of
from aether.apps.replica import Drivers, pause_before_restart
from aether.apps.rollout import Rollout, RolloutOptions
from aether.apps.runner import Runner
from aether.apps.tasks import Tasks
from aether.apps.vault import Vault
from aether.leases import Lease, LeaseLost, Leases
from aether.model.database import DatabasePort
from aether.model.deployment import DeploymentStatus
from aether.model.errors import AetherError
from aether.model.instance import InstanceSpec, Limits
from aether.stores.database.tables import applications, deployments, instances, runs

_CLEAN_UP_AT_ONCE = 8
LEASES = "leases"
"""The topic of leases that a server has given back."""
_LOOKS_PER_LEASE = 3
"""How often in the length of a lease a server looks for apps that nobody runs."""
_log = structlog.stdlib.get_logger("aether.apps")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Durations in seconds."""

    base_domain: str = "localhost"
    drain_timeout_secs: float = 30.0
    stop_grace_secs: float = 10.0
    linger_secs: float = 0.0
    """How long a drained instance goes on for servers that have not heard of it yet."""
    limits: Limits = field(default_factory=Limits)
    runtime_warning: Callable[[str | None], str | None] = field(default=lambda _runtime: None)


class Engine:
    """See the module. Call `resume` once, then `submit` for every deployment, and `close` at the end; run `watch`
    beside where the database has other servers."""

    def __init__(
        self,
        database: DatabasePort,
        broadcast: Broadcast,
        runtime: Runtime,
        router: Router,
        source: ArtifactSource,
        options: EngineOptions,
        leases: Leases,
        vault: Vault,
    ) -> None:
        self._database = database
        self._broadcast = broadcast
        self._asked = asyncio.Event()
        self._runtime = runtime
        self._router = router
        self._source = source
        self._options = options
        self._leases = leases
        self._launcher = Launcher(database, source, vault, options.base_domain, options.limits)
        cron_records = CronRecords(database, broadcast)
        self._census = Census(database, runtime, leases, cron_records)
        self.ledger = Ledger(database, broadcast, vault, leases.owner)
        self._vault = vault
        self._tasks = Tasks()
        self._overdue = Overdue(self.ledger, self._tasks)
        self._runners: dict[str, Runner] = {}
        self._crontab = Crontab(self._runners, cron_records, self._tasks)
        self._rollouts: dict[str, Rollout] = {}
        self._newest: dict[str, Rollout] = {}
        self._closing = False
        self._was_ready: set[str] = set()
        self._dropping: set[str] = set()
        self._scaling = asyncio.Lock()
        self._rollout_options = RolloutOptions(
            drain_timeout_secs=options.drain_timeout_secs,
            stop_grace_secs=options.stop_grace_secs,
            log_tail=self._log_tail,
            discard=self._remove,
            prepare=functools.partial(self._launcher.release, patient=True),
            runtime_warning=options.runtime_warning,
        )

    async def resume(self) -> None:
        """Take up what an earlier server of this machine left: adopt, restart, resume rollouts, remove the rest.

        Returns as soon as everything is under way; `until_serving` waits for the apps. Apps that another server runs
        are left to it.
        """
        await self._take_up_all(await self._census.claim_apps())
        self._tasks.start(self._crontab.run(), "cron processes")

    async def watch(self, stop: asyncio.Event) -> None:
        """Until `stop` is set, look for apps that nobody runs any more and for what other servers have recorded."""
        stopping = asyncio.ensure_future(stop.wait())
        try:
            while not stop.is_set():
                asked = asyncio.ensure_future(self._asked.wait())
                pause = self._leases.ttl_secs / _LOOKS_PER_LEASE
                await asyncio.wait((asked, stopping), timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                asked.cancel()
                self._asked.clear()
                if not stop.is_set():
                    await self._look_again()
        finally:
            stopping.cancel()

    def overheard(self, topics: Sequence[str] | None) -> None:
        """Another server has changed something; of an app of this one it matters at once, as do leases given back."""
        if topics is None or LEASES in topics or not self._runners.keys().isdisjoint(topics):
            self._asked.set()

    async def _look_again(self) -> None:
        try:
            claimed = await self._census.claim_apps()
            await self._take_up_all([app_id for app_id in claimed if app_id not in self._runners])
            await self._look_around()
        except LeaseLost as error:
            _log.warning("an app was taken over by another server", error=str(error))
        except (AetherError, SQLAlchemyError, OSError) as error:
            _log.warning("looking for apps to take up failed", error=str(error))

    async def until_serving(self, timeout_secs: float) -> None:
        """Wait until every app that has a release serves, at most `timeout_secs`."""
        waiting = [asyncio.ensure_future(runner.until_serving()) for runner in self._runners.values()]
        if not waiting:
            return
        _, late = await asyncio.wait(waiting, timeout=timeout_secs)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    def register(self, app_id: str, app: str, lease: Lease) -> None:
        """Run a new app from now on: its host answers 503 instead of 404."""
        self._leases.keep(lease)
        self._runner(app_id, app, lease)

    async def scale(self, app_id: str) -> None:
        """Run as many instances of the app as its record says by now."""
        async with self._scaling:  # so that of two changes the later one is applied last
            async with self._database.read() as tx:
                sizes = await sizes_of(tx, app_id)
            if (runner := self._runners.get(app_id)) is not None and not self._closing:
                runner.scale(sizes)

    def submit(self, row: DeploymentRow) -> None:
        """Begin the rollout of a deployment that was just recorded; it goes on by itself. The server that runs the
        app, if it is another one, finds it at its next look."""
        runner = self._runners.get(row.app_id)
        if runner is not None and not self._closing and row.id not in self._rollouts:
            self._start_rollout(Claim(row.id, row.app_id, row.epoch, runner.drivers.lease), row)

    def runs(self, app_id: str) -> bool:
        """Whether the app is this server's."""
        return app_id in self._runners

    def settled_elsewhere(self, deployment_ids: Sequence[str]) -> None:
        """Deployments whose status a service wrote (cancelled): let their rollouts notice."""
        for deployment_id in deployment_ids:
            if rollout := self._rollouts.get(deployment_id):
                rollout.look_again()

    async def drop(self, app_id: str, app: str) -> None:
        """Stop everything of a deleted app and forget its route, instances and logs. Waits for a server that runs the
        app to let go of it."""
        self._dropping.add(app_id)
        try:
            with self._broadcast.subscribe(app_id) as released:
                while await self._leases.claim(app_lease(app_id)) is None:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._leases.ttl_secs / _LOOKS_PER_LEASE):
                            await released.wait()
                    released.clear()
            await self._drop(app_id, app)
        finally:
            self._dropping.discard(app_id)

    async def _drop(self, app_id: str, app: str) -> None:
        runner = self._runners.get(app_id)
        if runner is not None:
            if (rollout := self._newest.get(app_id)) is not None:
                rollout.look_again()
                await rollout.released.wait()
            await runner.stop(self._options.stop_grace_secs)
            del self._runners[app_id]
        self._router.drop(app)
        async with self._database.read() as tx:
            found = await tx.execute(sa.select(instances.c.id).where(instances.c.app_id == app_id))
            leftover = list(found.scalars())
        for instance_id in leftover:
            await self._remove_one(instance_id)
            await self._runtime.drop_logs(instance_id, app)

    async def close(self) -> None:
        """Stop every instance, all at once, and leave the record so that the next start brings each app back."""
        self._closing = True
        await self._tasks.close()
        grace = self._options.stop_grace_secs
        await asyncio.gather(
            *(
                runner.stop(grace) if runner.drivers.lease.holds else runner.abandon()
                for runner in self._runners.values()
            )
        )
        await self._tasks.close()

    async def abandon(self) -> None:
        """End without touching the instances: another server adopts them."""
        self._closing = True
        await self._tasks.close()
        await asyncio.gather(*(runner.abandon() for runner in self._runners.values()))
        await self._tasks.close()

    # --- taking up

    async def _take_up_all(self, app_ids: Sequence[str]) -> None:
        if not app_ids and not self._leases.alone:
            return
        found = await self._census.take(set(app_ids))
        self._was_ready = found.was_ready
        for app_id, app in found.names.items():
            if (lease := self._leases.held(app_lease(app_id))) is not None:
                self._runner(app_id, app, lease, found.sizes.get(app_id))
        await self._census.cancel_overtaken(found.plan)
        for app in found.plan.apps.values():
            if app.app_id not in self._runners:
                continue  # lost again meanwhile
            try:
                await self._take_up(app)
            except (AetherError, OSError, LeaseLost) as error:
                _log.error("an app could not be taken up", app=found.names.get(app.app_id), error=str(error))
        for run in found.jobs:
            if (runner := self._runners.get(run.app_id)) is not None:
                self._crontab.take_up(runner, run)
        unwanted = await self._census.mark_gone(found.plan)
        self._tasks.start(self._remove(unwanted), "remove unwanted instances")

    async def _take_up(self, app: AppPlan) -> None:
        runner = self._runners[app.app_id]
        runner.held = app.hold_active
        if not self._leases.alone:
            _log.info("an app is this server's from now on", app=runner.app)
        if app.active is not None:
            async with self._database.read() as tx:
                row = await find_deployment(tx, app.active)
            try:
                adopt = [(i, app.process_of[i]) for i in app.active_instances]
                self._take_up_active(runner, await self._launcher.release(row), adopt)
            except (AetherError, OSError) as error:
                _log.error("the active release cannot be started yet", app=row.app, error=str(error))
                self._tasks.start(self._take_up_later(runner, row), f"take up {row.app}")
        if app.under_way is not None:
            await self._resume_rollout(app, app.under_way)

    def _take_up_active(self, runner: Runner, release: ReleaseLaunch, adopt: Sequence[tuple[str, str]]) -> None:
        group = runner.make_group(release)
        runner.active = group
        for instance_id, process in adopt:
            group.add(process, adopt=instance_id, was_ready=instance_id in self._was_ready, keep=True)
        if not runner.held:
            runner.keep_up()

    async def _take_up_later(self, runner: Runner, row: DeploymentRow) -> None:
        for failures in itertools.count(1):
            await asyncio.sleep(pause_before_restart(failures))
            if runner.active is not None or runner.drivers.lease.lost:
                return
            try:
                self._take_up_active(runner, await self._launcher.release(row), ())
                return
            except (AetherError, OSError) as error:
                _log.warning("the active release cannot be started yet", app=row.app, error=str(error))

    async def _remove(self, instance_ids: Sequence[str]) -> None:
        turns = asyncio.Semaphore(_CLEAN_UP_AT_ONCE)

        async def one(instance_id: str) -> None:
            async with turns:
                try:
                    await self._remove_one(instance_id)
                except (AetherError, OSError) as error:
                    _log.error("a leftover instance could not be removed", instance=instance_id, error=str(error))

        await asyncio.gather(*(one(instance_id) for instance_id in instance_ids))

    async def _remove_one(self, instance_id: str) -> None:
        instance = await self._runtime.adopt(instance_id)
        if instance is not None:
            await instance.stop(self._options.stop_grace_secs)
        await self._runtime.remove(instance_id)

    # --- rollouts

    def _runner(self, app_id: str, app: str, lease: Lease, sizes: Mapping[str, int] | None = None) -> Runner:
        runner = self._runners.get(app_id)
        if runner is None:
            drivers = Drivers(
                self._runtime, self._router, self.ledger, self._overdue, lease,
                self._options.drain_timeout_secs, self._options.stop_grace_secs, self._options.linger_secs,
            )  # fmt: skip
            runner = self._runners[app_id] = Runner(app_id, app, drivers, self._tasks, sizes, self._crontab.changed)
            lease.when_lost(lambda: self._let_go(app_id))
        return runner

    def _let_go(self, app_id: str) -> None:
        """Another server runs the app, or is to: leave everything of it as it is."""
        if app_id in self._dropping or self._closing:
            return
        runner = self._runners.pop(app_id, None)
        if runner is None:
            return
        _log.warning("an app is another server's from now on", app=runner.app)
        for rollout in self._rollouts.values():
            if rollout.row.app_id == app_id:
                rollout.look_again()
        self._tasks.start(runner.abandon(), f"let go of {runner.app}")

    async def _look_around(self) -> None:
        """See what other servers have recorded about the apps of this one."""
        async with self._database.read() as tx:
            found = await tx.execute(sa.select(applications.c.id, applications.c.deleting_at))
            deleting = {row.id: row.deleting_at is not None for row in found}
            busy = (
                await tx.execute(
                    sa.select(deployments.c.id, deployments.c.app_id)
                    .where(deployments.c.status.in_(UNDER_WAY_VALUES))
                    .order_by(deployments.c.id)
                )
            ).all()
        self.settled_elsewhere(list(self._rollouts.keys() - {row.id for row in busy}))
        for app_id in list(self._runners):
            if app_id in self._dropping:
                continue
            if deleting.get(app_id, True):
                await self._leases.release(app_lease(app_id))
                self._broadcast.notify(app_id)
            else:
                await self.scale(app_id)
        for row in busy:
            if row.app_id in self._runners and row.id not in self._rollouts:
                await self._resume_rollout(AppPlan(row.app_id), row.id)

    async def _resume_rollout(self, app: AppPlan, deployment_id: str) -> None:
        lease = self._leases.held(app_lease(app.app_id))
        if lease is None:
            return
        try:
            claim, row = await self.ledger.claim(deployment_id, lease)
            if row.status is not DeploymentStatus.PENDING:
                how = "again after a restart of the server" if self._leases.alone else "by another server"
                await self.ledger.note(claim, row.status, row.status, f"taken up {how}")
        except (LostRollout, LeaseLost):
            return
        if deployment_id in self._rollouts:
            return  # submitted meanwhile
        adopt: dict[str, list[str]] = {}
        for instance_id in app.under_way_instances:
            adopt.setdefault(app.process_of[instance_id], []).append(instance_id)
        self._start_rollout(claim, row, adopt, holds=app.hold_active)

    def _start_rollout(
        self,
        claim: Claim,
        row: DeploymentRow,
        adopt: Mapping[str, Sequence[str]] | None = None,
        *,
        holds: bool = False,
    ) -> None:
        after = self._newest.get(row.app_id)
        rollout = Rollout(
            self._runners[row.app_id], self.ledger, self._rollout_options, claim, row,
            adopt=adopt, holds=holds, after=after,
        )  # fmt: skip
        self._rollouts[row.id] = self._newest[row.app_id] = rollout
        self._tasks.start(self._run(rollout), f"rollout of {row.app}")

    async def _run(self, rollout: Rollout) -> None:
        row = rollout.row
        try:
            await rollout.run()
        finally:
            del self._rollouts[row.id]
            if self._newest.get(row.app_id) is rollout:
                del self._newest[row.app_id]
        if row.app_id in self._runners:
            await self._prune(row.app_id, row.app)

    async def spec_of(self, row: DeploymentRow) -> InstanceSpec:
        """What a command in a release is started from; raises what `Launcher.base` raises."""
        return await self._launcher.base(row)

    async def _masker_of(self, instance_id: str) -> Masker:
        """Knows the secrets of an instance: what it wrote is about to be kept with its deployment."""
        async with self._database.read() as tx:
            query = sa.select(instances.c.deployment_id).where(instances.c.id == instance_id)
            deployment_id = (await tx.execute(query)).scalar_one_or_none()
            if deployment_id is None:
                return Masker(())
            variables = await self._vault.variables_of(tx, await find_deployment(tx, deployment_id))
        return Masker(variables.hidden())

    async def _log_tail(self, instance_id: str, app: str, lines: int) -> list[str]:
        found: list[str] = []
        try:
            masker = await self._masker_of(instance_id)
            async with contextlib.aclosing(self._runtime.logs(instance_id, app, tail=lines)) as records:
                async for record in records:
                    found.append(masker.mask(record.text))
        except (AetherError, OSError) as error:
            _log.warning("the log of a failed instance cannot be read", instance=instance_id, error=str(error))
        return found

    async def prune(self, *, dry_run: bool) -> int:
        """Discard the unpacked artifacts that no app of this server needs; returns how many."""
        found = 0
        for app_id, runner in list(self._runners.items()):
            if dry_run:
                found += len(await self._unneeded(app_id, runner.app))
            elif runner.drivers.lease.holds:
                found += await self._prune(app_id, runner.app)
        return found

    async def _prune(self, app_id: str, app: str) -> int:
        unneeded = await self._unneeded(app_id, app)
        for digest in unneeded:
            await self._source.discard(app, digest)
        return len(unneeded)

    async def _unneeded(self, app_id: str, app: str) -> Sequence[str]:
        """Unpacked artifacts but those of the active release, the one before it, and what is under way."""
        unpacked = await self._source.unpacked(app)  # listed first: what is unpacked later is of a later deployment
        async with self._database.read() as tx:
            newest = await tx.execute(
                sa.select(deployments.c.digest)
                .where(deployments.c.app_id == app_id, deployments.c.release.is_not(None))
                .order_by(deployments.c.release.desc())
                .limit(2)
            )
            keep = set(newest.scalars())
            busy = await tx.execute(
                sa.select(deployments.c.digest).where(
                    deployments.c.app_id == app_id, deployments.c.status.in_(UNDER_WAY_VALUES)
                )
            )
            keep |= set(busy.scalars())
            running = sa.select(runs.c.deployment_id).where(runs.c.app_id == app_id, runs.c.ended_at.is_(None))
            used = await tx.execute(sa.select(deployments.c.digest).where(deployments.c.id.in_(running)))
            keep |= set(used.scalars())
        runner = self._runners.get(app_id)
        if runner is not None:
            keep |= {group.release.digest for group in runner.groups}
            keep |= {replica.launch.spec.digest for replica in runner.leaving}
            keep |= {job.digest for job in runner.jobs if job.digest is not None}
        return [digest for digest in unpacked if digest not in keep]
