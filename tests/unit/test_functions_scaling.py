"""The autoscaler's decisions: single rules, and what holds for any load, against a simulated function."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from aether.functions.backoff import CAP_SECS, FIRST_SECS, Backoff
from aether.functions.load import Load
from aether.functions.scaling import (
    Decision,
    Drain,
    InstanceView,
    Memory,
    Phase,
    Rules,
    Start,
    State,
    decide,
    wave,
)

NOW = 1000.0


def steady(requests: float, secs: int = 61, now: float = NOW) -> Load:
    load = Load()
    for second in range(secs):
        load = load.measured(now - secs + 1 + second, requests)
    return load


def ready(
    count: int, in_flight: int = 1, idle_since: float | None = None, *, outdated: bool = False
) -> list[InstanceView]:
    prefix = "old" if outdated else "i"
    return [InstanceView(f"{prefix}{n}", Phase.READY, in_flight, idle_since, outdated) for n in range(count)]


def starting(count: int) -> list[InstanceView]:
    return [InstanceView(f"s{n}", Phase.STARTING) for n in range(count)]


def started(decision: Decision) -> int:
    return sum(action.count for action in decision.actions if isinstance(action, Start))


def drained(decision: Decision) -> list[str]:
    return [action.id for action in decision.actions if isinstance(action, Drain)]


# --- single rules


def test_nothing_is_done_for_a_function_that_nobody_calls() -> None:
    assert decide(State(Rules(), load=steady(0.0)), NOW).actions == ()
    assert decide(State(Rules()), NOW).actions == (), "nor where nothing is measured"


def test_a_wave_is_as_large_as_the_callers_need_and_counts_what_is_under_way() -> None:
    assert wave(0, 0, 0, 10) == 0
    assert wave(1, 0, 0, 10) == 1
    assert wave(1000, 0, 0, 10) == 100
    assert wave(1000, 0, 100, 10) == 0
    assert wave(25, 10, 1, 10) == 1
    assert wave(5, 10, 0, 10) == 0


def test_callers_of_a_function_without_instances_get_one_wave() -> None:
    state = State(Rules(concurrency=10, max_instances=10), waiting=25)
    first = decide(state, NOW)
    assert first.actions == (Start(3),)
    again = decide(replace(state, instances=starting(3), waiting=29, memory=first.memory), NOW + 1)
    assert again.actions == ()
    assert decide(replace(state, waiting=1000), NOW).actions == (Start(10),), "never more than the maximum"
    assert decide(replace(state, waiting=1000, instances=ready(7)), NOW).actions == (Start(3),)


def test_up_when_the_average_is_above_the_target() -> None:
    rules = Rules(target=3.0)
    assert decide(State(rules, ready(2), load=steady(6.0)), NOW).actions == ()
    assert decide(State(rules, ready(2), load=steady(6.1)), NOW).actions == (Start(1),)
    assert decide(State(rules, [*ready(2), *starting(1)], load=steady(6.1)), NOW).actions == ()
    assert decide(State(replace(rules, max_instances=2), ready(2), load=steady(60)), NOW).actions == ()


def test_the_target_is_never_above_what_an_instance_bears() -> None:
    assert decide(State(Rules(concurrency=1), ready(1), load=steady(2.0)), NOW).actions == (Start(1),)


def test_load_of_the_past_starts_nothing() -> None:
    load = steady(30.0, secs=50, now=NOW - 8)
    for second in range(8):
        load = load.measured(NOW - 7 + second, 0.0)
    assert decide(State(Rules(), ready(2, 0, NOW - 8), load=load), NOW).actions == ()


def test_panic_goes_up_at_once_and_not_down_for_a_stable_window() -> None:
    load = steady(1.0)
    for second in range(6):
        load = load.measured(NOW - 5 + second, 30.0)
    first = decide(State(Rules(max_instances=20), ready(1), load=load), NOW)
    assert first.in_panic
    assert started(first) > 5, "the stable window would want fewer"
    later = State(Rules(), ready(4, 0, NOW), load=steady(0.0, now=NOW + 59), memory=first.memory)
    assert decide(later, NOW + 59) == Decision((), replace(first.memory, wanted=((NOW + 59, 0),), size=4), True)
    over = decide(replace(later, load=steady(0.0, now=NOW + 61)), NOW + 61)
    assert not over.in_panic
    assert len(drained(over)) == 2


def test_down_to_what_is_wanted_at_most_by_half_and_the_idle_first() -> None:
    instances = [*ready(6, 2), InstanceView("z", Phase.READY, 0, NOW - 5), InstanceView("a", Phase.READY, 0, NOW - 9)]
    assert drained(decide(State(Rules(), instances, load=steady(3.0)), NOW)) == ["a", "z", "i0", "i1"]
    assert drained(decide(State(Rules(), instances, load=steady(18.0)), NOW)) == ["a", "z"]
    assert drained(decide(State(Rules(min_instances=7), instances, load=steady(0.0)), NOW)) == ["a"]
    callers = State(Rules(), instances, load=steady(3.0), waiting=1)
    assert drained(decide(callers, NOW)) == [], "not while somebody waits"


def test_what_starts_goes_before_what_serves() -> None:
    assert drained(decide(State(Rules(), [*ready(2), *starting(2)], load=steady(3.0)), NOW)) == ["s0", "s1"]


def test_what_was_wanted_within_the_idle_time_is_kept() -> None:
    memory = Memory(4, wanted=((NOW - 29, 4),))
    assert drained(decide(State(Rules(), ready(4), load=steady(3.0), memory=memory), NOW)) == []
    assert len(drained(decide(State(Rules(), ready(4), load=steady(3.0, now=NOW + 2), memory=memory), NOW + 2))) == 2


def test_an_idle_instance_goes_after_30_s_and_the_last_after_5_minutes() -> None:
    busy_once = Memory(2, wanted=((NOW - 29, 2),))

    def gone(count: int, idle: float, **rules: int) -> list[str]:
        return drained(
            decide(State(Rules(**rules), ready(count, 0, NOW - idle), load=steady(0.0), memory=busy_once), NOW)
        )

    assert gone(2, 30.0) == []
    assert gone(2, 30.1) == ["i0"], "whatever the stable window still wants"
    assert gone(1, 300.0) == []
    assert gone(1, 300.1) == ["i0"]
    assert gone(1, 1000.0, min_instances=1) == []
    assert gone(2, 1000.0, min_instances=2) == []


def test_the_minimum_is_kept_and_no_more_than_the_maximum() -> None:
    assert decide(State(Rules(min_instances=2), load=steady(0.0)), NOW).actions == (Start(2),)
    assert decide(State(Rules(min_instances=2), ready(1), load=steady(0.0)), NOW).actions == (Start(1),)
    assert decide(State(Rules(min_instances=2)), NOW).actions == (Start(2),), "whatever is measured"
    assert len(drained(decide(State(Rules(max_instances=3), ready(4, 3), load=steady(12.0)), NOW))) == 1


def test_a_missing_metric_holds_the_last_size() -> None:
    memory = Memory(3)
    old = steady(30.0, now=NOW - 10)
    assert decide(State(Rules(), ready(3, 0, NOW - 500), load=old, memory=memory), NOW) == Decision((), memory)
    lost = decide(State(Rules(), ready(1), load=old, memory=memory), NOW)
    assert (lost.actions, lost.memory.size) == ((Start(2),), 3)
    found = decide(State(Rules(), ready(2)), NOW)
    assert found.memory.size == 2
    assert decide(State(Rules(), ready(1), memory=found.memory), NOW + 1).actions == (Start(1),)


def test_instances_of_old_code_go_as_those_of_the_new_are_ready() -> None:
    old, rules, load = ready(3, 3, outdated=True), Rules(max_instances=3), steady(9.0)
    first = decide(State(rules, old, load=load), NOW)
    assert first.actions == (Start(3),)
    assert decide(State(rules, [*old, *starting(3)], load=load, memory=first.memory), NOW).actions == ()
    half = [*old, *ready(2), *starting(1)]
    assert drained(decide(State(rules, half, load=load, memory=first.memory), NOW)) == ["old0", "old1"]
    idle = State(Rules(), ready(1, 0, NOW, outdated=True), load=steady(0.0))
    assert drained(decide(idle, NOW)) == ["old0"], "the next caller gets the new code"
    assert drained(decide(replace(idle, instances=[replace(it, outdated=True) for it in starting(2)]), NOW)) == [
        "s0",
        "s1",
    ]


# --- crash loops


def test_failures_double_the_pause_up_to_a_cap_and_a_good_run_ends_them() -> None:
    backoff, now, pauses = Backoff(), 0.0, list[float]()
    for _ in range(12):
        backoff = backoff.failed(now)
        assert backoff.failed(now) == backoff, "those that were started together count once"
        pauses.append(backoff.until - now)
        now = backoff.until
    assert pauses[:4] == [FIRST_SECS, 2, 4, 8]
    assert pauses[-1] == CAP_SECS
    assert backoff.ran(59.0) == backoff
    assert backoff.ran(60.0) == Backoff()


def test_while_instances_fail_one_is_tried_after_each_pause() -> None:
    backoff = Backoff().failed(NOW)
    state = State(Rules(), waiting=100, backoff=backoff)
    held = decide(state, NOW + 0.5)
    assert (held.actions, held.backing_off) == ((), True)
    assert decide(state, NOW + 1).actions == (Start(1),)
    assert decide(replace(state, instances=starting(1)), NOW + 2).actions == ()
    assert decide(replace(state, backoff=backoff.ran(60)), NOW + 2).actions == (Start(10),)


# --- any load


@dataclass
class Function:
    """A function whose load is spread evenly, with starts and drains that take their time."""

    rules: Rules
    start_secs: int
    now: float = NOW
    instances: dict[str, InstanceView] = field(default_factory=dict[str, InstanceView])
    since: dict[str, float] = field(default_factory=dict[str, float])
    load: Load = field(default_factory=Load)
    memory: Memory = field(default_factory=Memory)
    waiting: int = 0
    made: int = 0

    def tick(self, requests: int, *, measured: bool = True) -> Decision:
        self.now += 1
        for name, it in list(self.instances.items()):
            if it.phase is Phase.STARTING and self.now - self.since[name] >= self.start_secs:
                self.instances[name] = InstanceView(name, Phase.READY, 0, self.now)
            elif it.phase is Phase.DRAINING:
                del self.instances[name]
        self._spread(requests)
        if measured:
            self.load = self.load.measured(self.now, requests)
        before = self.instances.copy()
        decision = decide(
            State(self.rules, list(before.values()), self.waiting, self.load, Backoff(), self.memory), self.now
        )
        self.memory = decision.memory
        for action in decision.actions:
            if isinstance(action, Drain):
                self.instances[action.id] = replace(before[action.id], phase=Phase.DRAINING)
            else:
                for _ in range(action.count):
                    self.made += 1
                    name = f"{self.made:06}"
                    self.instances[name], self.since[name] = InstanceView(name, Phase.STARTING), self.now
        self._check(before, decision)
        return decision

    def _spread(self, requests: int) -> None:
        serving = [it for it in self.instances.values() if it.phase is Phase.READY]
        served = min(requests, len(serving) * self.rules.concurrency)
        self.waiting = requests - served
        for n, it in enumerate(serving):
            share = served // len(serving) + (n < served % len(serving))
            idle = None if share else (self.now if it.idle_since is None else it.idle_since)
            self.instances[it.id] = replace(it, in_flight=share, idle_since=idle)

    def _check(self, before: dict[str, InstanceView], decision: Decision) -> None:
        rules = self.rules
        alive = [it for it in before.values() if it.phase is not Phase.DRAINING]
        gone, new = len(drained(decision)), started(decision)
        assert self.size <= rules.max_instances
        assert self.size >= rules.min_instances
        assert not (gone and new), "never up and down at once"
        if gone:
            assert not decision.in_panic
            assert not self.waiting
            assert len(alive) == 1 or gone <= len(alive) // 2
            assert all(before[name].phase is not Phase.DRAINING for name in drained(decision))
        if new and self.waiting == 0 and len(alive) >= rules.min_instances:
            assert self.load.is_fresh(self.now)

    @property
    def size(self) -> int:
        return sum(it.phase is not Phase.DRAINING for it in self.instances.values())


LIMITS = st.tuples(st.integers(0, 3), st.integers(3, 12)).flatmap(
    lambda bounds: st.builds(
        Rules, concurrency=st.integers(1, 12), target=st.sampled_from([1.0, 2.5, 3.0, 7.0]),
        min_instances=st.just(bounds[0]), max_instances=st.just(bounds[1]),
    )
)  # fmt: skip
TRACES = st.lists(st.tuples(st.integers(1, 45), st.integers(0, 60)), max_size=6)
"""So many seconds with so many requests at once."""


@settings(max_examples=25)
@given(rules=LIMITS, start_secs=st.integers(1, 8), trace=TRACES, last=st.integers(0, 50))
def test_any_load_keeps_the_bounds_and_a_constant_one_comes_to_rest_at_what_it_wants(
    rules: Rules, start_secs: int, trace: list[tuple[int, int]], last: int
) -> None:
    function = Function(rules, start_secs)
    for secs, requests in trace:
        for _ in range(secs):
            function.tick(requests)
    for _ in range(200 if last else 440):
        function.tick(last)
    wanted = -(-last // rules.per_instance) if last else 0
    assert function.size == min(max(wanted, rules.min_instances), rules.max_instances)
    for _ in range(30):
        assert function.tick(last).actions == (), "no flapping"


@settings(max_examples=15)
@given(rules=LIMITS, trace=TRACES, gaps=st.lists(st.booleans(), min_size=30, max_size=60))
def test_seconds_that_are_not_measured_never_cost_an_instance(
    rules: Rules, trace: list[tuple[int, int]], gaps: list[bool]
) -> None:
    function = Function(rules, 2)
    for secs, requests in trace:
        for n in range(secs):
            function.tick(requests, measured=gaps[n % len(gaps)])
    for _ in range(5):
        function.tick(0, measured=False)
    before = function.size
    for _ in range(40):
        assert drained(function.tick(0, measured=False)) == []
    assert function.size >= before


@given(callers=st.lists(st.integers(0, 40), min_size=1, max_size=30), concurrency=st.integers(1, 10))
def test_callers_that_keep_coming_never_double_a_wave(callers: list[int], concurrency: int) -> None:
    waiting = asked = 0
    for more in callers:
        waiting += more
        asked += wave(waiting, 0, asked, concurrency)
        assert asked == -(-waiting // concurrency)


@settings(max_examples=25)
@given(rules=LIMITS, requests=st.integers(1, 60))
def test_a_first_call_is_answered_by_one_wave_however_long_the_start_takes(rules: Rules, requests: int) -> None:
    function = Function(replace(rules, min_instances=0), 30)
    starts = [started(function.tick(requests)) for _ in range(25)]
    assert starts == [min(rules.max_instances, -(-requests // rules.per_instance)), *[0] * 24]
