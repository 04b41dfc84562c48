"""The log writer and its reader: what is written is read once, in order, whatever the rotation."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.model.instance import LogRecord
from aether.runtimes.process.logs import LogReader, parse
from aether.runtimes.process.shim.journal import LINE_LIMIT, Journal, Splitter, stamp


@given(st.lists(st.binary(max_size=50)))
def test_splitting_does_not_depend_on_how_the_bytes_arrive(parts: list[bytes]) -> None:
    data = b"".join(parts)
    whole, pieces = Splitter(), Splitter()
    once = whole.feed(data) + whole.flush()
    bits = [piece for part in parts for piece in pieces.feed(part)] + pieces.flush()
    assert once == bits
    assert b"\n".join(text for _, text in once) == (data[:-1] if data.endswith(b"\n") else data)


@given(st.integers(0, 3 * LINE_LIMIT + 5), st.sampled_from(["x", "é", "€", "😀"]))
def test_long_lines_are_cut_between_characters(length: int, character: str) -> None:
    line = (character * length).encode()
    splitter = Splitter()
    pieces = splitter.feed(line) + splitter.feed(b"\n")
    assert b"".join(text for _, text in pieces) == line
    assert [complete for complete, _ in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(text) <= LINE_LIMIT for _, text in pieces)
    for _, text in pieces:
        text.decode()


@given(st.integers(0, 2**62))
def test_a_stamp_is_read_back(time_ns: int) -> None:
    assert parse(stamp(time_ns).encode() + b" stdout F text") == LogRecord(time_ns, "stdout", "text")


@given(st.binary(max_size=80))
def test_parsing_never_raises(line: bytes) -> None:
    parse(line)
    parse(b"2024-01-01T00:00:00.000000000Z stdout " + line)


_STEPS = st.lists(st.one_of(st.integers(1, 6), st.just(0)), max_size=60)


@settings(max_examples=60, deadline=None)
@given(_STEPS, st.integers(100, 400))
def test_a_reader_that_keeps_up_sees_each_record_once(steps: list[int], limit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.log"
        journal = Journal(str(path).encode(), limit)
        reader = LogReader(path)
        reader.start(None)
        seen: list[str] = []
        written = 0
        behind = 0
        for step in [*steps, 0]:
            # a file of the smallest limit holds one record of about 50 bytes: read at least that often
            for _ in range(step):
                if behind >= max(1, (limit - 110) // 50):
                    seen += _drain(reader)
                    behind = 0
                journal.append(b"stdout", [(True, f"{written:06d}".encode())])
                written += 1
                behind += 1
            if step == 0:
                seen += _drain(reader)
                behind = 0
        journal.close()
        reader.close()
        assert seen == [f"{n:06d}" for n in range(written)]
        for file in Path(folder).iterdir():
            assert file.stat().st_size <= limit


def _drain(reader: LogReader) -> list[str]:
    found: list[str] = []
    while batch := reader.read():
        found += [record.text for record in batch]
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 50), st.integers(80, 2000))
def test_a_tail_is_the_end_of_everything_kept(count: int, tail: int, limit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.log"
        journal = Journal(str(path).encode(), limit)
        for n in range(count):
            journal.append(b"stdout", [(True, b"%d" % n)])
        journal.close()
        everything, end = LogReader(path), LogReader(path)
        everything.start(None)
        end.start(tail)
        kept = _drain(everything)
        assert _drain(end) == (kept[-tail:] if tail else [])
        everything.close()
        end.close()


def test_an_unfinished_record_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    head = stamp(1).encode() + b" stdout F "
    path.write_bytes(head + b"one\n" + head + b"tw")
    reader = LogReader(path)
    reader.start(None)
    assert _drain(reader) == ["one"]
    path.write_bytes(head + b"one\n" + head + b"two\n")
    assert _drain(reader) == ["two"]
    reader.close()


def test_a_journal_goes_on_in_an_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    for text in (b"one", b"two"):
        journal = Journal(str(path).encode(), 10_000)
        journal.append(b"stderr", [(True, text)])
        journal.close()
    reader = LogReader(path)
    reader.start(None)
    assert _drain(reader) == ["one", "two"]
    reader.close()


def test_lines_lost_without_a_folder_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "later" / "x.log"
    journal = Journal(str(path).encode(), 10_000)
    for _ in range(3):
        journal.append(b"stdout", [(True, b"lost"), (True, b"lost")])
    path.parent.mkdir()
    journal.append(b"stdout", [(True, b"kept")])
    journal.close()
    reader = LogReader(path)
    reader.start(None)
    assert _drain(reader) == ["aether: 6 log lines were lost: No such file or directory", "kept"]
    reader.close()


class Writer:
    """A journal that writes numbered records: the text is the record's own number."""

    def __init__(self, path: Path, limit: int) -> None:
        self.journal = Journal(str(path).encode(), limit)
        self.written = 0

    def write(self, count: int) -> None:
        for _ in range(count):
            self.written += 1
            self.journal.append(b"stdout", [(True, b"%d" % self.written)])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from(["read", "once", "reopen", "nothing"])), max_size=30),
    st.integers(150, 900),
)
def test_a_slow_reader_is_told_exactly_what_it_missed(steps: list[tuple[int, str]], limit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.log"
        writer = Writer(path, limit)
        reader = LogReader(path)
        reader.start(after=0)
        told: list[LogRecord] = []
        for count, what in [*steps, (0, "read")]:
            writer.write(count)
            if what == "reopen":  # as a follower does after its connection broke
                reader.close()
                reader = LogReader(path)
                reader.start(after=told[-1].seq if told else 0)
            while what != "nothing" and (batch := reader.read()):
                told += batch
                if what == "once":
                    break
        reader.close()
        writer.journal.close()
        position = 0
        for record in told:
            if record.skipped:
                assert record.stream == "aether"
                assert str(record.skipped) in record.text
                position += record.skipped
            else:
                position += 1
                assert record.text == str(position)
            assert record.seq == position
        assert position == writer.written
        times = [record.time_ns for record in told]
        assert times == sorted(times)


def test_numbers_go_on_in_a_journal_that_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    for _ in range(5):
        writer = Writer(path, 300)
        writer.write(7)
        writer.journal.close()
    reader = LogReader(path)
    reader.start(tail=1)
    assert [record.seq for record in reader.read()] == [35]
    reader.start(after=33)
    assert [record.seq for record in reader.read()] == [34, 35]
    reader.close()


def test_a_log_that_could_not_be_rotated_is_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_old: bytes, _new: bytes) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, "replace", refuse)
    path = tmp_path / "x.log"
    writer = Writer(path, 400)
    reader = LogReader(path)
    reader.start(after=0)
    seen = 0
    for _ in range(40):
        writer.write(1)
        for record in reader.read():
            seen += record.skipped or 1
            assert record.seq == seen
    reader.close()
    writer.journal.close()
    assert seen == 40
    assert path.stat().st_size <= 400
