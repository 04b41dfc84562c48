"""The rollout state machine: what to do next, given what is seen. Pure: no clock, no input, no output.

`decide` is asked again after every change; it names only the next steps and never remembers anything, so a rollout
can be taken up from its recorded state by any server. Applying the actions, the health gate and the records belong
to the caller. A strategy is one function in `_STRATEGIES` that says how a release goes from nothing to promoted.

The one commit point is `Promote`: before it the old release serves (or, with recreate, is brought back), after it
the new one is the app's release and `Route` may be repeated without harm. A cancellation is a change of status that
somebody else wrote (promotion and cancellation compare and set the same field, so one of them loses); here it is
seen as the status it left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from aether.model.deployment import SETTLED, DeploymentStatus


class Strategy(StrEnum):
    ROLLING = "rolling"
    """The new instances start beside the old ones, some at a time; traffic moves once all of them are healthy."""
    RECREATE = "recreate"
    """The old instances end before the new ones start: for apps that must never run twice."""


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


@dataclass(frozen=True, slots=True)
class RolloutView:
    """Everything that a decision depends on. `deadline` is in seconds on the clock that `now` is read from."""

    status: DeploymentStatus
    strategy: Strategy
    deadline: float
    desired: int = 1
    artifact: ArtifactState = ArtifactState.ABSENT
    artifact_reason: Reason | None = None
    old: tuple[InstanceView, ...] = ()
    new: tuple[InstanceView, ...] = ()
    old_held: bool = False
    """The old release is kept from being restarted (recreate)."""


@dataclass(frozen=True, slots=True)
class Verify:
    """pending → verifying: fetch, check and unpack the artifact."""


@dataclass(frozen=True, slots=True)
class Begin:
    """verifying → rolling_out."""


@dataclass(frozen=True, slots=True)
class Start:
    """Start `count` new instances and put each through the health gate."""

    count: int


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


Action = Verify | Begin | Start | Promote | Route | HoldOld | RestoreOld | Drain | Stop | Fail

BATCHES = 4
INTERRUPTED = Reason("rollout_interrupted", "the rollout was interrupted and cannot go on")


def decide(view: RolloutView, now: float) -> Sequence[Action]:
    """The next actions, in the order to apply them; empty means wait for a change (see `finished`)."""
    match view.status:
        case DeploymentStatus.PENDING:
            return _ended_early(view, now) or (Verify(),)
        case DeploymentStatus.VERIFYING:
            return _ended_early(view, now) or _verifying(view)
        case DeploymentStatus.ROLLING_OUT:
            return _ended_early(view, now) or _rolling_out(view)
        case DeploymentStatus.ROLLING_BACK:
            return (Fail(INTERRUPTED),)
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
    return not _live(view.new) and not view.old_held


def wakes_at(view: RolloutView, now: float) -> float | None:
    """When `decide` must be asked again even if nothing changes; None if never, always later than `now`."""
    if finished(view) or view.deadline <= now:
        return None
    return view.deadline


def _ended_early(view: RolloutView, now: float) -> Sequence[Action]:
    if now >= view.deadline:
        return (Fail(_why_late(view)),)
    return ()


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


def _rolling_out(view: RolloutView) -> Sequence[Action]:
    match view.artifact:
        case ArtifactState.READY:
            return _STRATEGIES[view.strategy](view)
        case ArtifactState.FAILED:
            return (Fail(view.artifact_reason or INTERRUPTED),)
        case ArtifactState.ABSENT:
            return ()  # taken up again after a restart: the folder is being looked at


def _rolling(view: RolloutView) -> Sequence[Action]:
    for instance in view.new:
        if instance.observed is Observed.EXITED:
            return (Fail(instance.reason or INTERRUPTED),)
    if any(instance.observed is not Observed.READY for instance in view.new):
        return ()
    missing = view.desired - len(view.new)
    if missing > 0:
        return (Start(min(missing, batch(view.desired))),)
    return (Promote(),)


def batch(desired: int) -> int:
    """How many instances start at once: a quarter, so that a bad release shows before all of it has been started."""
    return -(-desired // BATCHES)


def _recreate(view: RolloutView) -> Sequence[Action]:
    if not view.new:
        if view.old and not view.old_held:
            return (HoldOld(),)
        if _live(view.old):
            return _retire(view.old)
    return _rolling(view)


_STRATEGIES: dict[Strategy, Callable[[RolloutView], Sequence[Action]]] = {
    Strategy.ROLLING: _rolling,
    Strategy.RECREATE: _recreate,
}


def _promoted(view: RolloutView, now: float) -> Sequence[Action]:
    if not view.desired:
        return _retire(view.old)
    routed = any(instance.routed for instance in view.new)
    ready = tuple(instance.id for instance in view.new if instance.observed is Observed.READY)
    if not routed and ready:
        return (Route(ready),)
    if not routed and now < view.deadline:
        return ()  # the release's supervisor is bringing it back; the old instances serve until then
    return _retire(view.old)


def _abandoned(view: RolloutView) -> Sequence[Action]:
    actions: list[Action] = []
    doomed = tuple(i.id for i in view.new if i.observed not in (Observed.STOPPING, Observed.EXITED))
    if doomed:
        actions.append(Stop(doomed))
    if view.old_held and _live(view.old):
        actions.extend(_retire(view.old))  # half taken down already: it comes back as a whole
    elif view.old_held and not _live(view.new):
        actions.append(RestoreOld())
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


def _live(instances: Sequence[InstanceView]) -> bool:
    return any(instance.observed is not Observed.EXITED for instance in instances)
