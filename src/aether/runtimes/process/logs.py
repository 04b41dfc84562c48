"""Reads the logs that keepers write (see `shim.journal` for the format), across rotation, while they grow."""

from __future__ import annotations

import calendar
import os
import threading
import time
from functools import lru_cache
from pathlib import Path

from aether.model.instance import KeptLog, LogRecord
from aether.runtimes.process.shim.journal import records_before, stamp

_CHUNK = 128 * 1024
"""Read at once; more than the longest record, so every full chunk holds the end of one."""
_HEAD = 128
_STREAMS = {b"stdout": "stdout", b"stderr": "stderr"}


def parse(line: bytes, seq: int = 0) -> LogRecord | None:
    """One line of a log file without its newline; None when it is not a record."""
    head = line.split(b" ", 3)
    if len(head) < 4 or len(head[0]) != 30 or (stream := _STREAMS.get(head[1])) is None:
        return None
    try:
        time_ns = _seconds(head[0][:19]) * 1_000_000_000 + int(head[0][20:29])
    except ValueError:
        return None
    return LogRecord(time_ns, stream, head[3].decode("utf-8", "replace"), head[2] == b"P", seq)


@lru_cache(maxsize=64)
def _seconds(text: bytes) -> int:
    return calendar.timegm(time.strptime(text.decode("ascii"), "%Y-%m-%dT%H:%M:%S"))


