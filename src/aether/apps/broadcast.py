"""Wakes the tasks of this process that wait for a row to change, so that nobody polls the database.

Where several servers share the database and can tell each other (`relay`), those of the others are woken too.

A wake-up says only "look again": the reader subscribes first, reads the database, and then waits; a change between
the two is therefore never missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager


class Broadcast:
    """Topics are ids of apps and deployments."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._overhearing: list[Callable[[Sequence[str] | None], None]] = []
        self.relay: Callable[[Sequence[str]], None] | None = None
        """Tells the other servers; returns at once."""

    def notify(self, *topics: str) -> None:
        self._wake(topics)
        if self.relay is not None:
            self.relay(topics)

    def heard(self, topics: Sequence[str] | None) -> None:
        """Another server has told of changes; None: anything may have changed."""
        if topics is None:
            self.notify_all()
        else:
            self._wake(topics)
        for call in self._overhearing:
            call(topics)

    def overhear(self, call: Callable[[Sequence[str] | None], None]) -> None:
        """Have `call` told of everything that other servers tell."""
        self._overhearing.append(call)

    def _wake(self, topics: Sequence[str]) -> None:
        for topic in topics:
            for event in self._waiting.get(topic, ()):
                event.set()

    def notify_all(self) -> None:
        """Anything may have changed: another process wrote to the database."""
        for events in self._waiting.values():
            for event in events:
                event.set()

    @contextmanager
    def subscribe(self, topic: str) -> Generator[asyncio.Event]:
        """An event set by every change from now on; the reader clears it before it looks."""
        event = asyncio.Event()
        self._waiting.setdefault(topic, set()).add(event)
        try:
            yield event
        finally:
            listeners = self._waiting[topic]
            listeners.discard(event)
            if not listeners:
                del self._waiting[topic]
