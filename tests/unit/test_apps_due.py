"""When a cron process is due: no storm, nothing twice, nothing while one runs, whatever the clock does."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from aether.apps.due import LATE_US, MISSED, STILL_RUNNING, CronState, Decision, due, following
from aether.model.schedule import Schedule

MINUTE = 60_000_000
BEGIN = 1_767_225_600_000_000  # 2026-01-01T00:00:00Z
FIVE = CronState(Schedule("*/5 * * * *"), BEGIN)


def test_a_moment_is_run_when_it_comes_and_then_decided() -> None:
    assert due(FIVE, BEGIN + 5 * MINUTE - 1) == Decision(BEGIN)
    at = BEGIN + 5 * MINUTE
    assert due(FIVE, at) == Decision(at, at)
    after = replace(FIVE, considered=at)
    assert due(after, at + 1) == Decision(at)
    assert following(after, at) == BEGIN + 10 * MINUTE


def test_of_many_missed_moments_the_newest_is_run_once() -> None:
    now = BEGIN + 3 * 1440 * MINUTE + 2 * MINUTE
    newest = now - 2 * MINUTE
    assert due(FIVE, now) == Decision(newest, newest)
    assert due(replace(FIVE, make_up=False), now) == Decision(newest, newest, MISSED)
    assert due(replace(FIVE, make_up=False), newest + LATE_US) == Decision(newest, newest), "late, but not missed"


def test_nothing_starts_beside_a_run_under_way() -> None:
    at = BEGIN + 5 * MINUTE
    assert due(replace(FIVE, running=True), at) == Decision(at, at, STILL_RUNNING)


def test_a_clock_that_was_set_back_goes_on_from_there() -> None:
    ahead = replace(FIVE, considered=BEGIN + 600 * MINUTE)
    assert due(ahead, BEGIN + 2 * MINUTE) == Decision(BEGIN + 2 * MINUTE)
    assert due(replace(FIVE, considered=BEGIN + 1), BEGIN) == Decision(BEGIN + 1), "a little is no jump"


@given(
    expression=st.sampled_from(["* * * * *", "*/5 * * * *", "30 2 * * *", "0 0 1 * *"]),
    zone=st.sampled_from(["UTC", "Europe/Berlin"]),
    make_up=st.booleans(),
    steps=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 3 * MINUTE), st.integers(-2000 * MINUTE, 90_000 * MINUTE)),
            st.booleans(),
        ),
        max_size=40,
    ),
)
def test_looks_at_any_times_never_run_a_moment_twice(
    expression: str, zone: str, make_up: bool, steps: list[tuple[int, bool]]
) -> None:
    state = CronState(Schedule(expression, zone), BEGIN, make_up=make_up)
    now, recorded = BEGIN, set[int]()
    for jump, running in steps:
        now = max(0, now + jump)
        before = state.considered
        decision = due(replace(state, running=running), now)
        at = decision.scheduled_at
        if at is not None:
            assert before < at <= now
            assert state.schedule.latest(at, now) is None, "a newer moment was passed over"
            if running:
                assert decision.skipped
            if now - at > LATE_US and not make_up:
                assert decision.skipped
            recorded.add(at)  # a moment that is there already is not run: the record refuses it
        if jump >= 0:
            assert decision.considered >= before
        state = replace(state, considered=decision.considered)
        again = due(state, now)
        assert again.scheduled_at is None, "the same look found another moment"
        upcoming = following(state, now)
        assert upcoming is None or upcoming > now
    assert len(recorded) <= len(steps)
