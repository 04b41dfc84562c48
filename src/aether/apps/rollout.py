"""Carries one rollout out: shows the state machine what is there, applies what it decides, until nothing is left.

What to do is decided in `aether.rollout.machine`; what is recorded and whether it may be is the ledger's. The long
steps (unpacking, draining, stopping) run beside the loop and wake it when they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from aether.apps.launch import ReleaseLaunch
from aether.apps.ledger import DATABASE_PAUSE_SECS, Claim, Ledger, LostRollout, remaining_secs
from aether.apps.records import DeploymentError, DeploymentRow
from aether.apps.release_command import ReleaseCommandRun
from aether.apps.replica import Replica
from aether.apps.rollout_trace import RolloutTrace, traced
from aether.apps.runner import Group, Runner
from aether.leases import LeaseLost
from aether.model.deployment import SETTLED, UNDER_WAY, DeploymentStatus
from aether.model.errors import AetherError, ServiceUnavailable
from aether.model.times import now_us
from aether.model.traffic import Traffic
from aether.observability import tracing
from aether.rollout.gates import Verdict, judge, told
from aether.rollout.machine import (
    Action,
    ArtifactState,
    Begin,
    Drain,
    Fail,
    HoldOld,
    Observed,
    Promote,
    Reason,
    RestoreOld,
    RollBack,
    RolledBack,
    RolloutView,
    Route,
    RunCommand,
    Shift,
    Start,
    Stop,
    StopCommand,
    Strategy,
    Verify,
    decide,
    finished,
    wakes_at,
)

LOG_TAIL_LINES = 50
_NEVER_SERVED_GRACE_SECS = 2.0
_log = structlog.stdlib.get_logger("aether.rollout")


@dataclass(frozen=True, slots=True)
class RolloutOptions:
    """Durations in seconds."""

    drain_timeout_secs: float
    stop_grace_secs: float
    log_tail: Callable[[str, str, int], Awaitable[list[str]]]
    """(instance id, app, lines) → the app's newest lines."""
    discard: Callable[[Sequence[str]], Coroutine[Any, Any, None]]
    """Stop and forget instances that no replica has taken over."""
    prepare: Callable[[DeploymentRow], Awaitable[ReleaseLaunch]]
    """What the deployment's release runs; needs the unpacked artifact."""
    runtime_warning: Callable[[str | None], str | None]
    """What to tell about an artifact's runtime that this machine does not have exactly."""


