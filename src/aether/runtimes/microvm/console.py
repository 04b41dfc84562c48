"""What a guest writes on its serial console, kept as the log of the instance: bounded in size and in speed.

The format is that of the logs of apps (`aether.runtimes.process.shim.journal`), so one reader reads both.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import cast

from aether.model.instance import LogRecord
from aether.runtimes.process.logs import LogReader
from aether.runtimes.process.shim.journal import Journal, Splitter

LOG_BYTES = 1 << 20
"""Of one file; one older one is kept."""
_BURST_BYTES, _PAUSE_SECS = 1 << 20, 1.0
"""More than this in one go is taken no faster than so much per pause: the guest has to wait for its own flood."""


class Console(asyncio.Protocol):
    """Reads a pipe to its end into `journal`; `done` is set then. Closing the journal is its owner's business."""

    def __init__(self, journal: Journal, stream: bytes) -> None:
        self._journal = journal
        self._splitter = Splitter()
        self._stream = stream
        self._transport: asyncio.ReadTransport | None = None
        self._taken = 0
        self._resume: asyncio.TimerHandle | None = None
        self.done = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are of no class of asyncio
        self._transport = cast("asyncio.ReadTransport", transport)

    def data_received(self, data: bytes) -> None:
        self._record(self._splitter.feed(data))
        self._taken += len(data)
        if self._resume is None:
            self._resume = asyncio.get_running_loop().call_later(_PAUSE_SECS, self._next)
        if self._taken > _BURST_BYTES and self._transport is not None:
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._resume is not None:
            self._resume.cancel()
        self._record(self._splitter.flush())
        self.done.set()

    def _record(self, pieces: list[tuple[bool, bytes]]) -> None:
        # kernels end their lines on a console as terminals want them
        self._journal.append(self._stream, [(complete, text.removesuffix(b"\r")) for complete, text in pieces])

    def _next(self) -> None:
        self._resume = None
        if self._taken > _BURST_BYTES and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
        self._taken = 0


def open_log(path: Path) -> Journal:
    return Journal(os.fsencode(path), LOG_BYTES)


def read_log(path: Path, tail: int) -> list[LogRecord]:
    """The last `tail` records of a log. Blocks for as long as the disk takes."""
    reader = LogReader(path)
    try:
        reader.start(tail)
        found: list[LogRecord] = []
        while batch := reader.read():
            found += batch
        return found
    finally:
        reader.close()
