"""The rollout state machine: what to do next, given what is seen. Pure: no clock, no input, no output.

`decide` is asked again after every change; it names only the next steps and never remembers anything, so a rollout
can be taken up from its recorded state by any server. Applying the actions, the health gate and the records belong
to the caller. A strategy is one function in `_STRATEGIES` that says how a release goes from nothing to promoted.

The one commit point is `Promote`: before it the old release runs and gets every request that is not given to the new
one on trial (or, with recreate, is brought back), after it the new one is the app's release and `Route` may be
repeated without harm. A cancellation is a change of status that somebody else wrote (promotion and cancellation
compare and set the same field, so one of them loses); here it is seen as the status it left.

A release command runs before any instance of the new release, once: while the old release serves as ever. Workers
start when the web instances have passed (and, on trial, have had all the requests), so that a bad release never
touches a queue, and gate the promotion; the old ones are stopped after it. With recreate old and new never overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from aether.model.deployment import SETTLED, DeploymentStatus
from aether.model.processes import WEB


class Strategy(StrEnum):
    ROLLING = "rolling"
    """The new instances start beside the old ones, some at a time; traffic moves once all of them are healthy."""
    RECREATE = "recreate"
    """The old instances end before the new ones start: for apps that must never run twice."""
    CANARY = "canary"
    """Traffic moves to the new instances in steps, each judged by what they answered."""
    BLUEGREEN = "bluegreen"
    """All traffic moves at once; for a while the old instances stand by and get it back if the new ones fail."""


class Observed(StrEnum):
    """What is known of one instance."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"
    STOPPING = "stopping"
    EXITED = "exited"


class ArtifactState(StrEnum):
    ABSENT = "absent"
    READY = "ready"
    FAILED = "failed"


class CommandState(StrEnum):
    """What is known of the release command."""

    NONE = "none"
    WAITING = "waiting"
    """To be run; or begun by an earlier server, and not taken over yet (`command_begun`)."""
    RUNNING = "running"
    STOPPING = "stopping"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something did not work: a stable code and a sentence for people."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class InstanceView:
    id: str
    observed: Observed
    routed: bool = False
    reason: Reason | None = None
    """Why it ended, or why it is not ready yet."""
    process: str = WEB


@dataclass(frozen=True, slots=True)
class RolloutView:
    """Everything that a decision depends on. `deadline` is in seconds on the clock that `now` is read from."""

    status: DeploymentStatus
    strategy: Strategy
    deadline: float
    desired: int = 1
    """Of web."""
    workers: Mapping[str, int] = field(default_factory=dict[str, int])
    """How many of each worker the new release is to run."""
    command: CommandState = CommandState.NONE
    command_begun: bool = False
    """It is on record that the release command was, or is about to be, started."""
    command_ends: float = 0.0
    """When its time is over; the rollout's own deadline does not count while it runs."""
    command_reason: Reason | None = None
    """Why it failed, or fails when its time is over."""
    artifact: ArtifactState = ArtifactState.ABSENT
    artifact_reason: Reason | None = None
    old: tuple[InstanceView, ...] = ()
    new: tuple[InstanceView, ...] = ()
    old_held: bool = False
    """The old release is kept from being restarted (recreate)."""
    steps: int = 0
    """How many steps the traffic moves in; 0 for strategies that move it by the promotion."""
    step: int = 0
    """The step that this server has applied, counted from 1; 0 while the old release gets everything."""
    reached: int = 0
    """The step that is on record: a successor goes on there."""
    step_ends: float = 0.0
    """When the step's time is over."""
    passed: bool = False
    """The step was answered well enough to end before its time."""
    refused: Reason | None = None
    """Why the new release must not keep the traffic it has."""


@dataclass(frozen=True, slots=True)
class Verify:
    """pending → verifying: fetch, check and unpack the artifact."""


@dataclass(frozen=True, slots=True)
class Begin:
    """verifying → rolling_out."""


@dataclass(frozen=True, slots=True)
class RunCommand:
    """Record that the release command runs and start it, or take over the one that an earlier server started."""


@dataclass(frozen=True, slots=True)
class StopCommand:
    """End the release command."""


@dataclass(frozen=True, slots=True)
class Start:
    """Start `count` new instances and put each through its gate."""

    count: int
    process: str = WEB


@dataclass(frozen=True, slots=True)
class Shift:
    """Record a step and give the new instances its share of the requests."""

    step: int


