"""The apps of this server as a running whole: taken up at start, changed by deployments, put down at the end.

One runner per app; rollouts of an app follow one another. What to adopt and what to remove at start is decided in
`aether.apps.reconcile`; how a rollout goes, in `aether.rollout.machine`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa
import structlog

from aether.apps.broadcast import Broadcast
from aether.apps.ledger import LIVE_INSTANCES, Claim, Ledger, LostRollout, cancel_in
from aether.apps.ports import ArtifactSource, Router, Runtime
from aether.apps.reconcile import AppPlan, Plan, RecordedDeployment, RecordedInstance, reconcile
from aether.apps.records import UNDER_WAY_VALUES, WEB, DeploymentRow, config_env, find_deployment, quantity
from aether.apps.replica import Drivers, Launch, pause_before_restart
from aether.apps.rollout import Rollout, RolloutOptions
from aether.apps.runner import Runner
from aether.apps.tasks import Tasks
from aether.model.database import DatabasePort
from aether.model.deployment import DeploymentStatus
from aether.model.errors import AetherError, NotFound
from aether.model.instance import InstanceSpec, Limits
from aether.rollout.health import HealthCheck
from aether.stores.database.tables import applications, artifacts, deployments, formations, instances

DEFAULT_PORT = 8080
"""PORT of an instance whose health check names none; each has a network view of its own."""
RESTART_TIMEOUT_SECS = 60.0
"""Least time that an instance of the active release has to become healthy: when a server comes back, all its apps
start at once, and a short rollout deadline must not keep one of them down."""
_CLEAN_UP_AT_ONCE = 8
_log = structlog.stdlib.get_logger("aether.apps")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Durations in seconds."""

    base_domain: str = "localhost"
    drain_timeout_secs: float = 30.0
    stop_grace_secs: float = 10.0
    limits: Limits = field(default_factory=Limits)
    runtime_warning: Callable[[str | None], str | None] = field(default=lambda _runtime: None)


