"""The access log: one JSON line for every request, made in batches and written by a thread of its own.

The data path does no more than append a record to a list. Lines that the disk cannot take in time are dropped and
counted, and the next line that can be written says how many: the log never slows a request down, and never leaves
out a line in silence.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Final

from aether.edge.headers import trace_id
from aether.edge.options import RequestRecord
from aether.edge.pool import EdgeBackend

_TICK_SECS: Final = 0.1
_BUSY_TICK_SECS: Final = 0.02
_BUSY: Final = 64
"""So many records in a tick, and the next one comes sooner: small batches are written while they are still in the
CPU's caches, and no idle edge wakes up often."""
_MAX_WAITING_BYTES: Final = 16 * 1024 * 1024
_MAX_KNOWN: Final = 4096
_NUMBERS: Final = 16_384
"""Numbers below this are kept written out: most durations in microseconds and most lengths are."""
_Who = tuple[str | None, bytes, bytes, int, bytes, EdgeBackend | None, bool]
_join: Final = b"".join
_log: Final = logging.getLogger(__name__)


class LineFormat:
    """Makes lines; `with_query` keeps what follows the `?` of a path, where secrets often are.

    What many lines share (the app, the host, the client, the instance ...) is written out once and kept.
    """

    def __init__(self, *, with_query: bool = False) -> None:
        self._with_query = with_query
        self._numbers = [b"%d" % number for number in range(_NUMBERS)]
        self._second = self._last = -1
        self._clock = self._prefix = b""
        self._shared: dict[_Who, bytes] = {}
        # the loop's clock cannot be set, so lines keep the order of their requests
        self._zero = time.time() - time.monotonic()

    def line(self, record: RequestRecord) -> bytes:
        return self.lines([record])

    def lines(self, records: list[RequestRecord]) -> bytes:
        """The lines of a batch; one join for each, as what it is made of is mostly at hand."""
        lines: list[bytes] = []
        add, numbers, shared, with_query, zero = (
            lines.append,
            self._numbers,
            self._shared,
            self._with_query,
            self._zero,
        )
        last, prefix = self._last, self._prefix
        for (
            app, method, status, duration, upstream_secs, bytes_in, bytes_out, request_id, aborted,
            host, target, address, trace, backend, ended,
        ) in records:  # fmt: skip
            if last != (last := int((zero + ended) * 1000)):
                prefix = self._time(last)
            who = app, method, host, status, address, backend, aborted
            if not with_query and 0x3F in target:
                target = target[: target.index(b"?")]
            # neither can hold a control byte or anything beyond ASCII: the edge refuses such requests
            if 0x22 in target or 0x5C in target:
                target = _escaped(target)
            if request_id is not trace:
                trace = trace_id(trace)
                if 0x22 in request_id or 0x5C in request_id:
                    request_id = _escaped(request_id)
            taken, waited = int(duration * 1_000_000), int(upstream_secs * 1_000_000)
            add(_join((
                prefix, shared[who] if who in shared else self._learn(who), target,
                b'","duration_us":', numbers[taken] if taken < _NUMBERS else b"%d" % taken,
                b',"upstream_us":', numbers[waited] if waited < _NUMBERS else b"%d" % waited,
                b',"bytes_in":', numbers[bytes_in] if bytes_in < _NUMBERS else b"%d" % bytes_in,
                b',"bytes_out":', numbers[bytes_out] if bytes_out < _NUMBERS else b"%d" % bytes_out,
                b',"request_id":"', request_id, b'","trace_id":"', trace, b'"}\n',
            )))  # fmt: skip
        self._last, self._prefix = last, prefix
        return _join(lines)

    def _time(self, millisecond: int) -> bytes:
        """The beginning of the lines of a millisecond; a busy edge ends several requests in each."""
        second, rest = divmod(millisecond, 1000)
        if second != self._second:
            self._second = second
            self._clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).encode()
        return b'{"time":"%b.%03dZ",' % (self._clock, rest)

    def _learn(self, who: _Who) -> bytes:
        app, method, host, status, address, backend, aborted = who
        fields: dict[str, object] = {
            "app": app, "host": host.decode(), "method": method.decode(), "status": status,
            "client": address.decode(),
        }  # fmt: skip
        if backend is not None and backend.deployment_id:
            fields |= {"instance": backend.instance_id, "deployment_id": backend.deployment_id}
        if aborted:
            fields["aborted"] = True
        text = json.dumps(fields, separators=(",", ":"))[1:-1].encode() + b',"path":"'
        if len(self._shared) >= _MAX_KNOWN:
            self._shared.clear()
        self._shared[who] = text
        return text


