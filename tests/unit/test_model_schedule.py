"""Cron schedules: bounds, time zones, changes of the clocks, and the newest moment of a long time."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.model.errors import BadRequest
from aether.model.processes import Cron, ProcessTypes, ReleaseCommand, Worker, check_process_types
from aether.model.schedule import Schedule

BERLIN = ZoneInfo("Europe/Berlin")
DAY = 86_400 * 1_000_000


def us(text: str, zone: str = "UTC") -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()) * 1_000_000


def named(schedule: Schedule, after: str, count: int) -> list[str]:
    moment, found = us(after), []
    for _ in range(count):
        following = schedule.following(moment)
        assert following is not None
        moment = following
        found.append(datetime.fromtimestamp(moment / 1e6, UTC).strftime("%d %H:%M"))
    return found


def test_moments_are_later_than_what_was_asked_for() -> None:
    every = Schedule("*/5 * * * *")
    assert named(every, "2026-01-01T00:00:00", 3) == ["01 00:05", "01 00:10", "01 00:15"]
    assert every.following(us("2026-01-01T00:05:00") - 1) == us("2026-01-01T00:05:00")
    assert Schedule("0 9 * * MON").following(us("2026-01-01T00:00:00")) == us("2026-01-05T09:00:00")


def test_a_time_zone_is_that_of_the_wall() -> None:
    assert Schedule("0 9 * * *", "Europe/Berlin").following(us("2026-07-01T00:00:00")) == us("2026-07-01T07:00:00")
    assert Schedule("0 9 * * *", "Europe/Berlin").following(us("2026-01-01T00:00:00")) == us("2026-01-01T08:00:00")


def test_a_time_that_the_clocks_skip_comes_at_the_end_of_the_gap() -> None:
    # on 29 March 2026 the clocks of Berlin go from 02:00 to 03:00, which is 01:00 UTC
    daily = Schedule("30 2 * * *", "Europe/Berlin")
    assert named(daily, "2026-03-28T00:00:00", 3) == ["28 01:30", "29 01:00", "30 00:30"]


def test_a_time_that_the_clocks_repeat_comes_once() -> None:
    # on 25 October 2026 they go from 03:00 back to 02:00, which is 01:00 UTC
    daily = Schedule("30 2 * * *", "Europe/Berlin")
    assert named(daily, "2026-10-24T00:00:00", 3) == ["24 00:30", "25 00:30", "26 01:30"]
    assert daily.following(us("2026-10-25T01:10:00")) == us("2026-10-26T01:30:00"), "asked within the repeated hour"
    half = Schedule("*/30 * * * *", "Europe/Berlin")
    assert named(half, "2026-10-25T00:00:00", 4) == ["25 00:30", "25 01:00", "25 01:30", "25 02:00"]


@given(
    expression=st.sampled_from(
        ["* * * * *", "*/7 * * * *", "30 2 * * *", "0 */6 * * *", "15 3 1 * *", "0 0 * * SUN", "59 23 31 12 *"]
    ),
    zone=st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu"]),
    begin=st.integers(us("2025-01-01T00:00:00"), us("2027-01-01T00:00:00")),
    length=st.integers(0, 40 * DAY) | st.integers(0, DAY // 24),
)
def test_the_newest_moment_is_the_last_of_all(expression: str, zone: str, begin: int, length: int) -> None:
    schedule, end = Schedule(expression, zone), begin + length
    newest = schedule.latest(begin, end)
    following = schedule.following(begin)
    assert following is not None
    if newest is None:
        assert following > end
        return
    assert begin < newest <= end
    assert following <= newest
    after = schedule.following(newest)
    assert after is None or after > end


@given(
    st.sampled_from(["30 2 * * *", "*/30 * * * *", "0 1,2,3 * * *"]),
    st.integers(us("2026-03-20T00:00:00"), us("2026-11-10T00:00:00")),
)
def test_moments_only_rise(expression: str, begin: int) -> None:
    schedule, moments = Schedule(expression, "Europe/Berlin"), [begin]
    for _ in range(60):
        following = schedule.following(moments[-1])
        assert following is not None
        moments.append(following)
    assert all(a < b for a, b in pairwise(moments))


def test_a_long_time_costs_no_more_than_a_short_one() -> None:
    assert Schedule("* * * * *").latest(0, us("2026-01-01T00:00:30")) == us("2026-01-01T00:00:00")
    assert Schedule("0 0 29 2 *").latest(0, us("2026-01-01T00:00:00")) == us("2024-02-29T00:00:00")


@pytest.mark.parametrize(
    ("expression", "zone", "told"),
    [
        ("", "UTC", "five fields"),
        ("* * * * * *", "UTC", "five fields"),
        ("@daily", "UTC", "five fields"),
        ("a * * * *", "UTC", "bad minute"),
        ("* 24 * * *", "UTC", "bad hour"),
        ("0 0 30 2 *", "UTC", "no schedule|never"),
        ("*/0 * * * *", "UTC", "bad minute"),
        ("* * * * *" + " " * 200, "UTC", "no schedule"),
        ("* * * * *", "Berlin/Europe", "no time zone"),
        ("* * * * *", "../../etc/passwd", "no time zone"),
        ("* * * * *", "", "no time zone"),
        ("* * * * *", "Europe", "no time zone"),
    ],
)
def test_what_is_no_schedule_is_refused(expression: str, zone: str, told: str) -> None:
    with pytest.raises(BadRequest, match=told):
        Schedule(expression, zone)


@pytest.mark.parametrize(
    "types",
    [
        ProcessTypes({"web": Worker("x")}),
        ProcessTypes({"a b": Worker("x")}),
        ProcessTypes({"w": Worker(" ")}),
        ProcessTypes({"w": Worker("x\0")}),
        ProcessTypes({"w": Worker("x" * 5000)}),
        ProcessTypes({"w": Worker("x", float("nan"))}),
        ProcessTypes({"w": Worker("x")}, {"w": Cron("x", "* * * * *")}),
        ProcessTypes({}, {"c": Cron("x", "* * * * *", missed="twice")}),
        ProcessTypes({}, {"c": Cron("x", "* * * * *", timeout_secs=0)}),
        ProcessTypes({}, {"c": Cron("x", "* * * * *", "Nowhere/Here")}),
        ProcessTypes({}, {}, ReleaseCommand("")),
        ProcessTypes({}, {}, ReleaseCommand("x", 1e9)),
        ProcessTypes({f"w{n}": Worker("x") for n in range(21)}),
    ],
)
def test_process_types_that_cannot_be_meant(types: ProcessTypes) -> None:
    with pytest.raises(BadRequest):
        check_process_types(types)


def test_process_types_come_back_from_their_record_as_they_were() -> None:
    types = ProcessTypes({"w": Worker("x", 1.5)}, {"c": Cron("y", "0 9 * * *", BERLIN.key)}, ReleaseCommand("z"))
    check_process_types(types)
    assert ProcessTypes.from_json(types.to_json()) == types
    assert ProcessTypes.from_json("{}") == ProcessTypes()
