"""The streaming parsers give one result for every way a network may cut the bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.client import parse
from aether.client.parse import EventParser, LineSplitter, LineTooLong, ServerEvent


def cut(data: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(marks)]


@given(st.lists(st.binary().map(lambda b: b.replace(b"\n", b"")), max_size=8), st.lists(st.integers(0, 10_000)))
def test_lines_come_out_whole_however_they_were_cut(lines: list[bytes], places: list[int]) -> None:
    splitter = LineSplitter()
    data = b"".join(line + b"\n" for line in lines) + b"unfinished"
    found = [line for piece in cut(data, places) for line in splitter.feed(piece)]
    assert found == lines


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse, "MAX_LINE_BYTES", 100)
    splitter, events = LineSplitter(), EventParser()
    for _ in range(10):
        splitter.feed(b"0123456789")
        list(events.feed(b"0123456789"))
    with pytest.raises(LineTooLong):
        splitter.feed(b"0")
    with pytest.raises(LineTooLong):
        list(events.feed(b"0"))


text = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=("Cs",)), max_size=10)
events = st.tuples(
    st.text("abcdefghij", min_size=1, max_size=8), st.lists(text, min_size=1, max_size=3), st.integers(0, 99)
)


@given(
    st.lists(events, max_size=5),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.booleans(),
    st.lists(st.integers(0, 10_000), max_size=30),
)
def test_events_come_out_whole_however_they_were_cut(
    sent: list[tuple[str, list[str], int]], end: str, mark: bool, places: list[int]
) -> None:
    lines = [": a comment"]
    for kind, data, number in sent:
        lines += [f"id: {number}", f"event: {kind}", *(f"data: {part}" for part in data), ""]
    lines += ["event: cut", "data: off"]
    raw = (b"\xef\xbb\xbf" if mark else b"") + end.join(lines).encode()
    parser = EventParser()
    found = [event for piece in cut(raw, places) for event in parser.feed(piece)]
    assert found == [ServerEvent(kind, "\n".join(data), str(number)) for kind, data, number in sent]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"data\n\n", [ServerEvent("message", "", "")]),
        (b"data:x\n\n", [ServerEvent("message", "x", "")]),
        (b"data:  x\n\n", [ServerEvent("message", " x", "")]),
        (b"event: only\n\n", []),
        (b"id: 7\n\ndata: x\n\n", [ServerEvent("message", "x", "7")]),
        (b"id: 7\n\nid: a\0b\ndata: y\n\n", [ServerEvent("message", "y", "7")]),
        (b"id: 7\ndata: x\n\nid\ndata: y\n\n", [ServerEvent("message", "x", "7"), ServerEvent("message", "y", "")]),
        (b": keep-alive\n\n", []),
        (b"retry: 10\nunknown: z\ndata: a:b\n\n", [ServerEvent("message", "a:b", "")]),
    ],
)  # fmt: skip
def test_what_the_standard_says(raw: bytes, expected: list[ServerEvent]) -> None:
    assert list(EventParser().feed(raw)) == expected
