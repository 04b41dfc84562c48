"""A followed log repeats no line and loses none, wherever its connections break."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aether.client.follow import LogCursor
from aether.model.times import from_iso, to_iso

START = from_iso("2026-01-02T03:04:05.000000Z")


def record(at: int, seq: int, instance: str = "i1", line: str = "x") -> Any:
    return {"time": to_iso(START + at), "instance": instance, "stream": "stdout", "line": line, "seq": seq}


class Server:
    """A log as the real one keeps it: `since` includes its moment, `tail` counts from the end, and of an instance
    named in `after` come the lines behind that number. With `knows_after` false it replays by time alone."""

    def __init__(self, knows_after: bool) -> None:
        self.lines: list[Any] = []
        self.knows_after = knows_after

    def answer(self, query: dict[str, Any]) -> list[Any]:
        after: dict[str, int] = {}
        for part in filter(None, str(query.get("after") or "").split(",")):
            if self.knows_after:
                instance, _, seq = part.rpartition(":")
                after[instance] = int(seq)
        found = sorted(self.lines, key=lambda line: line["time"])
        since = query.get("since") or ""
        found = [
            line
            for line in found
            if (line["seq"] > after[line["instance"]] if line["instance"] in after else line["time"] >= since)
        ]
        tail = query.get("tail")
        return found if tail is None else found[-tail:] if tail else []


steps = st.lists(
    st.tuples(
        st.integers(0, 3_000_000),  # microseconds since the line before; often none at all
        st.sampled_from(["i1", "i2"]),
        st.sampled_from(["a", "b"]),
        st.sampled_from(["line", "line", "line", "drop", "drop while away"]),
    ),
    max_size=60,
)


@given(steps, st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_every_line_after_the_first_connection_comes_once(
    steps: list[tuple[int, str, str, str]], before: int, tail: int, knows_after: bool
) -> None:
    server, cursor = Server(knows_after), LogCursor(tail=tail)
    server.lines = [record(n, n + 1, line=f"before {n}") for n in range(before)]
    expected = server.lines[max(0, before - tail) :] if tail else []
    got: list[Any] = []
    numbers = {"i1": before, "i2": 0}

    def connect() -> None:
        answer = server.answer(cursor.query())
        cursor.connected(to_iso(START + 1000))
        got.extend(line for line in answer if cursor.admit(line))

    connect()
    now, connected = 2000, True
    for gap, instance, text, what in steps:
        now += gap
        if what == "line":
            numbers[instance] += 1
            line = record(now, numbers[instance], instance, text)
            server.lines.append(line)
            expected.append(line)
            if connected and cursor.admit(line):
                got.append(line)
        elif what == "drop":
            connect()
            connected = True
        else:
            connected = False
    connect()

    def key(line: Any) -> tuple[str, int]:
        return line["instance"], line["seq"]

    assert sorted(map(key, got)) == sorted(map(key, expected))


def test_a_late_line_of_another_instance_is_not_lost_in_a_break() -> None:
    cursor = LogCursor(tail=10)
    cursor.query()
    cursor.connected(to_iso(START))
    first, newest = record(0, 1), record(4_000_000, 2, "i1", "newest")
    assert cursor.admit(first)
    assert cursor.admit(newest)
    query = cursor.query()
    late = record(3_000_000, 1, "i2", "late")
    assert str(query["since"]) <= late["time"]
    assert query["after"] == "i1:2"
    assert [cursor.admit(line) for line in (first, late, newest)] == [False, True, False]


def test_an_instance_that_lags_behind_the_others_loses_nothing() -> None:
    cursor = LogCursor(tail=10)
    cursor.query()
    assert cursor.admit(record(0, 1, "slow"))
    assert cursor.admit(record(3_600_000_000, 1, "fast"))
    assert set(str(cursor.query()["after"]).split(",")) == {"slow:1", "fast:1"}
    assert cursor.admit(record(1, 2, "slow"))


def test_memory_and_the_request_stay_bounded() -> None:
    cursor = LogCursor(tail=None)
    cursor.query()
    for n in range(20_000):
        assert cursor.admit(record(n * 10_000, 1, instance=f"instance-{n}"))
    assert len(cursor._seen) < 5000
    query = cursor.query()
    assert len(str(query["after"])) < 8000, "it must fit the head of a request"
    assert query["since"] == to_iso(START + 19_999 * 10_000 - 5_000_000)


def test_nothing_seen_and_no_old_lines_wanted() -> None:
    cursor = LogCursor(tail=0)
    assert cursor.query() == {"since": None, "tail": 0}
    cursor.connected("2026-01-02T03:04:05.000000Z")
    assert cursor.query()["since"] == "2026-01-02T03:04:05.000000Z"
