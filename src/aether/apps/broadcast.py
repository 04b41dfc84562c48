"""Wakes the tasks of this process that wait for a row to change, so that nobody polls the database.

A wake-up says only "look again": the reader subscribes first, reads the database, and then waits; a change between
the two is therefore never missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager


class Broadcast:
    """Topics are ids of apps and deployments."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = {}

    def notify(self, *topics: str) -> None:
        for topic in topics:
            for event in self._waiting.get(topic, ()):
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
