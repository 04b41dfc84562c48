"""A reader of an instance's log that is told when there is more."""

from __future__ import annotations

from collections.abc import Callable

from aether.model.instance import LogRecord
from aether.runtimes.process.instance import ProcessInstance
from aether.runtimes.process.logs import LogReader


class Place:
    """Implements `InstanceLog` with the files of an instance; without `grew` it is over where they end for now."""

    def __init__(self, reader: LogReader, held: ProcessInstance | None, grew: Callable[[], None] | None) -> None:
        self._reader = reader
        self._held = held
        self._grew = grew
        if held is not None and grew is not None:
            held.watch(grew)

    @property
    def ended(self) -> bool:
        return self._held is None or self._held.gone

    def read(self) -> list[LogRecord]:
        return self._reader.read()

    def close(self) -> None:
        if self._held is not None and self._grew is not None:
            self._held.unwatch(self._grew)
        self._reader.close()
