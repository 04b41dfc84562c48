"""One place of a release in which an instance runs: started or adopted, gated, restarted, drained, stopped.

A replica knows its instance's life and nothing of rollouts or traffic; it reports every change to its owner, who
routes. With `keep` an instance that ends is replaced after a pause that doubles from 0.1 s to 30 s and falls back
once an instance has been up for a minute.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

import structlog

from aether.apps.ledger import Ledger
from aether.apps.ports import Backend, Instance, Router, Runtime
from aether.model.errors import AetherError
from aether.model.instance import InstanceExit, InstanceSpec
from aether.model.names import new_id
from aether.rollout.health import Gate, HealthCheck, Healthy, wrong_port
from aether.rollout.machine import Observed, Reason

FIRST_PAUSE_SECS = 0.1
LONGEST_PAUSE_SECS = 30.0
STEADY_SECS = 60.0
ENDED_INSTANCES_KEPT = 10
"""How many ended instances of an app keep their row and log."""
_log = structlog.stdlib.get_logger("aether.apps")


def pause_before_restart(failures: int) -> float:
    """Seconds to wait before the restart that follows `failures` quick ends in a row."""
    return min(LONGEST_PAUSE_SECS, FIRST_PAUSE_SECS * 2 ** min(failures, 20))


@dataclass(frozen=True, slots=True)
class Launch:
    """What every instance of a release has in common. `spec.instance_id` is replaced at each start."""

    app_id: str
    spec: InstanceSpec
    check: HealthCheck
    start_timeout_secs: float
    """How long a restarted instance may take to become healthy before it is replaced."""


@dataclass(frozen=True, slots=True)
class Drivers:
    """What replicas work with."""

    runtime: Runtime
    router: Router
    ledger: Ledger
    drain_timeout_secs: float = 30.0
    stop_grace_secs: float = 10.0


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
        return self.observed is Observed.READY and self.backend is not None

    def run(self) -> None:
        """Start, or start again after an end that was not followed by a restart."""
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
        if reason is not None and reason.code == "never_listened" and self._instance is not None:
            return await wrong_port(self._instance, self.launch.check) or reason
        return reason

    def drain(self, timeout_secs: float) -> Coroutine[Any, Any, None]:
        """Take no more traffic from this moment; the result is awaited to let the requests under way end."""
        self.observed = Observed.DRAINING
        self._changed()
        return self._drain(timeout_secs)

    async def _drain(self, timeout_secs: float) -> None:
        if self.backend is not None and not await self.backend.drain(timeout_secs):
            _log.warning("requests cut off at the drain timeout", app=self.launch.spec.app, instance=self.instance_id)
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
        await self.stop(self._drivers.stop_grace_secs)

    async def abandon(self) -> None:
        """Stop watching and leave the instance as it is, for another server to adopt."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _live(self) -> None:
        while True:
            self._life_over.clear()
            try:
                ready_secs = await self._one_life()
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
            ended = await self._pass_gate(instance)
            if ended is None:
                ready_at = loop.time()
                self.gate_secs = ready_at - begun
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
        try:
            await self._drivers.ledger.add_instance(
                self.instance_id, self.launch.app_id, self.launch.spec.deployment_id, self.restarts
            )
        except AetherError as error:
            if not self.keep:
                raise
            # an app that is down comes back even while the database is away
            _log.warning("an instance starts without a record", app=self.launch.spec.app, error=error.message)
        return await runtime.start(replace(self.launch.spec, instance_id=self.instance_id))

    async def _pass_gate(self, instance: Instance) -> InstanceExit | None:
        if self._adopt == self.instance_id and self._was_ready and await _listens(instance):
            return None
        self._gate, self._given_up = Gate(instance, self.launch.check), False
        limit = self.launch.start_timeout_secs if self.keep else None
        try:
            async with asyncio.timeout(limit):
                verdict = await self._gate.run()
        except TimeoutError:
            # what the gate saw says more than the signal that ends the instance now
            self._given_up = True
            return await instance.stop(0)
        finally:
            self._reason, self._gate = self._gate.last, None
        return None if isinstance(verdict, Healthy) else verdict

    def _why_ended(self, ended: InstanceExit, *, ready: bool) -> Reason:
        when = "" if ready else f" before it answered on port {self.launch.check.port}"
        code = "out_of_memory" if ended.out_of_memory else "exited"
        return Reason(code, f"the app {ended}{when}")

    async def _bury(self, status: str) -> None:
        await self._record(status)
        try:
            await self._drivers.runtime.remove(self.instance_id)
            await prune_ended(self._drivers, self.launch.app_id, self.launch.spec.app, ENDED_INSTANCES_KEPT)
        except (AetherError, OSError) as error:
            # the next start's reconciliation takes it away
            _log.warning("an ended instance could not be cleared away", instance=self.instance_id, error=str(error))

    async def _record(self, status: str) -> None:
        try:
            await self._drivers.ledger.set_instances(self.launch.app_id, [self.instance_id], status)
        except AetherError as error:
            # what runs matters more than its record; the next change or start sets it right
            _log.warning("an instance's status was not recorded", instance=self.instance_id, error=error.message)


async def _listens(instance: Instance) -> bool:
    try:
        (await instance.dial()).close()
    except OSError:
        return False
    return True


async def prune_ended(drivers: Drivers, app_id: str, app: str, keep: int) -> None:
    """Drop rows and logs of the app's ended instances beyond the newest `keep`."""
    surplus = await drivers.ledger.ended_instances(app_id, keep)
    for instance_id in surplus:
        await drivers.runtime.drop_logs(instance_id, app)
    if surplus:
        await drivers.ledger.forget_instances(surplus)
