"""Two servers never act under one lease, whatever their clocks show, as long as they run at the same speed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aether.leases.rules import FENCE_AFTER, RENEW_AFTER, Held, Seen, Step, look, of_holder, of_observer

TTL = 15.0
moments = st.floats(0, 1000)
offsets = st.floats(-1e9, 1e9)


def test_a_holder_acts_renews_and_stops_in_turn() -> None:
    held = Held(100.0, TTL)
    assert of_holder(held, 100.0) is Step.HOLD
    assert of_holder(held, 100.0 + TTL * RENEW_AFTER) is Step.RENEW
    assert of_holder(held, 100.0 + TTL * FENCE_AFTER) is Step.FENCE
    assert of_holder(held, 1e9) is Step.FENCE


def test_an_observer_waits_a_whole_lease_after_the_newest_renewal_that_it_saw() -> None:
    seen = look(None, 1, 0, TTL, 50.0)
    assert of_observer(seen, 50.0) is Step.WAIT
    assert look(seen, 1, 0, TTL, 60.0) == seen
    renewed = look(seen, 1, 1, TTL, 60.0)
    assert renewed.since == 60.0
    assert of_observer(renewed, 74.9) is Step.WAIT
    assert of_observer(renewed, 75.0) is Step.CLAIM
    assert look(renewed, 2, 1, TTL, 75.0).since == 75.0, "another holder has a whole lease of its own"


@given(
    sent=moments, committed_after=st.floats(0, 60), seen_after=st.floats(0, 60), later=moments, a=offsets, b=offsets
)
def test_nobody_may_claim_while_the_holder_may_act(
    sent: float, committed_after: float, seen_after: float, later: float, a: float, b: float
) -> None:
    """`a` and `b` are what the two machines' clocks differ from the true time by."""
    seen_at = sent + committed_after + seen_after
    held = Held(sent + a, TTL)
    seen = Seen(1, 0, TTL, seen_at + b)
    now = seen_at + later
    if of_observer(seen, now + b) is Step.CLAIM:
        assert of_holder(held, now + a) is Step.FENCE


@given(looks=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3), st.floats(0, 10)), min_size=1, max_size=30))
def test_an_observer_never_claims_what_changed_within_a_lease(looks: list[tuple[int, int, float]]) -> None:
    now, seen, changed, before = 0.0, None, 0.0, None
    for epoch, renewals, pause in looks:
        now += pause
        if (epoch, renewals) != before:
            before, changed = (epoch, renewals), now
        seen = look(seen, epoch, renewals, TTL, now)
        assert (of_observer(seen, now) is Step.CLAIM) == (now - changed >= TTL)


@given(ttl=st.floats(0.1, 1000))
def test_a_renewal_is_tried_more_than_once_before_the_holder_stops(ttl: float) -> None:
    assert RENEW_AFTER * ttl * 2 <= FENCE_AFTER * ttl < ttl
