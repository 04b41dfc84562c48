"""The rollout state machine against a simulated machine that crashes, stalls and forgets at random."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.model.deployment import SETTLED, DeploymentStatus, check_move
from aether.rollout.machine import (
    ArtifactState,
    Begin,
    CommandState,
    Drain,
    Fail,
    HoldOld,
    InstanceView,
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

S = DeploymentStatus
C = CommandState
BOOM = Reason("exited", "the app exited with code 1")
TRYING = (Strategy.CANARY, Strategy.BLUEGREEN)
LIVE = (Observed.STARTING, Observed.READY, Observed.DRAINING, Observed.DRAINED, Observed.STOPPING)


@dataclass
class World:
    """What really is: instances by id, the recorded statuses, the route. Only this survives a server crash."""

    strategy: Strategy
    old_runs: bool
    desired: int = 1
    deadline: float = 100.0
    now: float = 0.0
    status: DeploymentStatus = S.PENDING
    old_status: DeploymentStatus | None = None
    artifact: ArtifactState = ArtifactState.ABSENT
    held: bool = False
    old: dict[str, Observed] = field(default_factory=dict)
    new: dict[str, Observed] = field(default_factory=dict)
    route: tuple[str, ...] = ()
    counter: int = 0
    old_stopped_by_us: bool = False
    at: int = 0
    """Applied by the present server; what is on record is `reached`."""
    reached: int = 0
    step_ends: float = 0.0
    passed: bool = False
    refused: Reason | None = None
    workers: int = 0
    command: CommandState = C.NONE
    command_ok: bool | None = None
    """On record: how the release command ended; None while it has not."""
    command_starts: int = 0
    """How often it was really started."""
    command_lives: bool = False
    command_ends: float = 0.0

    def __post_init__(self) -> None:
        if self.old_runs:
            self.old_status = S.ACTIVE
            self.old = {f"old-{n}": Observed.READY for n in range(self.desired)}
            self.old |= {f"worker-old-{n}": Observed.READY for n in range(self.workers)}
            self.route = tuple(i for i in self.old if not is_worker(i))

    def view(self) -> RolloutView:
        def views(group: dict[str, Observed]) -> tuple[InstanceView, ...]:
            return tuple(
                InstanceView(i, o, i in self.route, BOOM if o is Observed.EXITED else None, process_of(i))
                for i, o in group.items()
            )

        return RolloutView(
            status=self.status,
            strategy=self.strategy,
            deadline=self.deadline,
            desired=self.desired,
            workers={"worker": self.workers} if self.workers else {},
            command=self.command,
            command_begun=self.command_starts > 0,
            command_ends=self.command_ends,
            command_reason=BOOM,
            artifact=self.artifact,
            artifact_reason=BOOM if self.artifact is ArtifactState.FAILED else None,
            old=views(self.old),
            new=views(self.new),
            old_held=self.held,
            steps={Strategy.CANARY: 3, Strategy.BLUEGREEN: 1}.get(self.strategy, 0),
            step=self.at,
            reached=self.reached,
            step_ends=self.step_ends,
            passed=self.passed,
            refused=self.refused if self.status is S.ROLLING_OUT else None,
        )

    # --- what a server does with the actions

    def step(self) -> bool:
        actions = decide(self.view(), self.now)
        for action in actions:
            self.apply(action)
            self.check()
        return bool(actions)

    def move(self, after: DeploymentStatus) -> None:
        check_move(self.status, after)
        self.status = after

    def apply(self, action: object) -> None:
        match action:
            case Verify():
                self.move(S.VERIFYING)
            case Begin():
                self.move(S.ROLLING_OUT)
            case RunCommand():
                assert self.artifact is ArtifactState.READY
                assert self.status is S.ROLLING_OUT
                assert self.command_ok is None, "the release command ran twice"
                assert not self.new, "the release command ran beside the new release"
                if not self.command_starts:
                    self.command_starts, self.command_lives = 1, True
                    self.command_ends = self.now + 60
                self.command = C.RUNNING
                if not self.command_lives:  # it ended while no server looked
                    self.end_command(ok=True)
            case StopCommand():
                assert self.status is not S.ROLLING_OUT
                self.command = C.STOPPING
            case Start(count, process):
                assert self.artifact is ArtifactState.READY
                assert self.command in (C.NONE, C.DONE), (
                    "an instance started before the release command had succeeded"
                )
                if self.strategy is Strategy.RECREATE:
                    assert not any(o in LIVE for o in self.old.values()), "recreate ran both"
                same = [i for i in self.new if process_of(i) == process]
                wanted = self.desired if process == "web" else self.workers
                assert len(same) + count <= wanted, "more instances than wanted"
                if process == "worker":
                    web = [i for i in self.new if not is_worker(i)]
                    assert len(web) >= self.desired, "a worker started before the web instances were there"
                    if self.strategy in TRYING and self.view().old and self.desired:
                        assert self.at == self.view().steps, "a worker started before the trial was over"
                assert all(o is Observed.READY for o in self.new.values()), "the batch before is not through"
                for _ in range(count):
                    self.counter += 1
                    name = f"new-{self.counter}" if process == "web" else f"worker-new-{self.counter}"
                    self.new[name] = Observed.STARTING
            case Shift(step):
                assert self.strategy in TRYING
                assert self.status is S.ROLLING_OUT
                assert self.refused is None, "a refused release got more traffic"
                assert step == max(1, self.reached) if not self.at else step == self.at + 1
                assert all(o is Observed.READY for o in self.new.values())
                self.at = self.reached = step
                self.step_ends, self.passed = self.now + 30, False
                self.route = (*(i for i in self.route if i in self.old), *(i for i in self.new if not is_worker(i)))
            case RollBack(reason):
                assert reason.message
                assert self.reached, "nothing to take back"
                self.move(S.ROLLING_BACK)
                self.leave_trial()
            case RolledBack():
                assert not any(o in LIVE for o in self.new.values()), "the rollback is not through"
                self.move(S.ROLLED_BACK)
            case Promote():
                if self.strategy in TRYING and self.old and self.desired:
                    assert self.at == self.view().steps, "traffic was not moved step by step"
                    assert self.passed or self.now >= self.step_ends
                    assert self.refused is None
                assert sum(not is_worker(i) for i in self.new) >= self.desired
                assert sum(is_worker(i) for i in self.new) >= self.workers, "promoted without its workers"
                assert self.command in (C.NONE, C.DONE)
                assert all(o is Observed.READY for o in self.new.values())
                self.route = tuple(i for i in self.route if i in self.new) or self.route
                self.fit(self.new)
                self.move(S.ACTIVE)
                if self.old_status is not None:
                    self.old_status = S.SUPERSEDED
                self.held = False
            case Route(instances):
                assert all(self.new[i] is Observed.READY for i in instances)
                assert not any(is_worker(i) for i in instances), "requests would go to a worker"
                self.route = instances
            case HoldOld():
                assert self.strategy is Strategy.RECREATE
                self.held = True
            case RestoreOld():
                assert not any(o in LIVE for o in self.new.values()), "both would run"
                self.held = False
                self.old = {f"old-again-{n}": Observed.STARTING for n in range(self.desired)}
                self.old |= {f"worker-again-{n}": Observed.STARTING for n in range(self.workers)}
            case Drain(instances):
                self.may_take_down(instances)
                self.route = tuple(i for i in self.route if i not in instances)
                self.set(instances, Observed.DRAINING)
            case Stop(instances):
                self.may_take_down(instances)
                self.set(instances, Observed.STOPPING)
                self.route = tuple(i for i in self.route if i not in instances)
            case Fail(reason):
                assert reason.message
                self.move(S.FAILED)
            case other:
                raise AssertionError(other)

    def may_take_down(self, instances: tuple[str, ...]) -> None:
        if not any(i in self.old for i in instances):
            return
        if self.strategy is Strategy.RECREATE and self.held:
            return
        routed = any(i in self.new for i in self.route)
        assert self.status is S.ACTIVE, "an old instance was taken down before the promotion"
        late = self.now >= self.deadline or not self.desired
        assert routed or late, "an old instance was taken down before the new one was routed"

    def fit(self, group: dict[str, Observed]) -> None:
        """What the app's supervisor does with its release when the app wants another number of instances."""
        web = [i for i in group if not is_worker(i)]
        for i in web[self.desired :]:
            del group[i]
        self.route = tuple(i for i in self.route if i in self.old or i in self.new)
        for _ in range(self.desired - len(web)):
            self.counter += 1
            group[f"more-{self.counter}"] = Observed.STARTING

    def set(self, instances: tuple[str, ...], observed: Observed) -> None:
        for group in (self.old, self.new):
            for i in instances:
                if i in group and group[i] is not Observed.EXITED:
                    group[i] = observed

    def check(self) -> None:
        statuses = [self.status, self.old_status]
        assert statuses.count(S.ACTIVE) <= 1, "two active releases"
        if self.strategy is not Strategy.RECREATE and self.old_runs and self.status is not S.ACTIVE:
            alive = {i for i, o in self.old.items() if o is Observed.READY and not is_worker(i)}
            assert not any(
                o in (Observed.DRAINING, Observed.STOPPING) for i, o in self.old.items() if is_worker(i)
            ), "an old worker was taken down before the promotion"
            if not self.at:
                assert set(self.route) == alive, "the old release does not serve although it could"
            assert set(self.route) >= alive, "the old release was given up before the promotion"

    def leave_trial(self) -> None:
        self.at = 0
        if self.old_runs:
            self.route = tuple(i for i in self.route if i in self.old)

    # --- what happens to it

    def happen(self, what: str) -> None:
        match what:
            case "unpacked" if self.artifact is ArtifactState.ABSENT:
                self.artifact = ArtifactState.READY
            case "unpack fails" if self.artifact is ArtifactState.ABSENT:
                self.artifact = ArtifactState.FAILED
            case "new ready":
                self.first(self.new, Observed.STARTING, Observed.READY)
            case "new exits":
                self.first(self.new, None, Observed.EXITED)
                # a promoted release is kept up by its supervisor
                if self.status is S.ACTIVE:
                    self.first(self.new, Observed.EXITED, Observed.STARTING)
            case "old exits" | "old ready":
                if what == "old exits":
                    self.first(self.old, Observed.READY, Observed.EXITED)
                elif not self.held and self.status is not S.ACTIVE:
                    self.first(self.old, Observed.EXITED, Observed.STARTING)
                    self.first(self.old, Observed.STARTING, Observed.READY)
                    trial = tuple(i for i in self.route if i in self.new)
                    if not trial or self.at:
                        old = (i for i, o in self.old.items() if o is Observed.READY and not is_worker(i))
                        self.route = (*old, *trial)
            case "drained":
                for group in (self.old, self.new):
                    self.first(group, Observed.DRAINING, Observed.DRAINED)
            case "stopped":
                for group in (self.old, self.new):
                    self.first(group, Observed.STOPPING, Observed.EXITED)
            case "command ends" | "command fails":
                if self.command in (C.RUNNING, C.STOPPING):
                    self.end_command(ok=what == "command ends" and self.command is C.RUNNING)
                else:
                    self.command_lives = False  # while no server looks
            case "cancel":
                if self.status in (S.PENDING, S.VERIFYING, S.ROLLING_OUT, S.ROLLING_BACK):
                    self.move(S.CANCELLED)
            case "good" if self.at:
                self.passed = True
            case "bad" if self.at and self.status is S.ROLLING_OUT:
                self.refused = BOOM
            case "more" | "fewer":
                self.desired = min(6, max(0, self.desired + (1 if what == "more" else -1)))
                if self.status is S.ACTIVE:
                    self.fit(self.new)
                elif self.old_runs and not self.held:
                    self.fit(self.old)
            case "time":
                self.now += 30
            case "crash":
                # the successor finds instances as they are, but knows nothing of drains and looks at the folder again
                self.artifact = ArtifactState.ABSENT
                self.refused, self.passed = None, False
                if self.command in (C.RUNNING, C.STOPPING):
                    self.command = C.WAITING
                if self.command_starts and self.status is not S.ROLLING_OUT:
                    # what a settled deployment left running, the successor removes before anything else
                    self.command, self.command_lives = C.FAILED if self.command is C.WAITING else self.command, False
                if self.status is not S.ACTIVE:
                    self.leave_trial()
                for group in (self.old, self.new):
                    for i, o in group.items():
                        if o in (Observed.DRAINING, Observed.DRAINED):
                            group[i] = Observed.READY if not self.held else Observed.EXITED
            case _:
                return
        self.route = tuple(i for i in self.route if {**self.old, **self.new}[i] is Observed.READY)

    def end_command(self, *, ok: bool) -> None:
        self.command_lives = False
        if self.status is S.ROLLING_OUT:
            self.command_ok = ok
        self.command = C.DONE if ok else C.FAILED

    def first(self, group: dict[str, Observed], before: Observed | None, after: Observed) -> None:
        for i, o in group.items():
            if o is before or (before is None and o is not Observed.EXITED):
                group[i] = after
                return


