"""The log of one instance on disk, in the CRI format `RFC3339Nano stdout|stderr F|P text`.

Lines longer than LINE_LIMIT become several `P` records and a last `F`. Each file opens with a record of the stream
`aether` that says how many records came before it, so a reader can number records and count those it missed. Times
strictly grow. A full disk loses lines, never the application: what was lost is counted and said once space is back.
"""

from __future__ import annotations

import os
import time

LINE_LIMIT = 16 * 1024
"""Bytes of text in one record at most."""

_SECOND = 1_000_000_000
_HEAD_BYTES = 64
"""Room kept in each file for its first record."""
_BEFORE = b" aether B "


def stamp(time_ns: int) -> str:
    """`time_ns` since the epoch as RFC 3339 in UTC with nine decimals: fixed width, so text order is time order."""
    seconds, rest = divmod(time_ns, _SECOND)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest:09d}Z"


def records_before(start: bytes) -> tuple[int, int] | None:
    """How many records came before a file that begins with `start`, and where its own begin; None without a head."""
    line, newline, _ = start.partition(b"\n")
    if not newline or line[30:40] != _BEFORE or not line[40:].isdigit():
        return None
    return int(line[40:]), len(line) + 1


class Splitter:
    """Cuts one stream into (complete, text) pieces of at most LINE_LIMIT bytes."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[tuple[bool, bytes]]:
        lines = (self._rest + data).split(b"\n")
        rest = lines.pop()
        pieces: list[tuple[bool, bytes]] = []
        for line in lines:
            if len(line) > LINE_LIMIT:
                line = _cut(line, pieces)
            pieces.append((True, line))
        self._rest = _cut(rest, pieces) if len(rest) > LINE_LIMIT else rest
        return pieces

    def flush(self) -> list[tuple[bool, bytes]]:
        """What is left of a last line that got no newline."""
        rest, self._rest = self._rest, b""
        return [(True, rest)] if rest else []


def _cut(line: bytes, pieces: list[tuple[bool, bytes]]) -> bytes:
    start = 0
    while len(line) - start > LINE_LIMIT:
        end = start + LINE_LIMIT
        for _ in range(3):  # a UTF-8 character is at most four bytes: do not cut inside one
            if line[end] & 0xC0 != 0x80:
                break
            end -= 1
        pieces.append((False, line[start:end]))
        start = end
    return line[start:]


class Journal:
    """Appends records to `path`, keeping one older file `path.1`; at most about `limit` bytes each."""

    def __init__(self, path: bytes, limit: int) -> None:
        self._path = path
        self._limit = max(1, limit - _HEAD_BYTES) if limit else 0
        self._records = 0
        self._fd = -1
        self._size = 0
        self._last_ns = 0
        self._second = -1
        self._prefix = b""
        self._dropped = 0
        self._reason = ""

    def append(self, stream: bytes, pieces: list[tuple[bool, bytes]]) -> None:
        """Record `pieces` of `stream`; what cannot be written is dropped and counted."""
        batch: list[bytes] = []
        size = 0
        for complete, text in pieces:
            record = b"%s %s %s %s\n" % (self._time(), stream, b"F" if complete else b"P", text)
            if self._limit and self._size + size + len(record) > self._limit and self._size + size > 0:
                self._write(batch, size)
                self._rotate()
                batch, size = [], 0
            batch.append(record)
            size += len(record)
        if batch:
            self._write(batch, size)

    def notice(self, text: str) -> None:
        """A line of Aether's own among the application's."""
        self.append(b"stderr", [(True, b"aether: " + text.encode())])

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _time(self) -> bytes:
        now = self._last_ns = max(time.time_ns(), self._last_ns + 1)
        second, rest = divmod(now, _SECOND)
        if second != self._second:
            self._second = second
            self._prefix = stamp(now)[:20].encode()
        return b"%s%09dZ" % (self._prefix, rest)

    def _write(self, batch: list[bytes], size: int) -> None:
        if not batch:
            return
        lines = len(batch)
        if self._dropped:
            note = f"aether: {self._dropped} log lines were lost: {self._reason}"
            batch = [b"%s stderr F %s\n" % (batch[0].split(b" ", 1)[0], note.encode()), *batch]
            size += len(batch[0])
        try:
            if self._fd < 0:
                self._open()
            head = b"" if self._size else b"%s%s%d\n" % (batch[0].split(b" ", 1)[0], _BEFORE, self._records)
            data = memoryview(head + b"".join(batch))
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            self._dropped += lines
            self._reason = os.strerror(error.errno) if error.errno else str(error)
            self._undo()
        else:
            self._size += size + len(head)
            self._records += len(batch)
            self._dropped = 0

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size
        if self._size and not self._records:
            text = os.pread(self._fd, self._size, 0)
            before, start = records_before(text) or (0, 0)
            self._records = before + text.count(b"\n", start)

    def _undo(self) -> None:
        if self._fd >= 0:
            try:
                os.ftruncate(self._fd, self._size)
            except OSError as error:
                self._reason = os.strerror(error.errno) if error.errno else str(error)

    def _rotate(self) -> None:
        try:
            os.replace(self._path, self._path + b".1")
        except OSError as error:
            self._reason = os.strerror(error.errno) if error.errno else str(error)
            # Space is worth more than old lines: start this file anew rather than outgrow the limit.
            self._size = 0
            self._undo()
            return
        self.close()
        self._size = 0
