"""What is left of a rollout's time when the wall clock jumps between two servers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aether.apps.ledger import remaining_secs

HOUR_US = 3_600_000_000
NOW = 1_800_000_000_000_000


def test_a_rollout_keeps_its_deadline_over_a_restart() -> None:
    assert remaining_secs(120.0, NOW - 50_000_000, NOW) == 70.0
    assert remaining_secs(120.0, None, NOW) == 120.0


def test_a_clock_that_was_set_back_does_not_make_it_longer() -> None:
    assert remaining_secs(120.0, NOW + HOUR_US, NOW) == 120.0


@given(st.floats(1, 3600), st.integers(0, 4 * NOW), st.integers(0, 4 * NOW))
def test_never_more_than_the_timeout(timeout: float, started: int, now: int) -> None:
    assert remaining_secs(timeout, started, now) <= timeout