def is_worker(instance: str) -> bool:
    return instance.startswith("worker")


def process_of(instance: str) -> str:
    return "worker" if is_worker(instance) else "web"


EVENTS = [
    "unpacked", "unpack fails", "new ready", "new exits", "old exits", "old ready", "drained", "stopped", "cancel",
    "time", "crash", "decide", "more", "fewer", "good", "good", "bad",
    "command ends", "command ends", "command fails",
]  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(
    strategy=st.sampled_from(Strategy),
    old_runs=st.booleans(),
    desired=st.integers(0, 5),
    workers=st.integers(0, 3),
    command=st.booleans(),
    events=st.lists(st.sampled_from([*EVENTS, "decide", "decide", "unpacked", "new ready"]), max_size=40),
)
def test_any_interleaving_ends_settled_and_safe(
    strategy: Strategy, old_runs: bool, desired: int, workers: int, command: bool, events: list[str]
) -> None:
    world = World(strategy, old_runs, desired, workers=workers, command=C.WAITING if command else C.NONE)
    for event in events:
        if event == "decide":
            world.step()
        else:
            world.happen(event)
    # from wherever it is now: the deadline passes, everything that was begun ends, the server goes on deciding
    world.now = max(world.now, world.deadline, world.command_ends)
    for _ in range(60):
        moved = world.step()
        world.now = max(world.now, world.command_ends)
        if world.command is C.STOPPING:
            world.happen("command fails")
        if world.command is C.WAITING and world.command_starts:
            world.happen("unpacked")
        world.happen("drained")
        world.happen("stopped")
        if not moved and finished(world.view()):
            break
    assert world.status in SETTLED
    assert finished(world.view())
    assert not world.held
    assert world.command_starts <= 1
    assert not world.command_lives, "the release command outlives its rollout"
    if world.status is not S.ACTIVE:
        assert not any(o in LIVE for o in world.new.values()), "a failed rollout left an instance"
        if old_runs:
            assert world.old_status is S.ACTIVE
            assert world.old or not world.desired, "the old release is gone"
    else:
        assert not any(o in LIVE for o in world.old.values())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("desired", [0, 1, 3, 50])