class LogReader:
    """A place in a log. `read` goes on from it; a record is returned once even while the keeper rotates.

    Records are numbered from the first that the instance ever wrote. Where rotation was faster than the reader, a
    record with `skipped` stands for those that are gone.
    """

    def __init__(self, path: Path, since_ns: int = 0) -> None:
        self._path = path
        self._older = path.with_name(path.name + ".1")
        self._floor = stamp(since_ns).encode() if since_ns > 0 else b""
        self._fd = -1
        self._offset = 0
        self._before = 0
        """How many records come before `_offset`."""
        self._seen = 0
        """How many records are dealt with: read, or not wanted."""
        self._turn = threading.Lock()
        self._closed = False

    def start(self, tail: int | None = None, after: int | None = None) -> None:
        """Stand at the oldest record kept, or `tail` records before the end, or behind the record `after`."""
        with self._turn:
            if not self._closed:
                self._start(tail, after)

    def read(self) -> list[LogRecord]:
        """The next records, or an empty list when nothing more is there for now."""
        with self._turn:
            return [] if self._closed else self._read()

    def close(self) -> None:
        """May be called while another thread reads."""
        with self._turn:
            self._closed = True
            self._leave()

    def _start(self, tail: int | None, after: int | None) -> None:
        self._leave()
        self._before = 0
        newest, older = _open(self._path), _open(self._older)
        try:
            if after is not None:
                self._seen = after
                at_newest = newest is not None and (older is None or newest.before <= after)
                file = newest if at_newest else older
                if file is not None:
                    self._stand(file, file.offset_of(after - file.before))
                return
            self._seen = 0
            if tail is None:
                if (file := older or newest) is not None:
                    self._stand(file, file.first)
            elif newest is not None:
                offset, missing = newest.back(tail)
                if missing and older is not None:
                    self._stand(older, older.back(missing)[0])
                else:
                    self._stand(newest, offset)
            self._seen = self._before
        finally:
            for file in (newest, older):
                if file is not None and file.fd != self._fd:
                    os.close(file.fd)

    def _read(self) -> list[LogRecord]:
        while True:
            if self._fd < 0 and not self._go_to(self._older) and not self._go_to(self._path):
                return []
            successor = self._successor()  # before the read: what follows a rotation is complete
            data = os.pread(self._fd, _CHUNK, self._offset)
            if not data and os.fstat(self._fd).st_size < self._offset:
                self._offset = 0  # begun anew because it could not be rotated
                continue
            end = data.rfind(b"\n") + 1
            if end == 0 and len(data) < _CHUNK:
                if successor is None:
                    return []
                self._leave()
                if not self._go_to(successor) and not self._go_to(self._path):
                    return []
                continue
            begin = self._offset
            self._offset += end or len(data)
            first = 0
            if begin == 0 and (head := records_before(data[:_HEAD])) is not None:
                self._before, first = head
            if records := self._records(data[first:end].split(b"\n")[:-1]):
                return records

    def _leave(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _records(self, lines: list[bytes]) -> list[LogRecord]:
        if not lines:
            return []
        before, floor = self._before, self._floor
        self._before = before + len(lines)
        missed = before - self._seen
        self._seen = self._before
        found: list[LogRecord] = []
        for number, line in enumerate(lines, before + 1):
            if line[:30] >= floor and (record := parse(line, number)) is not None:
                found.append(record)
        if missed > 0 and found and found[0].seq == before + 1:
            found.insert(0, _gap(found[0], missed))
        return found

    def _stand(self, file: _File, offset: int) -> None:
        self._fd = file.fd
        self._offset = offset if offset > file.first else 0
        self._before = file.before + (file.lines(offset) if self._offset else 0)

    def _go_to(self, path: Path) -> bool:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        self._offset = 0
        return True

    def _successor(self) -> Path | None:
        """The file to go on with when the open one is no longer the newest."""
        mine = os.fstat(self._fd).st_ino
        newest = _inode(self._path)
        if newest == mine:
            return None
        older = _inode(self._older)
        if older == mine:
            return None if newest == 0 else self._path
        return self._older if older else self._path if newest else None


def _gap(following: LogRecord, missed: int) -> LogRecord:
    text = f"{missed} log lines were skipped: they were rotated away before they were read"
    return LogRecord(following.time_ns - 1, "aether", text, seq=following.seq - 1, skipped=missed)


class _File:
    """An open log file: where its records begin, and how many came before them."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.before, self.first = records_before(os.pread(fd, _HEAD, 0)) or (0, 0)

    def lines(self, end: int) -> int:
        """How many records begin before `end`."""
        count, at = 0, self.first
        while at < end and (data := os.pread(self.fd, min(1 << 20, end - at), at)):
            count += data.count(b"\n")
            at += len(data)
        return count

    def offset_of(self, number: int) -> int:
        """Where the record after the first `number` begins; the end of the file when it has no more."""
        at = self.first
        while number > 0 and (data := os.pread(self.fd, _CHUNK, at)):
            here = data.count(b"\n")
            if here < number:
                number -= here
                at += len(data)
                continue
            position = -1
            for _ in range(number):
                position = data.index(b"\n", position + 1)
            return at + position + 1
        return at

    def back(self, count: int) -> tuple[int, int]:
        """Where the last `count` records begin and how many of them are missing."""
        position = os.fstat(self.fd).st_size
        left = count + 1  # the newline that ends the record before the first wanted one
        while position > self.first:
            begin = max(self.first, position - _CHUNK)
            data = os.pread(self.fd, position - begin, begin)
            at = len(data)
            while (at := data.rfind(b"\n", 0, at)) >= 0:
                left -= 1
                if left == 0:
                    return begin + at + 1, 0
            position = begin
        return self.first, max(0, left - 1)


def _open(path: Path) -> _File | None:
    try:
        return _File(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        return None


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def kept_logs(folder: Path) -> list[KeptLog]:
    """Every log in the folders of apps below `folder`."""
    found: dict[tuple[str, str], KeptLog] = {}
    for path in folder.glob("*/*.log*"):
        app, name = path.parent.name, path.name.partition(".log")[0]
        try:
            seen = path.stat()
        except FileNotFoundError:
            continue  # dropped or rotated meanwhile
        before = found.get((app, name), KeptLog(name, app, 0, 0.0))
        found[app, name] = KeptLog(
            name, app, before.bytes + seen.st_size, max(before.changed_at, seen.st_mtime)
        )  # fmt: skip
    return list(found.values())
