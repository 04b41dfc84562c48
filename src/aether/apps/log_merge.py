"""Several logs as one in the order of their times, without holding more of each than a block; pure but for `fill`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from aether.apps.ports import InstanceLog
from aether.model.instance import LogRecord


@dataclass(frozen=True, slots=True)
class Source:
    """An instance whose log is read."""

    instance_id: str
    deployment_id: str
    digest: str
    release: int | None
    live: bool = False
    process: str = "web"


class LogLine(NamedTuple):
    record: LogRecord
    source: Source

    @property
    def time_ns(self) -> int:
        return self.record.time_ns


class Tap:
    """One log on its way into the merged stream."""

    __slots__ = ("lines", "log", "more", "over", "source")

    def __init__(self, source: Source, log: InstanceLog | None = None) -> None:
        self.source = source
        self.log = log
        self.lines: list[LogLine] = []
        """Read and not yet handed on."""
        self.more = True
        """Whether the log may hold lines that were not read."""
        self.over = False
        """Whether nothing will follow what was read."""


def fill(taps: Iterable[Tap]) -> None:
    """Read the next block of every log that has more and nothing waiting. Blocks; raises OSError."""
    for tap in taps:
        while tap.more and not tap.lines and tap.log is not None:
            tap.more = False  # before the read: a wake-up that comes meanwhile counts
            ended = tap.log.ended
            records = tap.log.read()
            if records:
                tap.more = True
                tap.lines = [LogLine(record, tap.source) for record in records]
            else:
                tap.over = ended


def due(taps: Sequence[Tap]) -> list[LogLine]:
    """Take what may be handed on: everything up to the moment from which on some log was not read yet."""
    holding = [tap for tap in taps if tap.lines]
    if len(holding) == 1:
        only = holding[0]
        lines, only.lines = only.lines, []
        return lines
    bound = min((tap.lines[-1].record.time_ns for tap in holding if tap.more), default=None)
    found: list[LogLine] = []
    for tap in holding:
        lines = tap.lines
        count = len(lines)
        if bound is not None:
            while count and lines[count - 1].record.time_ns > bound:
                count -= 1
        found += lines[:count]
        tap.lines = lines[count:]
    found.sort(key=attrgetter("time_ns"))
    return found