@pytest.mark.parametrize("strategy", list(Strategy))
def test_the_straight_way(strategy: Strategy, desired: int, workers: int) -> None:
    world = World(strategy, True, desired, workers=workers, command=C.WAITING if workers else C.NONE)
    seen: list[DeploymentStatus] = [world.status]
    for _ in range(40 + 4 * desired):
        world.step()
        if world.status is not seen[-1]:
            seen.append(world.status)
        for event in ("unpacked", "command ends", "new ready", "drained", "stopped", "good"):
            world.happen(event)
    assert seen == [S.PENDING, S.VERIFYING, S.ROLLING_OUT, S.ACTIVE]
    assert finished(world.view())
    assert len(world.route) == desired
    assert all(i in world.new for i in world.route)
    assert sum(is_worker(i) for i in world.new) == workers
    assert world.command_starts == (1 if workers else 0)


def view(**changes: object) -> RolloutView:
    base = RolloutView(status=S.ROLLING_OUT, strategy=Strategy.ROLLING, deadline=10.0, artifact=ArtifactState.READY)
    return RolloutView(**{**{f: getattr(base, f) for f in base.__slots__}, **changes})  # type: ignore[arg-type]


def test_the_deadline_tells_what_the_instance_waited_for() -> None:
    late = InstanceView("n", Observed.STARTING, reason=Reason("never_listened", "listen on PORT"))
    assert decide(view(new=(late,)), 9.9) == ()
    assert decide(view(new=(late,)), 10.0) == (Fail(Reason("never_listened", "listen on PORT")),)


