"""When certificates are due: never too late, never twice at once, never again right after a failure."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from aether.hosts.plan import (
    CHECKED_FOR_US,
    DAY_US,
    HOUR_US,
    MINUTE_US,
    due_at,
    next_check,
    pause_us,
    plan,
)
from aether.model.certificates import CertificateRow

LIFE = 90 * DAY_US
ISSUED = CertificateRow("a.example", "acme", "CA", "f" * 64, 0, LIFE, 0, None, None)
times = st.integers(0, 400 * DAY_US)


def test_a_host_without_a_certificate_is_due_at_once() -> None:
    found = plan(["b.example", "a.example"], {}, 5)
    assert found.due == ("a.example", "b.example")
    assert found.next_at is None


def test_reserved_names_and_certificates_of_the_owner_are_left_alone() -> None:
    assert due_at("shop.test", None) is None
    given_one = replace(ISSUED, source="given")
    assert plan(["a.example", "shop.test"], {"a.example": given_one}, 10 * LIFE).due == ()


@given(st.text("abcdefgh", min_size=1, max_size=20), times)
def test_renewal_is_between_six_tenths_and_two_thirds_of_life(name: str, start: int) -> None:
    row = replace(ISSUED, host=name, not_before=start, not_after=start + LIFE)
    at = due_at(name, row)
    assert at is not None
    assert start + LIFE * 6 // 10 <= at <= start + LIFE * 2 // 3
    assert at == due_at(name, row)


def test_renewals_are_spread() -> None:
    assert len({due_at(f"h{number}.example", ISSUED) for number in range(100)}) > 90


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20), times), max_size=8), times)
def test_nothing_is_due_before_its_pause_is_over(found: list[tuple[bool, int, int]], now: int) -> None:
    rows: dict[str, CertificateRow] = {}
    for number, (has, failures, next_at) in enumerate(found):
        host = f"h{number}.example"
        ends = LIFE if has else None
        rows[host] = CertificateRow(host, "acme", None, None, 0 if has else None, ends, failures, next_at, "x")
    made = plan(rows, rows, now)
    for host in made.due:
        assert (rows[host].next_attempt_at or 0) <= now
    late = set(rows) - set(made.due)
    assert (made.next_at is None) == (not late)
    if made.next_at is not None:
        assert made.next_at > now
        assert set(plan(rows, rows, made.next_at).due) > set(made.due), "waiting until then brings something"


def test_pauses_grow_and_are_bounded() -> None:
    pauses = [pause_us(failures) for failures in range(1, 30)]
    assert pauses[0] == MINUTE_US
    assert pauses == sorted(pauses)
    assert pauses[-1] == DAY_US
    assert pause_us(1, limited=True) == HOUR_US
    assert pause_us(25, limited=True) == DAY_US


@given(times, st.integers(0, 2 * MINUTE_US))
def test_a_pending_host_is_looked_at_with_growing_pauses_and_not_for_ever(created: int, late: int) -> None:
    """However late each look is: `late` says by how much."""
    checked, pauses = created, list[int]()
    while (at := next_check(created, checked)) is not None:
        pauses.append(at - checked)
        checked = at + late
    assert pauses[0] == MINUTE_US
    assert pauses == sorted(pauses)
    assert max(pauses) == 6 * HOUR_US
    assert len(pauses) < 50
    assert checked <= created + CHECKED_FOR_US + late
    assert checked > created + CHECKED_FOR_US - 12 * HOUR_US, "and it is looked at until then"
    assert next_check(created, None) == created + MINUTE_US
