"""Reads the logs that keepers write (see `shim.journal` for the format), across rotation, while they grow."""

from __future__ import annotations

import calendar
import os
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from aether.model.instance import LogRecord
from aether.runtimes.process.shim.journal import stamp

_CHUNK = 256 * 1024


def parse(line: bytes) -> LogRecord | None:
    """One line of a log file without its newline; None when it is not a record."""
    head = line.split(b" ", 3)
    if len(head) < 4 or len(head[0]) != 30 or head[1] not in (b"stdout", b"stderr"):
        return None
    try:
        time_ns = _seconds(head[0][:19]) * 1_000_000_000 + int(head[0][20:29])
    except ValueError:
        return None
    return LogRecord(time_ns, head[1].decode(), head[3].decode("utf-8", "replace"), partial=head[2] == b"P")


@lru_cache(maxsize=64)
def _seconds(text: bytes) -> int:
    return calendar.timegm(time.strptime(text.decode("ascii"), "%Y-%m-%dT%H:%M:%S"))


@dataclass(slots=True)
class LogReader:
    """A place in a log. `read` goes on from it; a record is returned once even while the keeper rotates."""

    path: Path
    since_ns: int = 0
    _fd: int = -1
    _offset: int = 0

    @property
    def _older(self) -> Path:
        return self.path.with_name(self.path.name + ".1")

    def start(self, tail: int | None) -> None:
        """Stand at the oldest record kept, or `tail` records before the end."""
        if tail is None:
            if not self._open(self._older):
                self._open(self.path)
            return
        newest = _newlines_back(self.path, tail)
        if newest is None or newest[1] == 0:
            self._open(self.path, 0 if newest is None else newest[0])
            return
        older = _newlines_back(self._older, newest[1])
        if older is not None and self._open(self._older, older[0]):
            return
        self._open(self.path, 0)

    def read(self) -> list[LogRecord]:
        """The next records, or an empty list when nothing more is there for now."""
        floor = stamp(self.since_ns).encode() if self.since_ns > 0 else b""
        while True:
            if self._fd < 0 and not self._open(self.path):
                return []
            successor = self._successor()  # before the read: what follows a rotation is complete
            data = os.pread(self._fd, _CHUNK, self._offset)
            end = data.rfind(b"\n") + 1
            if end == 0 and len(data) < _CHUNK:
                if successor is None:
                    return []
                self.close()
                if not self._open(successor) and not self._open(self.path):
                    return []
                continue
            self._offset += end or len(data)
            lines = data[:end].split(b"\n")[:-1]
            records = [found for line in lines if line[:30] >= floor and (found := parse(line)) is not None]
            if records:
                return records

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self, path: Path, offset: int = 0) -> bool:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        self._offset = offset
        return True

    def _successor(self) -> Path | None:
        """The file to go on with when the open one is no longer the newest."""
        mine = os.fstat(self._fd).st_ino
        newest = _inode(self.path)
        if newest == mine:
            return None
        older = _inode(self._older)
        if older == mine:
            return None if newest == 0 else self.path
        return self._older if older else self.path if newest else None


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _newlines_back(path: Path, count: int) -> tuple[int, int] | None:
    """Where the last `count` lines of `path` begin and how many of them are missing; None without the file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        end = os.fstat(fd).st_size
        position, left = end, count + 1  # the newline that ends the line before the first wanted one
        while position > 0:
            begin = max(0, position - _CHUNK)
            data = os.pread(fd, position - begin, begin)
            at = len(data)
            while (at := data.rfind(b"\n", 0, at)) >= 0:
                left -= 1
                if left == 0:
                    return begin + at + 1, 0
            position = begin
        return 0, max(0, left - 1)
    finally:
        os.close(fd)
