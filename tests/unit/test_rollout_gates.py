"""What lets a release on trial have more traffic, and what takes it away."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.model.errors import BadRequest
from aether.model.traffic import Traffic
from aether.rollout.gates import Shift, Verdict, check_shift, judge
from aether.rollout.machine import Reason, Strategy

RULES = Shift()
QUICK = Traffic(1000, 0, 10.0)


@pytest.mark.parametrize(
    ("new", "old", "verdict"),
    [
        (Traffic(), QUICK, "wait"),
        (Traffic(99, 0, 0.99), QUICK, "wait"),
        (Traffic(100, 0, 1.0), QUICK, "good"),
        (Traffic(100, 1, 1.0), QUICK, "good"),
        (Traffic(100, 2, 1.0), QUICK, "error_rate"),
        (Traffic(3, 1, 0.03), QUICK, "wait"),
        (Traffic(3, 2, 0.03), QUICK, "error_rate"),  # cannot come out below 1 % of the first 100 any more
        (Traffic(100, 0, 1.6), QUICK, "latency"),
        (Traffic(100, 0, 1.49), QUICK, "good"),
        (Traffic(100, 0, 0.4), Traffic(1000, 0, 1.0), "good"),  # 4 ms instead of 1 ms is noise
        (Traffic(100, 0, 90.0), Traffic(), "good"),  # nothing to compare with
        (Traffic(100, 4, 1.0), Traffic(1000, 50, 10.0), "good"),  # no worse than what it replaces
        (Traffic(100, 6, 1.0), Traffic(1000, 50, 10.0), "error_rate"),
    ],
)
def test_verdicts(new: Traffic, old: Traffic, verdict: str) -> None:
    found = judge(RULES, new, old)
    assert (found.code if isinstance(found, Reason) else found.value) == verdict


def test_bluegreen_bakes_its_whole_time_but_sees_errors() -> None:
    rules = Shift(bake_secs=7).for_strategy(Strategy.BLUEGREEN)
    assert rules is not None
    assert (rules.steps, rules.total_secs) == ((100,), 7)
    assert judge(rules, Traffic(10_000, 0, 1.0), Traffic()) is Verdict.WAIT
    assert isinstance(judge(rules, Traffic(50, 3, 1.0), Traffic()), Reason)
    assert Shift().for_strategy(Strategy.ROLLING) is None
    assert Shift().for_strategy(Strategy.CANARY) == Shift()


@given(answers=st.integers(0, 10_000), errors=st.integers(0, 10_000))
def test_a_release_without_errors_is_never_refused_for_them_and_one_of_errors_never_passes(
    answers: int, errors: int
) -> None:
    assert not isinstance(judge(RULES, Traffic(answers, 0, 0.0), QUICK), Reason)
    if answers > 1:
        assert isinstance(judge(RULES, Traffic(answers, answers, 0.0), QUICK), Reason)
    errors = min(errors, answers)
    if judge(RULES, Traffic(answers, errors, 0.0), QUICK) is Verdict.GOOD:
        assert errors <= 0.01 * answers


@pytest.mark.parametrize(
    "change",
    [
        {"steps": ()}, {"steps": (5, 1, 100)}, {"steps": (0, 100)}, {"steps": (5, 50)}, {"steps": (5, 5, 100)},
        {"steps": (5, 101)}, {"step_secs": 0}, {"bake_secs": 1e9}, {"min_requests": 0}, {"max_error_rate": 2},
        {"max_latency_ratio": 0.5}, {"max_error_rate": float("nan")},
    ],
)  # fmt: skip
def test_rules_that_make_no_sense_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(BadRequest) as caught:
        check_shift(Shift(**change))
    assert next(iter(change)) in caught.value.message


def test_rules_survive_the_record() -> None:
    rules = Shift((10, 100), 1.5, 2.5, 7, 0.5, 3.0)
    check_shift(rules)
    assert Shift.from_json(rules.to_json()) == rules
    assert Shift.from_json("{}") == Shift()