class AccessLog:
    """`record` is what the edge calls; `start` and `close` bound the life of the thread that writes."""

    def __init__(
        self, path: Path | None, *, max_bytes: int = 100 * 1024 * 1024, keep: int = 5, with_query: bool = False
    ) -> None:
        """`path` None writes to standard output. `keep` older files of `max_bytes` each stay beside it."""
        self.dropped = 0
        """Lines that could not be written, since the start."""
        self.written = 0
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._format = LineFormat(with_query=with_query)
        self._records: list[RequestRecord] = []
        self.record = self._records.append
        self._batches: deque[tuple[bytes, int]] = deque()
        self._waiting = 0
        self._unsaid = 0
        self._wake = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._write_all, name="access log", daemon=True)
        self._timer: asyncio.TimerHandle | None = None
        self._file = -1
        self._size = 0
        self._complained = 0.0

    def start(self) -> None:
        """Raises OSError when the file cannot be opened."""
        self._open()
        self._thread.start()
        self._tick()

    async def close(self) -> None:
        """Write what is left."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._hand_over()
        self._ending = True
        self._wake.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        if self._file >= 0 and self._path is not None:
            os.close(self._file)
        self._file = -1

    def _tick(self) -> None:
        wait = _BUSY_TICK_SECS if len(self._records) >= _BUSY else _TICK_SECS
        self._hand_over()
        self._timer = asyncio.get_running_loop().call_later(wait, self._tick)

    def _hand_over(self) -> None:
        records = self._records
        if not records:
            return
        count = len(records)
        if self._waiting > _MAX_WAITING_BYTES:
            self.dropped += count
            self._unsaid += count
        else:
            batch = self._format.lines(records)
            if self._unsaid:
                batch = b'{"dropped_lines":%d}\n%b' % (self._unsaid, batch)
                self._unsaid = 0
            self._waiting += len(batch)
            self._batches.append((batch, count))
            self._wake.set()
        records.clear()

    # ---- in the thread

    def _write_all(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._batches:
                batch, count = self._batches.popleft()
                try:
                    self._write(batch)
                    self.written += count
                except OSError as error:
                    self.dropped += count
                    self._complain(error)
                self._waiting -= len(batch)
            if self._ending and not self._batches:
                return

    def _write(self, batch: bytes) -> None:
        if self._path is not None and self._size + len(batch) > self._max_bytes and self._size:
            self._rotate()
        if self._file < 0:
            self._open()
        view = memoryview(batch)
        while view:
            sent = os.write(self._file, view)
            self._size += sent
            view = view[sent:]

    def _rotate(self) -> None:
        assert self._path is not None
        os.close(self._file)
        self._file = -1
        for number in range(self._keep - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            if older.exists():
                older.replace(self._path.with_name(f"{self._path.name}.{number + 1}"))
        if self._keep:
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        else:
            self._path.unlink(missing_ok=True)
        self._open()

    def _open(self) -> None:
        if self._path is None:
            self._file = 1
            return
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size

    def _complain(self, error: OSError) -> None:
        """Once a minute: a full disk must not fill another log."""
        now = time.monotonic()
        if not self._complained or now - self._complained > 60:
            self._complained = now
            _log.warning("the access log cannot be written: %s; lines are dropped and counted", error)


def _escaped(text: bytes) -> bytes:
    return text.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