class Engine:
    """See the module. Call `resume` once, then `submit` for every deployment, and `close` at the end."""

    def __init__(
        self,
        database: DatabasePort,
        broadcast: Broadcast,
        runtime: Runtime,
        router: Router,
        source: ArtifactSource,
        options: EngineOptions,
        owner: str,
    ) -> None:
        self._database = database
        self._runtime = runtime
        self._router = router
        self._source = source
        self._options = options
        self.ledger = Ledger(database, broadcast, owner)
        self._drivers = Drivers(
            runtime, router, self.ledger, options.drain_timeout_secs, options.stop_grace_secs
        )  # fmt: skip
        self._tasks = Tasks()
        self._runners: dict[str, Runner] = {}
        self._rollouts: dict[str, Rollout] = {}
        self._newest: dict[str, Rollout] = {}
        self._closing = False
        self._was_ready: set[str] = set()
        self._scaling = asyncio.Lock()
        self._rollout_options = RolloutOptions(
            drain_timeout_secs=options.drain_timeout_secs,
            stop_grace_secs=options.stop_grace_secs,
            log_tail=self._log_tail,
            discard=self._remove,
            prepare=self._launch_of,
            runtime_warning=options.runtime_warning,
        )

    async def resume(self) -> None:
        """Take up what an earlier server of this machine left: adopt, restart, resume rollouts, remove the rest.

        Returns as soon as everything is under way; `until_serving` waits for the apps.
        """
        plan, names, wanted = await self._plan()
        for app_id, app in names.items():
            self._runner(app_id, app, wanted.get(app_id, 1))
        await self._cancel_overtaken(plan)
        for app in plan.apps.values():
            try:
                await self._take_up(app)
            except (AetherError, OSError) as error:
                _log.error("an app could not be taken up", app=names.get(app.app_id), error=str(error))
        await self._mark_gone(plan)
        self._tasks.start(self._remove(plan.remove), "remove unwanted instances")

    async def until_serving(self, timeout_secs: float) -> None:
        """Wait until every app that has a release serves, at most `timeout_secs`."""
        waiting = [asyncio.ensure_future(runner.until_serving()) for runner in self._runners.values()]
        if not waiting:
            return
        _, late = await asyncio.wait(waiting, timeout=timeout_secs)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    def register(self, app_id: str, app: str) -> None:
        """Let a new app's host answer 503 instead of 404."""
        self._runner(app_id, app)

    async def scale(self, app_id: str) -> None:
        """Run as many instances of the app as its record says by now."""
        async with self._scaling:  # so that of two changes the later one is applied last
            async with self._database.read() as tx:
                desired = await quantity(tx, app_id)
            if (runner := self._runners.get(app_id)) is not None and not self._closing:
                runner.scale(desired)

    def submit(self, row: DeploymentRow) -> None:
        """Begin the rollout of a deployment that was recorded under this server's lease; it goes on by itself."""
        if not self._closing:
            self._start_rollout(Claim(row.id, row.app_id, row.epoch), row)

    def settled_elsewhere(self, deployment_ids: Sequence[str]) -> None:
        """Deployments whose status a service wrote (cancelled): let their rollouts notice."""
        for deployment_id in deployment_ids:
            if rollout := self._rollouts.get(deployment_id):
                rollout.look_again()

    async def drop(self, app_id: str, app: str) -> None:
        """Stop everything of a deleted app and forget its route, instances and logs."""
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
        await asyncio.gather(*(runner.stop(grace) for runner in self._runners.values()))

    async def abandon(self) -> None:
        """End without touching the instances: another server adopts them."""
        self._closing = True
        await self._tasks.close()
        await asyncio.gather(*(runner.abandon() for runner in self._runners.values()))

    # --- taking up

    async def _plan(self) -> tuple[Plan, Mapping[str, str], Mapping[str, int]]:
        async with self._database.read() as tx:
            apps = (await tx.execute(sa.select(applications))).all()
            sizes = await tx.execute(
                sa.select(formations.c.app_id, formations.c.quantity).where(formations.c.process == WEB)
            )
            desired = {size.app_id: size.quantity for size in sizes}
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
                    desired.get(d.app_id, 1),
                )
                for d in wanted
            ]
            rows = [RecordedInstance(i.id, i.app_id, i.deployment_id, i.status, i.created_at) for i in live]
        known = await self._runtime.known()
        names = {app.id: app.name for app in apps if app.deleting_at is None}
        self._was_ready = {row.id for row in rows if row.status == "ready"}
        return reconcile(recorded, rows, known), names, desired

    async def _take_up(self, app: AppPlan) -> None:
        runner = self._runners[app.app_id]
        runner.held = app.hold_active
        if app.active is not None:
            async with self._database.read() as tx:
                row = await find_deployment(tx, app.active)
            try:
                self._take_up_active(runner, await self._launch_of(row), app.active_instances)
            except (AetherError, OSError) as error:
                _log.error("the active release cannot be started yet", app=row.app, error=str(error))
                self._tasks.start(self._take_up_later(runner, row), f"take up {row.app}")
        if app.under_way is not None:
            await self._resume_rollout(app, app.under_way)

    def _take_up_active(self, runner: Runner, launch: Launch, adopt: Sequence[str]) -> None:
        group = runner.make_group(launch.spec.deployment_id, launch)
        runner.active = group
        for instance_id in adopt:
            group.add(adopt=instance_id, was_ready=instance_id in self._was_ready, keep=True)
        if not runner.held:
            runner.keep_up()

    async def _take_up_later(self, runner: Runner, row: DeploymentRow) -> None:
        for failures in itertools.count(1):
            await asyncio.sleep(pause_before_restart(failures))
            if runner.active is not None:
                return
            try:
                self._take_up_active(runner, await self._launch_of(row), ())
                return
            except (AetherError, OSError) as error:
                _log.warning("the active release cannot be started yet", app=row.app, error=str(error))

    async def _cancel_overtaken(self, plan: Plan) -> None:
        if not plan.cancel:
            return
        async with self._database.write() as tx:
            rows = [await find_deployment(tx, deployment_id) for deployment_id in plan.cancel]
            await cancel_in(tx, rows, "a newer deployment took its place")

    async def _mark_gone(self, plan: Plan) -> None:
        ids = plan.gone + plan.remove
        if ids:
            async with self._database.write() as tx:
                await tx.execute(
                    sa.update(instances)
                    .where(instances.c.id.in_(ids), instances.c.status.in_(LIVE_INSTANCES))
                    .values(
                        status="stopped", stopped_at=sa.func.coalesce(instances.c.stopped_at, instances.c.created_at)
                    )
                )

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

    def _runner(self, app_id: str, app: str, desired: int = 1) -> Runner:
        runner = self._runners.get(app_id)
        if runner is None:
            runner = self._runners[app_id] = Runner(app_id, app, self._drivers, self._tasks, desired)
        return runner

    async def _resume_rollout(self, app: AppPlan, deployment_id: str) -> None:
        try:
            claim, row = await self.ledger.claim(deployment_id)
            if row.status is not DeploymentStatus.PENDING:
                await self.ledger.note(claim, row.status, row.status, "taken up again after a restart of the server")
        except LostRollout:
            return
        self._start_rollout(claim, row, app.under_way_instances, holds=app.hold_active)

    def _start_rollout(
        self, claim: Claim, row: DeploymentRow, adopt: Sequence[str] = (), *, holds: bool = False
    ) -> None:
        after = self._newest.get(row.app_id)
        rollout = Rollout(
            self._runner(row.app_id, row.app), self.ledger, self._rollout_options, claim, row,
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
        await self._prune(row.app_id, row.app)

    async def _launch_of(self, row: DeploymentRow) -> Launch:
        """Raises NotFound when the artifact is not stored, and what unpacking raises."""
        async with self._database.read() as tx:
            found = await tx.execute(
                sa.select(artifacts.c.status, artifacts.c.content_digest).where(artifacts.c.id == row.artifact_id)
            )
            artifact = found.one_or_none()
            env = await config_env(tx, row.app_id, row.config_version)
        if artifact is None or artifact.status != "stored":
            raise NotFound(f"the artifact {row.digest[:12]} is not stored")
        root = await self._source.unpack(row.app, row.digest, artifact.content_digest)
        port = row.health.port or DEFAULT_PORT
        spec = InstanceSpec(
            instance_id="",
            app=row.app,
            deployment_id=row.id,
            release=row.release or 0,
            digest=row.digest,
            root=root,
            command=row.command,
            port=port,
            env={**env, **row.env, **_identity(row)},
            limits=self._options.limits,
        )
        check = HealthCheck(f"{row.app}.{self._options.base_domain}", port, row.health.path)
        return Launch(row.app_id, spec, check, max(row.timeout_secs, RESTART_TIMEOUT_SECS))

    async def _log_tail(self, instance_id: str, app: str, lines: int) -> list[str]:
        found: list[str] = []
        try:
            async with contextlib.aclosing(self._runtime.logs(instance_id, app, tail=lines)) as records:
                async for record in records:
                    found.append(record.text)
        except (AetherError, OSError) as error:
            _log.warning("the log of a failed instance cannot be read", instance=instance_id, error=str(error))
        return found

    async def _prune(self, app_id: str, app: str) -> None:
        """Discard unpacked artifacts but those of the active release, the one before it, and what is under way."""
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
        runner = self._runners.get(app_id)
        if runner is not None:
            keep |= {group.launch.spec.digest for group in runner.groups}
            keep |= {replica.launch.spec.digest for replica in runner.leaving}
        for digest in await self._source.unpacked(app):
            if digest not in keep:
                await self._source.discard(app, digest)


def _identity(row: DeploymentRow) -> dict[str, str]:
    return {
        "AETHER_APP": row.app,
        "AETHER_DEPLOYMENT_ID": row.id,
        "AETHER_ARTIFACT_DIGEST": row.digest,
    }