class Rollout:
    """One deployment on its way. `released` is set once a later rollout of the app may begin."""

    def __init__(
        self,
        runner: Runner,
        ledger: Ledger,
        options: RolloutOptions,
        claim: Claim,
        row: DeploymentRow,
        *,
        adopt: Mapping[str, Sequence[str]] | None = None,
        holds: bool = False,
        after: Rollout | None = None,
    ) -> None:
        """`adopt` are the instances, by process type, that an earlier server started for this rollout; `holds` says
        that it had taken the old release down; `after` is the app's rollout before this one."""
        self._runner = runner
        self._ledger = ledger
        self._options = options
        self._claim = claim
        self.row = row
        self._status = row.status
        self._adopt = {process: list(ids) for process, ids in (adopt or {}).items()}
        self._held = holds
        self._after = after
        self._artifact = ArtifactState.ABSENT
        self._artifact_reason: Reason | None = None
        self._launch: ReleaseLaunch | None = None
        self._command = ReleaseCommandRun(runner, ledger, claim, row, options.log_tail)
        self._old: Group | None = None
        self._new: Group | None = None
        # from here on the rollout goes by a clock that does not jump
        left = remaining_secs(row.timeout_secs, row.rollout_started_at, now_us())
        self._deadline = asyncio.get_running_loop().time() + left
        self._shift = row.shift
        self._patience = row.longest_secs - row.timeout_secs
        self._step = 0
        self._step_ends = 0.0
        self._reached = row.rollout_step
        self._before_step = Traffic()
        self._counted = Traffic(), Traffic()
        """Of the new release in this step, and of the old one in all of them."""
        self._stale = False
        self._lease = claim.lease
        self._trace = RolloutTrace(row)
        self.released = asyncio.Event()
        self._wake = runner.listen()

    def look_again(self) -> None:
        """Somebody else may have written the deployment's status: take it from the record before anything else."""
        self._stale = True
        self._wake.set()

    async def run(self) -> None:
        """Return when the rollout is settled and everything it had to take down is down, or when the app's lease is
        lost: then everything stays as it is, for the server that has taken over."""
        self._trace.enter()
        try:
            if self._after is not None:
                await self._after.released.wait()
                self._after = None
            self._old = self._runner.active
            if self._status is not DeploymentStatus.PENDING:
                self._prepare()
            await self._loop()
        finally:
            self._runner.unlisten(self._wake)
            self.released.set()
        if self._lease.lost:
            return
        left = [*itertools.chain(*self._adopt.values()), *self._command.left]
        if left:  # settled before they could be taken over
            self._beside(self._options.discard(left))
        leftover = self._old if self._status is DeploymentStatus.ACTIVE else self._new
        if leftover is not None:
            self._runner.forget(leftover)

    async def _loop(self) -> None:
        while not self._lease.lost:
            self._wake.clear()
            if self._stale and not await self._reread():
                continue
            view = self._view()
            now = asyncio.get_running_loop().time()
            actions = decide(view, now)
            if actions:
                await self._apply_all(actions)
            elif finished(view):
                return
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(wakes_at(view, now)):
                        await self._wake.wait()

    def _view(self) -> RolloutView:
        passed, refused = self._judged()
        return RolloutView(
            status=self._status,
            strategy=Strategy(self.row.strategy),
            deadline=self._deadline + self._command.took_secs + (self._patience if self._reached else 0.0),
            steps=0 if self._shift is None else len(self._shift.steps),
            step=self._step,
            reached=self._reached,
            step_ends=self._step_ends,
            passed=passed,
            refused=refused,
            desired=self._runner.desired,
            workers={name: self._runner.sizes.get(name, 1) for name in self.row.processes.workers},
            command=self._command.state,
            command_begun=self._command.begun,
            command_ends=self._command.ends,
            command_reason=self._command.reason,
            artifact=self._artifact,
            artifact_reason=self._artifact_reason,
            old=self._runner.views(self._old) if self._old is not None else (),
            new=self._runner.views(self._new) if self._new is not None else (),
            old_held=self._held,
        )

    def _judged(self) -> tuple[bool, Reason | None]:
        if self._shift is None or not self._step or self._status is not DeploymentStatus.ROLLING_OUT:
            return False, None
        new, old = self._runner.traffic()
        self._counted = new.since(self._before_step), old
        verdict = judge(self._shift, *self._counted)
        return verdict is Verdict.GOOD, verdict if isinstance(verdict, Reason) else None

    async def _move_traffic(self, step: int) -> None:
        """Record first, then do: a successor may repeat a step, never miss that one was begun."""
        if self._shift is None:
            raise RuntimeError(f"{self.row.strategy} does not move traffic in steps")
        percent, secs = self._shift.steps[step - 1], self._shift.step_secs
        until = (
            f"for at most {secs:g} s" if self._shift.early else f"for {secs:g} s, with the old release standing by"
        )
        before = f"; before: {told(*self._counted)}" if self._step else ""
        await self._ledger.step(
            self._claim, step, f"{percent}% of the requests go to the new release {until}{before}"
        )
        self._step = self._reached = step
        self._runner.begin_trial(self._group(), percent)
        self._before_step, _ = self._runner.traffic()
        self._counted = Traffic(), Traffic()
        self._step_ends = asyncio.get_running_loop().time() + secs

    async def _roll_back(self, reason: Reason) -> None:
        error = await self._explained(reason)
        await self._move(DeploymentStatus.ROLLING_BACK, f"{reason.message}; the old release serves", error=error)
        self._runner.end_trial()

    async def _reread(self) -> bool:
        """False when the database is away and this must be tried again.

        A deployment that is gone with its app, or under way in other hands, ends here like a cancelled one.
        """
        try:
            recorded, ours = await self._ledger.status_of(self._claim)
        except ServiceUnavailable as error:
            _log.warning("a rollout waits for the database", deployment=self.row.id, error=error.message)
            await asyncio.sleep(DATABASE_PAUSE_SECS)
            return False
        self._stale = False
        if recorded is DeploymentStatus.ACTIVE:
            if self._status is not DeploymentStatus.ACTIVE and self._new is not None:
                self._take_over(self._new)
        elif self._status is not DeploymentStatus.ACTIVE:
            # a status of this rollout's own is one that it wrote without hearing that it was written
            stands = recorded is not None and (ours or recorded in SETTLED)
            self._status = recorded if recorded is not None and stands else DeploymentStatus.CANCELLED
            self._trace.moved(self._status)
        return True

    async def _apply_all(self, actions: Sequence[Action]) -> None:
        try:
            for action in actions:
                if not self._lease.holds:
                    _log.warning("a rollout waits for its lease", deployment=self.row.id, lease=self._lease.name)
                    await self._lease.until_holds()
                    self.look_again()
                    return
                await self._apply(action)
        except LeaseLost:
            return
        except LostRollout:
            self.look_again()
        except ServiceUnavailable as error:
            _log.warning("a rollout waits for the database", deployment=self.row.id, error=error.message)
            await asyncio.sleep(DATABASE_PAUSE_SECS)
        except Exception as error:  # noqa: BLE001 - a bug ends this rollout, never leaves it under way for ever
            _log.error("a rollout went wrong", deployment=self.row.id, exc_info=error)
            await self._give_up()

    async def _apply(self, action: Action) -> None:
        match action:
            case Verify():
                await self._move(DeploymentStatus.VERIFYING, "checking and unpacking the artifact")
                self._prepare()
            case Begin():
                warning = self._options.runtime_warning(self.row.runtime)
                notes = [("warning", warning)] if warning else []
                first = "" if self.row.processes.release is None else "the release command comes first; then "
                await self._move(DeploymentStatus.ROLLING_OUT, f"{first}starting: {self.row.command}", notes=notes)
            case RunCommand():
                await self._run_command()
            case StopCommand():
                self._beside(self._command.stop(self._options.stop_grace_secs))
            case Start(count, process):
                for _ in range(max(count, len(self._adopt.get(process, ())))):
                    self._start(process)
            case Promote():
                await self._promote()
            case Route():
                self._runner.changed()
            case HoldOld():
                self._held = True
                self._runner.hold()
            case RestoreOld():
                self._held = False
                self._runner.unhold()
            case Drain(instances):
                for replica in self._named(instances):
                    drained = replica.drain(self._options.drain_timeout_secs)
                    self._beside(traced("drain", drained, {"aether.instance": replica.instance_id}))
            case Stop(instances):
                for replica in self._named(instances):
                    served = replica.backend is not None or replica.launch.check is None
                    grace = self._options.stop_grace_secs
                    self._beside(replica.stop(grace if served else min(grace, _NEVER_SERVED_GRACE_SECS)))
            case Shift(step):
                await self._move_traffic(step)
            case RollBack(reason):
                await self._roll_back(reason)
            case RolledBack():
                await self._move(DeploymentStatus.ROLLED_BACK, "nothing of the new release is left")
            case Fail(reason):
                error = await self._explained(reason)
                await self._move(DeploymentStatus.FAILED, error.message, error=error)

    async def _give_up(self) -> None:
        reason = Reason("internal", "the rollout failed for a reason that is the server's; its log tells more")
        try:
            if self._status in UNDER_WAY:
                await self._move(
                    DeploymentStatus.FAILED, reason.message, error=DeploymentError(reason.code, reason.message)
                )
        except (AetherError, LostRollout, LeaseLost) as error:
            _log.error("a rollout's failure was not recorded yet", deployment=self.row.id, error=str(error))
            await asyncio.sleep(DATABASE_PAUSE_SECS)
            self.look_again()

    def _named(self, instances: Sequence[str]) -> list[Replica]:
        return [
            replica for group in (self._old, self._new) if group is not None for replica in group.named(instances)
        ]

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        self._runner.tasks.start(work, f"rollout of {self._runner.app}")

    async def _move(
        self, after: DeploymentStatus, message: str, *, notes: Sequence[tuple[str, str]] = (),
        error: DeploymentError | None = None,
    ) -> None:  # fmt: skip
        await self._ledger.move(self._claim, self._status, after, message, notes=notes, error=error)
        self._status = after
        self._trace.moved(after, None if error is None else error.message)

    def _prepare(self) -> None:
        self._beside(self._find_launch())

    async def _find_launch(self) -> None:
        try:
            with tracing.span("unpack", {"aether.artifact_digest": self.row.digest}):
                self._launch = await self._options.prepare(self.row)
            self._artifact = ArtifactState.READY
        except AetherError as error:
            self._artifact, self._artifact_reason = ArtifactState.FAILED, Reason(error.code, error.message)
        except OSError as error:
            self._artifact = ArtifactState.FAILED
            self._artifact_reason = Reason("unpack_failed", f"the artifact could not be unpacked: {error}")
        finally:
            if self._artifact is ArtifactState.ABSENT:
                self._artifact = ArtifactState.FAILED
            self._wake.set()

    async def _run_command(self) -> None:
        if self._launch is None or self._launch.command is None:
            raise RuntimeError("there is no release command to run")
        await self._command.begin(self._launch.command)
        self._beside(self._command.carry_out(self.look_again, self._wake.set))

    def _start(self, process: str) -> None:
        left = self._adopt.get(process)
        self._group().add(process, adopt=left.pop() if left else None)

    def _group(self) -> Group:
        if self._launch is None:
            raise RuntimeError("nothing can run before its artifact is there")
        if self._new is None:
            self._new = self._runner.make_group(self._launch)
        return self._new

    async def _promote(self) -> None:
        group = self._group()
        ready = [replica for replica in group.replicas if replica.observed is Observed.READY]
        web = [replica for replica in ready if replica.launch.check is not None]
        if web:
            slowest = max(replica.gate_secs for replica in web)
            several = f"{len(web)} instances, " if len(web) > 1 else ""
            note = f"{several}healthy {slowest:.2f} s after the start"
        else:
            note = "web is scaled to 0: none of it was started, so nothing is known of the release's health"
        ids = [replica.instance_id for replica in ready]
        with tracing.span("promote", {"aether.instances": len(ids)}):
            await self._ledger.promote(self._claim, ids, [(DeploymentStatus.ROLLING_OUT.value, note)])
        self._take_over(group)

    def _take_over(self, group: Group) -> None:
        self._held = False
        self._status = DeploymentStatus.ACTIVE
        self._trace.moved(DeploymentStatus.ACTIVE)
        self._runner.promote(group)
        self.released.set()

    async def _explained(self, reason: Reason) -> DeploymentError:
        """The reason as the record keeps it: more precise where an instance is to blame, with its last lines."""
        tail: list[str] = await self._command.log_tail(LOG_TAIL_LINES)
        if self._new is not None and self._new.replicas:
            replica = min(self._new.replicas, key=_soundness)
            if replica.observed is not Observed.READY:
                reason = await replica.explain() or reason
            tail = await self._options.log_tail(replica.instance_id, self._runner.app, LOG_TAIL_LINES)
        return DeploymentError(reason.code, reason.message, tuple(tail))


def _soundness(replica: Replica) -> int:
    """Orders replicas so that the one whose end explains most comes first."""
    return {Observed.EXITED: 0, Observed.READY: 2}.get(replica.observed, 1)
