"""When the keeper starts a helper again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aether.runtimes.process.shim.restarts import Restarts


def test_at_once_then_after_longer_pauses() -> None:
    restarts, now = Restarts(), 100.0
    waited: list[float] = []
    for _ in range(12):
        restarts.begun("dialer", now)
        restarts.ended("dialer", now)
        due = restarts.next()
        assert due is not None
        waited.append(round(due - now, 3))
        now = due
        assert restarts.take(now) == ["dialer"]
        assert restarts.take(now) == []
    assert waited == [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]


def test_one_that_lived_long_begins_anew_and_helpers_do_not_share() -> None:
    restarts = Restarts()
    for _ in range(5):
        restarts.begun("dialer", 0.0)
        restarts.ended("dialer", 0.0)
        restarts.take(1e9)
    restarts.begun("dialer", 10.0)
    restarts.ended("dialer", 70.0)
    assert restarts.next() == 70.0
    restarts.begun("egress", 70.0)
    restarts.ended("egress", 70.5)
    assert sorted(restarts.take(70.5)) == ["dialer", "egress"]
    assert restarts.next() is None


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.floats(0, 100)), max_size=50))
def test_nothing_is_due_before_it_ended_or_later_than_the_longest_pause(ends: list[tuple[str, float]]) -> None:
    restarts, now = Restarts(), 0.0
    for name, later in ends:
        restarts.begun(name, now)
        now += later
        restarts.ended(name, now)
        due = restarts.next()
        assert due is not None
        assert due <= now + 30.0
        assert set(restarts.take(now + 30.0)) >= {name}