@dataclass(frozen=True, slots=True)
class RollBack:
    """rolling_out → rolling_back: the old release gets every request again."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class RolledBack:
    """rolling_back → rolled_back: nothing of the new release is left."""


@dataclass(frozen=True, slots=True)
class Promote:
    """rolling_out → active in one transaction with the app's pointer and the old release's end; ends HoldOld."""


@dataclass(frozen=True, slots=True)
class Route:
    """Send the app's requests to exactly these instances."""

    instances: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HoldOld:
    """Nobody restarts the old release until this rollout has ended."""


@dataclass(frozen=True, slots=True)
class RestoreOld:
    """Undo HoldOld: the old release is to run and serve again."""


@dataclass(frozen=True, slots=True)
class Drain:
    """No new requests to these; those under way may end."""

    instances: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    instances: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fail:
    reason: Reason


Action = (
    Verify
    | Begin
    | RunCommand
    | StopCommand
    | Start
    | Shift
    | Promote
    | Route
    | HoldOld
    | RestoreOld
    | Drain
    | Stop
    | Fail
    | RollBack
    | RolledBack
)

BATCHES = 4
GATE_INTERVAL_SECS = 0.25
"""How often a step is looked at."""
INTERRUPTED = Reason("rollout_interrupted", "the rollout was interrupted and cannot go on")


def decide(view: RolloutView, now: float) -> Sequence[Action]:
    """The next actions, in the order to apply them; empty means wait for a change (see `finished`)."""
    match view.status:
        case DeploymentStatus.PENDING:
            return _ended_early(view, now) or (Verify(),)
        case DeploymentStatus.VERIFYING:
            return _ended_early(view, now) or _verifying(view)
        case DeploymentStatus.ROLLING_OUT:
            return _rolling_out(view, now)
        case DeploymentStatus.ROLLING_BACK:
            return _take_down(view.new) if _live(view.new) else (RolledBack(),)
        case DeploymentStatus.ACTIVE:
            return _promoted(view, now)
        case _:
            return _abandoned(view)


def finished(view: RolloutView) -> bool:
    """True when nothing is left to do or to wait for."""
    if view.status not in SETTLED:
        return False
    if view.status is DeploymentStatus.ACTIVE:
        return not _live(view.old)
    return not _live(view.new) and not view.old_held and not _commanded(view)


def wakes_at(view: RolloutView, now: float) -> float | None:
    """When `decide` must be asked again even if nothing changes; None if never, always later than `now`."""
    if finished(view):
        return None
    if view.status is DeploymentStatus.ROLLING_OUT and view.step:
        return now + GATE_INTERVAL_SECS
    ends = view.command_ends if view.command is CommandState.RUNNING else view.deadline
    return ends if ends > now else None


def _ended_early(view: RolloutView, now: float) -> Sequence[Action]:
    if now >= view.deadline:
        return (_undo(view, _why_late(view)),)
    return ()


def _undo(view: RolloutView, reason: Reason) -> Action:
    """A release that has had traffic is rolled back, one that has not has failed."""
    return RollBack(reason) if view.step or view.reached else Fail(reason)


def _why_late(view: RolloutView) -> Reason:
    for instance in view.new:
        if instance.reason is not None:
            return instance.reason
    if view.artifact is not ArtifactState.READY:
        return Reason("rollout_timeout", "the artifact was not unpacked before the rollout's deadline")
    return Reason("rollout_timeout", "the rollout did not end before its deadline")


def _verifying(view: RolloutView) -> Sequence[Action]:
    match view.artifact:
        case ArtifactState.READY:
            return (Begin(),)
        case ArtifactState.FAILED:
            return (Fail(view.artifact_reason or INTERRUPTED),)
        case ArtifactState.ABSENT:
            return ()


def _rolling_out(view: RolloutView, now: float) -> Sequence[Action]:
    if view.command is CommandState.FAILED:
        return (Fail(view.command_reason or INTERRUPTED),)
    if _commanded(view):
        return (Fail(view.command_reason or INTERRUPTED),) if now >= view.command_ends else ()
    # one that was begun is taken over first: it may have ended in time while no server looked
    taking_over = view.command is CommandState.WAITING and view.command_begun
    if not taking_over and (ended := _ended_early(view, now)):
        return ended
    match view.artifact:
        case ArtifactState.READY:
            if view.command is CommandState.WAITING:
                return (RunCommand(),)
            return _STRATEGIES[view.strategy](view, now)
        case ArtifactState.FAILED:
            return (_undo(view, view.artifact_reason or INTERRUPTED),)
        case ArtifactState.ABSENT:
            return ()  # taken up again after a restart: the folder is being looked at


