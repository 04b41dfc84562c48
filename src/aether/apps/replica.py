"""One place of a release in which an instance runs: started or adopted, gated, restarted, drained, stopped.

A replica knows its instance's life and nothing of rollouts or traffic; it reports every change to its owner, who
routes. With `keep` an instance that ends is replaced after a pause that doubles from 0.1 s to 30 s and falls back
once an instance has been up for a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import structlog

from aether.apps.launch import Launch
from aether.apps.ledger import DATABASE_PAUSE_SECS, Ledger
from aether.apps.overdue import Overdue, Unrecorded
from aether.apps.ports import Backend, Instance, Router, Runtime
from aether.leases import Lease, LeaseLost
from aether.model.errors import AetherError, ServiceUnavailable
from aether.model.instance import InstanceExit
from aether.model.names import new_id
from aether.observability import tracing
from aether.rollout.health import Gate, Healthy, wrong_port
from aether.rollout.machine import Observed, Reason

FIRST_PAUSE_SECS = 0.1
LONGEST_PAUSE_SECS = 30.0
STEADY_SECS = 60.0
ENDED_INSTANCES_KEPT = 10
"""How many ended instances of each process type of an app keep their row and log."""
_log = structlog.stdlib.get_logger("aether.apps")


def pause_before_restart(failures: int) -> float:
    """Seconds to wait before the restart that follows `failures` quick ends in a row."""
    return min(LONGEST_PAUSE_SECS, FIRST_PAUSE_SECS * 2 ** min(failures, 20))


@dataclass(frozen=True, slots=True)
class Drivers:
    """What the replicas of one app work with."""

    runtime: Runtime
    router: Router
    ledger: Ledger
    overdue: Overdue
    lease: Lease
    """Of the app: nothing is started or stopped without it."""
    drain_timeout_secs: float = 30.0
    stop_grace_secs: float = 10.0
    linger_secs: float = 0.0


class Replica:
    """See the module. `observed`, `reason` and `backend` are read by the owner after each `changed` call."""

    def __init__(
        self,
        drivers: Drivers,
        launch: Launch,
        changed: Callable[[], None],
        *,
        adopt: str | None,
        was_ready: bool = False,
    ) -> None:
        self._drivers = drivers
        self.launch = launch
        self._changed = changed
        self._adopt = adopt
        self._was_ready = was_ready
        self._instance: Instance | None = None
        self._gate: Gate | None = None
        self._stopping = False
        self._pausing = False
        self._reason: Reason | None = None
        self._given_up = False
        self._failures = 0
        self._task: asyncio.Task[None] | None = None
        self._starting: tuple[str, asyncio.Future[Instance]] | None = None
        """The instance whose start is under way, or was when the lease was lost: by then the replica may have
        another one in mind."""
        self._abandoned = False
        self._life_over = asyncio.Event()
        self._life_over.set()
        self.instance_id = adopt or new_id()
        self.observed = Observed.STARTING
        self.backend: Backend | None = None
        self.keep = False
        self.restarts = 0
        self.gate_secs = 0.0
        """How long the newest instance took from its start to its first good answer."""

    @property
    def reason(self) -> Reason | None:
        return self._gate.last if self._gate is not None else self._reason

    @property
    def serves(self) -> bool:
        return self.observed is Observed.READY and (self.backend is not None or self.launch.check is None)

    @property
    def being_adopted(self) -> bool:
        """Whether it is yet to be seen what became of the instance that it is to adopt."""
        return self._adopt == self.instance_id and self.observed is Observed.STARTING

    def run(self) -> None:
        """Start, or start again after an end that was not followed by a restart."""
        if self._abandoned:
            return
        self._stopping = False
        if self._task is None or self._task.done():
            if self._task is not None:
                self._renew()
            self._life_over.clear()
            self._task = asyncio.create_task(self._live(), name=f"replica {self.launch.spec.app}")

    def release(self) -> None:
        """Restart no more: an instance that runs goes on, a pause before a restart ends here."""
        self.keep = False
        if self._task is not None and self._pausing:
            self._task.cancel()

    async def explain(self) -> Reason | None:
        """`reason`, made more precise by looking at the instance."""
        reason = self.reason
        check = self.launch.check
        if (
            reason is not None
            and reason.code == "never_listened"
            and self._instance is not None
            and check is not None
        ):
            return await wrong_port(self._instance, check) or reason
        return reason

    def drain(self, timeout_secs: float) -> Coroutine[Any, Any, None]:
        """Take no more traffic from this moment; the result is awaited to let the requests under way end."""
        self.observed = Observed.DRAINING
        self._changed()
        return self._drain(timeout_secs)

    async def _drain(self, timeout_secs: float) -> None:
        if self.backend is not None and not await self.backend.drain(timeout_secs):
            _log.warning("requests cut off at the drain timeout", app=self.launch.spec.app, instance=self.instance_id)
        if self.backend is not None and self._drivers.linger_secs:
            # other servers route to it until they have looked at the record, and then have requests under way
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._drivers.linger_secs):
                    await self._life_over.wait()
        if self.observed is Observed.DRAINING:
            self.observed = Observed.DRAINED
            self._changed()

    def stop(self, grace_secs: float) -> Coroutine[Any, Any, None]:
        """End the instance for good; the result is awaited until nothing of it is left but its log."""
        self.release()
        self._stopping = True
        if self.observed is not Observed.EXITED:
            self.observed = Observed.STOPPING
            self._changed()
        return self._stop(grace_secs)

    async def _stop(self, grace_secs: float) -> None:
        if self._instance is not None:
            await self._instance.stop(grace_secs)
        await self._life_over.wait()

    async def retire(self) -> None:
        """Drain and stop an instance that the app no longer wants; its owner has taken it off the route."""
        self.release()
        served = self.observed is Observed.READY
        self.observed = Observed.DRAINING
        if served:
            await self._record("draining")
        await self._drain(self._drivers.drain_timeout_secs)
        await self._drivers.lease.until_holds()
        await self.stop(self._drivers.stop_grace_secs)

    async def abandon(self) -> None:
        """Stop watching and leave the instance as it is, for another server to adopt."""
        self._abandoned = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        if self._starting is not None and self._drivers.lease.lost:
            instance_id, start = self._starting
            await asyncio.wait((start,))
            await self._take_back(instance_id)

    async def _take_back(self, instance_id: str) -> None:
        """End an instance whose start was under way when the lease passed to another server, unless that one has it.

        The other server records that an instance is gone before it looks for its remains, and this one starts it
        before it looks at the record: one of the two sees the other."""
        while True:
            try:
                if await self._drivers.ledger.is_live(instance_id):
                    return
                instance = await self._drivers.runtime.adopt(instance_id)
                if instance is not None:
                    await instance.stop(0)
                await self._drivers.runtime.remove(instance_id)
                return
            except ServiceUnavailable as error:
                _log.warning("a late start waits for the database", instance=instance_id, error=error.message)
                await asyncio.sleep(DATABASE_PAUSE_SECS)

    async def _live(self) -> None:
        while True:
            self._life_over.clear()
            try:
                ready_secs = await self._one_life()
            except LeaseLost:
                return  # the engine lets go of the app; nothing here may change what the other server sees
            except Exception as error:  # noqa: BLE001 - whatever a driver does wrong, the app must not stay down for it
                _log.error("an instance failed unexpectedly", app=self.launch.spec.app, exc_info=error)
                self._reason = Reason("internal", "the instance failed for a reason that is the server's")
                ready_secs = 0.0
            finally:
                self._life_over.set()
            self.observed = Observed.EXITED
            self._changed()
            if not self.keep:
                return
            self._failures = 0 if ready_secs >= STEADY_SECS else self._failures
            pause = pause_before_restart(self._failures)
            self._failures += 1
            _log.warning(
                "instance ended, restarting", app=self.launch.spec.app, instance=self.instance_id,
                reason=self._reason.message if self._reason else None, pause_secs=pause,
            )  # fmt: skip
            self._pausing = True
            try:
                await asyncio.sleep(pause)
            finally:
                self._pausing = False
            self._renew()

    def _renew(self) -> None:
        self.instance_id = new_id()
        self.restarts += 1
        self._adopt = None
        self.observed = Observed.STARTING
        self._changed()

    async def _one_life(self) -> float:
        """One instance from its start to its end; returns for how many seconds it was ready."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        ready_at: float | None = None
        try:
            with self._span("start instance"):
                instance = await self._obtain()
        except AetherError as error:
            self._reason = Reason(error.code, error.message)
            await self._bury("failed")
            return 0.0
        except OSError as error:
            why = str(error) or type(error).__name__
            self._reason = Reason("start_failed", f"the instance could not be started: {why}")
            await self._bury("failed")
            return 0.0
        self._instance = instance
        try:
            if self._stopping:
                await instance.stop(0)
            with self._span("health gate"):
                ended = await self._pass_gate(instance)
            if ended is None:
                ready_at = loop.time()
                self.gate_secs = ready_at - begun
                if self.launch.check is not None:
                    self.backend = self._drivers.router.add(self.launch.spec.app, instance)
                if self.observed is Observed.STARTING:
                    self.observed = Observed.READY
                self._changed()
                if self.keep:
                    await self._record("ready")
                ended = await instance.wait()
            if not self._given_up:
                self._reason = self._why_ended(ended, ready=ready_at is not None)
        finally:
            self.backend = None
            self._instance = None
        if self._adopt == self.instance_id and ready_at is None and not self._stopping:
            # it ended, or was never quite started, while no server looked: that says nothing about the release
            await self._bury("failed")
            self._renew()
            return await self._one_life()
        self.observed = Observed.EXITED
        self._changed()
        await self._bury("stopped" if self._stopping else "failed")
        return 0.0 if ready_at is None else loop.time() - ready_at

    def _span(self, name: str) -> AbstractContextManager[object]:
        """A step of the deployment that this replica belongs to, as long as it is one."""
        if self.keep:
            return contextlib.nullcontext()
        return tracing.span(name, {"aether.instance": self.instance_id})

    async def _obtain(self) -> Instance:
        runtime = self._drivers.runtime
        if self._adopt is not None:
            found = await runtime.adopt(self._adopt)
            if found is not None:
                return found
            # an earlier server was killed before it had recorded what it was about to start
            await self._bury("failed")
            self.instance_id = new_id()
            self._was_ready = False
        await self._announce()
        start = asyncio.ensure_future(runtime.start(replace(self.launch.spec, instance_id=self.instance_id)))
        self._starting = self.instance_id, start
        instance = await asyncio.shield(start)
        await self._drivers.lease.until_holds()
        self._starting = None
        return instance

    async def _announce(self) -> None:
        """Record the instance that is about to start. Raises what the ledger raises."""
        while True:
            await self._drivers.lease.until_holds()
            try:
                await self._drivers.ledger.add_instance(
                    self._drivers.lease, self.instance_id, self.launch.app_id, self.launch.spec.deployment_id,
                    self.restarts, self.launch.spec.process,
                )  # fmt: skip
                return
            except AetherError as error:
                if self.keep:
                    # an app that is down comes back even while the database is away
                    _log.warning("an instance starts without a record", app=self.launch.spec.app, error=error.message)
                    spec = self.launch.spec
                    self._drivers.overdue.started(
                        self._drivers.lease, self.launch.app_id, self.instance_id,
                        Unrecorded(spec.deployment_id, self.restarts, spec.process),
                    )  # fmt: skip
                    return
                if self._stopping or not isinstance(error, ServiceUnavailable):
                    raise
                # that says nothing about the release; how long it may last is the rollout's to say
                _log.warning("a start waits for the database", instance=self.instance_id, error=error.message)
            await asyncio.sleep(DATABASE_PAUSE_SECS)

    async def _pass_gate(self, instance: Instance) -> InstanceExit | None:
        """Return None once the instance is ready, or how it ended before."""
        taken_over = self._adopt == self.instance_id and self._was_ready
        check = self.launch.check
        if check is None:
            return await _ends_within(instance, 0.0 if taken_over else self.launch.settle_secs)
        if taken_over and await _listens(instance):
            return None
        self._gate, self._given_up = Gate(instance, check), False
        limit = self.launch.start_timeout_secs if self.keep else None
        try:
            async with asyncio.timeout(limit):
                verdict = await self._gate.run()
        except TimeoutError:
            # what the gate saw says more than the signal that ends the instance now
            self._given_up = True
            await self._drivers.lease.until_holds()
            return await instance.stop(0)
        finally:
            self._reason, self._gate = self._gate.last, None
        return None if isinstance(verdict, Healthy) else verdict

    def _why_ended(self, ended: InstanceExit, *, ready: bool) -> Reason:
        code, check = "out_of_memory" if ended.out_of_memory else "exited", self.launch.check
        if check is None:
            soon = "" if ready else f" within {self.launch.settle_secs:g} s of its start"
            return Reason(code, f"the process type '{self.launch.spec.process}' {ended}{soon}")
        when = "" if ready else f" before it answered on port {check.port}"
        return Reason(code, f"the app {ended}{when}")

    async def _bury(self, status: str) -> None:
        await self._record(status)
        try:
            await self._drivers.runtime.remove(self.instance_id)
            await prune_ended(self._drivers, self.launch.app_id, self.launch.spec.app, self.launch.spec.process)
        except (AetherError, OSError) as error:
            # the next start's reconciliation takes it away
            _log.warning("an ended instance could not be cleared away", instance=self.instance_id, error=str(error))

    async def _record(self, status: str) -> None:
        await self._drivers.overdue.record(self._drivers.lease, self.launch.app_id, self.instance_id, status)


async def _listens(instance: Instance) -> bool:
    try:
        (await instance.dial()).close()
    except OSError:
        return False
    return True


async def _ends_within(instance: Instance, secs: float) -> InstanceExit | None:
    ended = asyncio.ensure_future(instance.wait())
    try:
        await asyncio.wait((ended,), timeout=secs)
        return ended.result() if ended.done() else None
    finally:
        ended.cancel()


async def prune_ended(drivers: Drivers, app_id: str, app: str, process: str) -> None:
    """Drop rows and logs of the ended instances of a process type but for the newest."""
    surplus = await drivers.ledger.ended_instances(app_id, process, ENDED_INSTANCES_KEPT)
    for instance_id in surplus:
        await drivers.runtime.drop_logs(instance_id, app)
    if surplus:
        await drivers.ledger.forget_instances(drivers.lease, surplus)