def test_every_instance_must_be_ready() -> None:
    ready, starting = InstanceView("a", Observed.READY), InstanceView("b", Observed.STARTING)
    assert decide(view(desired=2, new=(ready,)), 0) == (Start(1),)
    assert decide(view(desired=2, new=(ready, starting)), 0) == ()
    assert decide(view(desired=2, new=(ready, InstanceView("b", Observed.READY))), 0) == (Promote(),)


def test_a_release_starts_in_batches_of_a_quarter() -> None:
    started: list[int] = []
    new: tuple[InstanceView, ...] = ()
    while isinstance(action := decide(view(desired=10, new=new), 0)[0], Start):
        started.append(action.count)
        new = tuple(InstanceView(str(n), Observed.READY) for n in range(sum(started)))
    assert action == Promote()
    assert started == [3, 3, 3, 1]


def test_a_stopped_app_is_promoted_without_a_start_and_its_old_instances_go() -> None:
    assert decide(view(desired=0), 0) == (Promote(),)
    old = (InstanceView("o", Observed.READY, routed=True),)
    assert list(decide(view(status=S.ACTIVE, desired=0, old=old), 0)) == [Drain(("o",))]


def test_a_promoted_release_that_fell_over_keeps_the_old_one_serving_until_the_deadline() -> None:
    old = (InstanceView("o", Observed.READY, routed=True),)
    new = (InstanceView("n", Observed.STARTING),)
    waiting = view(status=S.ACTIVE, old=old, new=new)
    assert decide(waiting, 5) == ()
    assert wakes_at(waiting, 5) == 10.0
    assert list(decide(waiting, 10)) == [Drain(("o",))]


