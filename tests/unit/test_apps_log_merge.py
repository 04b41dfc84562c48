"""Several logs become one in the order of time, however their blocks arrive and wherever they grow."""

from __future__ import annotations

import json

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from aether.api.log_lines import LineEncoder, LogLineView
from aether.apps.log_merge import LogLine, Source, Tap, due, fill
from aether.model.instance import LogRecord
from aether.model.times import to_iso

DIGEST = "a" * 64


class Log:
    """An `InstanceLog` that gives its records in blocks."""

    def __init__(self, blocks: list[list[LogRecord]], ended: bool = True) -> None:
        self.blocks = blocks
        self.ended = ended

    def read(self) -> list[LogRecord]:
        return self.blocks.pop(0) if self.blocks else []

    def close(self) -> None:
        self.blocks.clear()


def source(name: str) -> Source:
    return Source(name, "d", DIGEST, 1)


def drain(taps: list[Tap]) -> list[LogLine]:
    found: list[LogLine] = []
    while True:
        fill(taps)
        held = sum(len(tap.lines) for tap in taps)
        batch = due(taps)
        found += batch
        if not batch:
            assert not held, "lines wait although nothing is to come before them"
            return found


logs = st.lists(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=6), max_size=5), max_size=4)


@given(logs)
def test_everything_comes_once_and_in_order(logs: list[list[list[int]]]) -> None:
    taps: list[Tap] = []
    expected: list[int] = []
    for n, blocks in enumerate(logs):
        times = iter(sorted(time for block in blocks for time in block))
        records = [[LogRecord(next(times), "stdout", str(n)) for _ in block] for block in blocks]
        expected += [record.time_ns for block in records for record in block]
        taps.append(Tap(source(str(n)), Log(records)))
    lines = drain(taps)
    assert [line.time_ns for line in lines] == sorted(expected)
    assert all(tap.over for tap in taps)


@given(logs)
def test_no_log_is_held_beyond_a_block(logs: list[list[list[int]]]) -> None:
    taps = [
        Tap(source(str(n)), Log([[LogRecord(time, "stdout", "x") for time in sorted(block)] for block in blocks]))
        for n, blocks in enumerate(logs)
    ]
    while True:
        fill(taps)
        assert all(len(tap.lines) <= 6 for tap in taps)
        if not due(taps):
            return


def test_a_log_that_grows_goes_on() -> None:
    log = Log([[LogRecord(1, "stdout", "one")]], ended=False)
    tap = Tap(source("i"), log)
    assert [line.record.text for line in drain([tap])] == ["one"]
    assert not tap.more
    assert not tap.over
    log.blocks.append([LogRecord(2, "stdout", "two")])
    tap.more = True
    assert [line.record.text for line in drain([tap])] == ["two"]


@given(
    st.integers(0, 2**62), st.text(), st.booleans(), st.integers(1, 10**9), st.integers(0, 9), st.none() | st.just(7)
)
def test_a_line_is_what_the_interface_says(
    time_ns: int, text: str, partial: bool, seq: int, skipped: int, release: int | None
) -> None:
    made = LogLine(LogRecord(time_ns, "stderr", text, partial, seq, skipped), Source("i-1", "d-1", DIGEST, release))
    raw = LineEncoder("shop")(made)
    assert raw.endswith(b"}\n")
    assert raw.count(b"\n") == 1
    view = msgspec.json.decode(raw, type=LogLineView)
    assert view == LogLineView(
        to_iso(time_ns // 1000), "stderr", text, "shop", release, "d-1", DIGEST, "web", "i-1", seq, partial, skipped
    )
    assert list(json.loads(raw)) == list(json.loads(msgspec.json.encode(view)))