def _rolling(view: RolloutView, now: float) -> Sequence[Action]:
    return _until_ready(view) or (() if _gated(view) else _workers_or_promote(view))


def _workers_or_promote(view: RolloutView) -> Sequence[Action]:
    """What is left when the web instances have passed; everything that was started is ready."""
    for process, wanted in sorted(view.workers.items()):
        missing = wanted - _count(view.new, process)
        if missing > 0:
            return (Start(min(missing, batch(wanted)), process),)
    return (Promote(),)


def _shifting(view: RolloutView, now: float) -> Sequence[Action]:
    if view.refused is not None:
        return (RollBack(view.refused),)
    if (waiting := _until_ready(view)) or _gated(view):
        return waiting
    if not view.old or not view.desired:
        return _workers_or_promote(view)  # nobody to take traffic from, or no traffic to take
    if not view.step:
        return (Shift(max(1, view.reached)),)
    if not view.passed and now < view.step_ends:
        return ()
    return (Shift(view.step + 1),) if view.step < view.steps else _workers_or_promote(view)


def _gated(view: RolloutView) -> bool:
    return any(instance.observed is not Observed.READY for instance in view.new)


def _until_ready(view: RolloutView) -> Sequence[Action]:
    """What brings the new web instances up; empty when all are there, or are to be waited for (see `_gated`)."""
    for instance in view.new:
        if instance.observed is Observed.EXITED:
            return (_undo(view, instance.reason or INTERRUPTED),)
    if _gated(view):
        return ()
    missing = view.desired - _count(view.new, WEB)
    return (Start(min(missing, batch(view.desired))),) if missing > 0 else ()


def batch(desired: int) -> int:
    """How many instances start at once: a quarter, so that a bad release shows before all of it has been started."""
    return -(-desired // BATCHES)


def _recreate(view: RolloutView, now: float) -> Sequence[Action]:
    if not view.new:
        if view.old and not view.old_held:
            return (HoldOld(),)
        if _live(view.old):
            return _retire(view.old)
    return _rolling(view, now)


_STRATEGIES: dict[Strategy, Callable[[RolloutView, float], Sequence[Action]]] = {
    Strategy.ROLLING: _rolling,
    Strategy.RECREATE: _recreate,
    Strategy.CANARY: _shifting,
    Strategy.BLUEGREEN: _shifting,
}


def _promoted(view: RolloutView, now: float) -> Sequence[Action]:
    if not view.desired:
        return _retire(view.old)
    web = [instance for instance in view.new if instance.process == WEB]
    routed = any(instance.routed for instance in web)
    ready = tuple(instance.id for instance in web if instance.observed is Observed.READY)
    if not routed and ready:
        return (Route(ready),)
    if not routed and now < view.deadline:
        return ()  # the release's supervisor is bringing it back; the old instances serve until then
    return _retire(view.old)


def _abandoned(view: RolloutView) -> Sequence[Action]:
    actions: list[Action] = list(_take_down(view.new))
    if view.command is CommandState.RUNNING:
        actions.append(StopCommand())
    if view.old_held and _live(view.old):
        actions.extend(_retire(view.old))  # half taken down already: it comes back as a whole
    elif view.old_held and not _live(view.new):
        actions.append(RestoreOld())
    return actions


def _take_down(instances: Sequence[InstanceView]) -> Sequence[Action]:
    """End instances that are not wanted any more; those that get requests are drained first."""
    busy = (Observed.DRAINING, Observed.STOPPING, Observed.EXITED)
    drain = tuple(i.id for i in instances if i.routed and i.observed is Observed.READY)
    stop = tuple(i.id for i in instances if i.id not in drain and i.observed not in busy)
    actions: list[Action] = []
    if drain:
        actions.append(Drain(drain))
    if stop:
        actions.append(Stop(stop))
    return actions


def _retire(instances: Sequence[InstanceView]) -> Sequence[Action]:
    drain = tuple(i.id for i in instances if i.observed in (Observed.STARTING, Observed.READY))
    stop = tuple(i.id for i in instances if i.observed is Observed.DRAINED)
    actions: list[Action] = []
    if drain:
        actions.append(Drain(drain))
    if stop:
        actions.append(Stop(stop))
    return actions


def _commanded(view: RolloutView) -> bool:
    """Whether the release command is somewhere between its start and its end."""
    return view.command in (CommandState.RUNNING, CommandState.STOPPING)


def _count(instances: Sequence[InstanceView], process: str) -> int:
    return sum(instance.process == process for instance in instances)


def _live(instances: Sequence[InstanceView]) -> bool:
    return any(instance.observed is not Observed.EXITED for instance in instances)