def test_an_interrupted_rollback_goes_on() -> None:
    trial = (InstanceView("n", Observed.READY, routed=True), InstanceView("m", Observed.STARTING))
    assert list(decide(view(status=S.ROLLING_BACK, new=trial), 99)) == [Drain(("n",)), Stop(("m",))]
    assert decide(view(status=S.ROLLING_BACK, new=(InstanceView("n", Observed.EXITED),)), 99) == (RolledBack(),)


@pytest.mark.parametrize("strategy", [Strategy.CANARY, Strategy.BLUEGREEN])
def test_a_release_on_trial_is_rolled_back_for_every_reason(strategy: Strategy) -> None:
    old = (InstanceView("o", Observed.READY, routed=True),)
    new = (InstanceView("n", Observed.READY, routed=True),)
    trial = {"strategy": strategy, "steps": 3, "step": 1, "reached": 1, "step_ends": 5.0, "old": old, "new": new}
    assert decide(view(**trial), 4) == ()
    assert wakes_at(view(**trial), 4) == 4.25
    assert decide(view(**trial, refused=BOOM), 4) == (RollBack(BOOM),)
    assert decide(view(**{**trial, "new": (InstanceView("n", Observed.EXITED, reason=BOOM),)}), 4) == (
        RollBack(BOOM),
    )
    assert isinstance(decide(view(**trial), 10)[0], RollBack), "the deadline"
    assert decide(view(**trial, passed=True), 4) == (Shift(2),)
    assert decide(view(**trial), 5) == (Shift(2),)
    assert decide(view(**{**trial, "step": 3, "reached": 3}), 5) == (Promote(),)
    assert decide(view(**{**trial, "step": 0, "reached": 2}), 4) == (Shift(2),), "a successor goes on where it was"
    # a release that nobody can be compared with
    assert decide(view(**{**trial, "step": 0, "reached": 0, "old": ()}), 4) == (Promote(),)


