"""The release command of one rollout: begun on record, carried out beside the rollout's loop, its end recorded.

It runs at most once per deployment. Before it starts, the deployment says which instance runs it; a successor starts
that same instance, which adopts it, or waits for it, or learns how it ended. Only when its keeper was killed with it
(the machine went down) is its exit unknown: that counts as a failure, and it is not run again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import structlog

from aether.apps.job import Job, JobEnd
from aether.apps.ledger import Claim, Ledger, LostRollout
from aether.apps.records import CommandRun, DeploymentRow
from aether.apps.replica import prune_ended
from aether.apps.runner import Runner
from aether.leases import LeaseLost
from aether.model.errors import AetherError, ServiceUnavailable
from aether.model.instance import InstanceSpec
from aether.model.names import new_id
from aether.model.processes import RELEASE
from aether.model.times import now_us
from aether.rollout.machine import CommandState, Reason

_DATABASE_PAUSE_SECS = 0.5
_LOOK_SECS = 5.0
"""How long one that should have ended while no server looked is given to say so."""
_FRESH_US = 60_000_000
_SIGKILL = 9
_log = structlog.stdlib.get_logger("aether.rollout")


class ReleaseCommandRun:
    """`state`, `begun`, `ends` and `reason` are what the state machine sees of it."""

    def __init__(
        self,
        runner: Runner,
        ledger: Ledger,
        claim: Claim,
        row: DeploymentRow,
        log_tail: Callable[[str, str, int], Awaitable[list[str]]],
    ) -> None:
        self._runner = runner
        self._ledger = ledger
        self._claim = claim
        self._log_tail = log_tail
        self._instance_id = new_id()
        self._job: Job | None = None
        self._run = row.release_command
        self._taken_over = False
        command = row.processes.release
        self._command = "" if command is None else command.command
        self._timeout_secs = 0.0 if command is None else command.timeout_secs
        self.ends = 0.0
        self.reason: Reason | None = None
        self.state = CommandState.NONE if command is None else CommandState.WAITING
        if self._run is not None and self._run.ok is not None:
            self.state = CommandState.DONE if self._run.ok else CommandState.FAILED
            self.reason = Reason("release_command", f"the release command '{self._command}' failed")

    @property
    def begun(self) -> bool:
        return self._run is not None

    @property
    def took_secs(self) -> float:
        """How long the rollout had to wait for it."""
        return 0.0 if self._run is None else self._run.took_secs

    @property
    def left(self) -> Sequence[str]:
        """The instance of an earlier server that was never taken over."""
        run = self._run
        return [run.instance_id] if run is not None and run.ok is None and self._job is None else []

    async def begin(self, spec: InstanceSpec) -> None:
        """Record that it runs, unless that is on record. `carry_out` follows."""
        loop = asyncio.get_running_loop()
        if self._run is None:
            run = CommandRun(self._instance_id, now_us())
            await self._ledger.begin_command(self._claim, run, f"running the release command: {self._command}")
            self._run = run
            self.ends = loop.time() + self._timeout_secs
        else:
            self._taken_over = True
            passed = (now_us() - self._run.started_at) / 1e6
            self.ends = loop.time() + max(_LOOK_SECS, min(self._timeout_secs, self._timeout_secs - passed))
        # the machine stops it in time; its keeper does when no server is left to
        timed = replace(spec, timeout_secs=self._timeout_secs + _LOOK_SECS)
        # an old one that has left nothing on this machine may have run, before the machine or its data was another
        startable = now_us() - self._run.started_at <= _FRESH_US
        self._job = Job(self._runner.drivers, self._run.instance_id, timed if startable else None)
        self._runner.jobs.add(self._job)
        self.reason = Reason(
            "release_command_timeout",
            f"the release command '{self._command}' did not end within {self._timeout_secs:g} s",
        )
        self.state = CommandState.RUNNING

    async def carry_out(self, look_again: Callable[[], None], changed: Callable[[], None]) -> None:
        """Run it to its end and record that; `look_again` is called when the deployment is settled meanwhile."""
        if self._job is None or self._run is None:
            raise RuntimeError("the release command was not begun")
        try:
            end = await self._job.run()
            ok = end.ok and self.state is CommandState.RUNNING
            self._run = replace(self._run, ended_at=now_us(), ok=ok)
            if not ok and self.state is CommandState.RUNNING:
                self.reason = Reason("release_command", self._why(end))
            try:
                await self._record(end)
            except LostRollout:
                look_again()
            await self._clear_away(self._run.instance_id)
        except LeaseLost:
            return  # whoever runs the app now takes it over
        except Exception as error:  # noqa: BLE001 - a bug ends this rollout, never leaves it waiting for ever
            _log.error("a release command went wrong", deployment=self._claim.deployment_id, exc_info=error)
            self._run = replace(self._run, ended_at=now_us(), ok=False)
            self.reason = Reason("internal", "the release command failed for a reason that is the server's")
        self._runner.jobs.discard(self._job)
        self.state = CommandState.DONE if self._run.ok else CommandState.FAILED
        changed()

    def stop(self, grace_secs: float) -> Coroutine[Any, Any, None]:
        """End it from this moment on; `carry_out` ends by the result."""
        if self._job is None:
            raise RuntimeError("the release command was not begun")
        self.state = CommandState.STOPPING
        return self._job.stop(grace_secs)

    async def log_tail(self, lines: int) -> list[str]:
        """Its last lines, if the rollout has it to blame."""
        if self._run is None or self.state is CommandState.DONE:
            return []
        return await self._log_tail(self._run.instance_id, self._runner.app, lines)

    def _why(self, end: JobEnd) -> str:
        said = f"the release command '{self._command}' {end}"
        if self._taken_over and (end.exit is None or end.exit.signal == _SIGKILL):
            said += "; no server looked, so whether it had done its work is unknown, and it is not run again"
        return said

    async def _record(self, end: JobEnd) -> None:
        run = self._run
        if run is None:
            return
        message = f"the release command {end} after {run.took_secs:.1f} s"
        while True:
            try:
                if self.state is CommandState.RUNNING:
                    await self._ledger.end_command(self._claim, run, message)
                else:  # the deployment is settled
                    await self._ledger.set_instances(
                        self._claim.lease, self._claim.app_id, [run.instance_id], "failed"
                    )
                return
            except LostRollout:
                await self._ledger.set_instances(
                    self._claim.lease, self._claim.app_id, [run.instance_id], "stopped" if run.ok else "failed"
                )
                raise
            except ServiceUnavailable as error:
                _log.warning("a release command waits for the database", error=error.message)
                await asyncio.sleep(_DATABASE_PAUSE_SECS)

    async def _clear_away(self, instance_id: str) -> None:
        drivers = self._runner.drivers
        try:
            await drivers.runtime.remove(instance_id)
            await prune_ended(drivers, self._claim.app_id, self._runner.app, RELEASE)
        except (AetherError, OSError) as error:
            # the next start's reconciliation takes it away
            _log.warning("an ended instance could not be cleared away", instance=instance_id, error=str(error))