def test_nothing_wakes_a_finished_rollout() -> None:
    assert wakes_at(view(status=S.FAILED), 0) is None
    assert wakes_at(view(status=S.ACTIVE), 0) is None
    draining = view(status=S.ACTIVE, old=(InstanceView("o", Observed.DRAINING),))
    assert wakes_at(draining, 11) is None, "the loop would spin"


def test_a_release_command_runs_before_anything_and_has_a_time_of_its_own() -> None:
    waiting = {"command": C.WAITING, "command_ends": 0.0, "command_reason": BOOM}
    assert decide(view(**waiting), 0) == (RunCommand(),)
    assert decide(view(**waiting, artifact=ArtifactState.ABSENT), 0) == ()
    assert isinstance(decide(view(**waiting), 10)[0], Fail), "the deadline counts until it has begun"
    assert decide(view(**waiting, command_begun=True), 10) == (RunCommand(),), "it may have ended in time"
    running = view(command=C.RUNNING, command_begun=True, command_ends=20.0, command_reason=BOOM)
    assert decide(running, 19) == ()
    assert wakes_at(running, 5) == 20.0
    assert decide(running, 20) == (Fail(BOOM),)
    assert decide(view(command=C.FAILED, command_reason=BOOM), 0) == (Fail(BOOM),)
    assert decide(view(command=C.DONE), 0) == (Start(1),)


def test_a_release_command_under_way_is_stopped_with_its_deployment() -> None:
    cancelled = view(status=S.CANCELLED, command=C.RUNNING)
    assert list(decide(cancelled, 0)) == [StopCommand()]
    assert not finished(cancelled)
    assert not finished(view(status=S.CANCELLED, command=C.STOPPING))
    assert finished(view(status=S.CANCELLED, command=C.FAILED))


def test_workers_start_after_web_and_gate_the_promotion() -> None:
    web = InstanceView("w", Observed.READY)
    both = {"desired": 1, "workers": {"a": 1, "b": 2}}
    assert decide(view(**both), 0) == (Start(1),)
    assert decide(view(**both, new=(web,)), 0) == (Start(1, "a"),)
    a = InstanceView("a", Observed.STARTING, process="a")
    assert decide(view(**both, new=(web, a)), 0) == ()
    a = InstanceView("a", Observed.READY, process="a")
    assert decide(view(**both, new=(web, a)), 0) == (Start(1, "b"),)
    b = tuple(InstanceView(f"b{n}", Observed.READY, process="b") for n in range(2))
    assert decide(view(**both, new=(web, a, *b)), 0) == (Promote(),)
    dead = InstanceView("a", Observed.EXITED, reason=BOOM, process="a")
    assert decide(view(**both, new=(web, dead)), 0) == (Fail(BOOM),)
