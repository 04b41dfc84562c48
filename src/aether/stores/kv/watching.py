"""Watches on the history of a key-value store: one reader of the file for all of them, and no change lost or doubled.

The tail reads every new change once and hands it to the watches whose prefix it has. A watch whose consumer is slower
than what its memory may hold, or that begins in the past, reads the history by itself until it has caught up with the
tail. Both are told apart by revisions only, which the event loop compares between its steps.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from aether.model.errors import AetherError
from aether.model.kv import Batch, Event
from aether.stores.kv import history
from aether.stores.local.file import SqliteFile

if TYPE_CHECKING:
    import sqlite3

HELD_EVENTS = 2048
HELD_BYTES = 4 << 20
"""Of changes that a watch keeps in memory for its consumer."""


class Tail:
    """Follows the file for as long as somebody watches."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file
        self._watches: set[Watch] = set()
        self._following: asyncio.Task[None] | None = None
        self.revision = 0
        """Up to which changes have been handed out."""

    async def join(self, watch: Watch) -> None:
        """Raises ServiceUnavailable."""
        if self._following is None or self._following.done():
            revision = await self._file.read(history.revision_of)
            if self._following is None or self._following.done():
                self.revision = revision
                self._following = asyncio.create_task(self._follow(), name="kv tail")
        self._watches.add(watch)

    async def leave(self, watch: Watch) -> None:
        self._watches.discard(watch)
        if not self._watches:
            await self.close()

    async def close(self) -> None:
        following, self._following = self._following, None
        if following is not None:
            following.cancel()
            await asyncio.wait((following,))

    async def _follow(self) -> None:
        try:
            while True:
                seen = self._file.changes
                batch, all_told = await self._file.read(self._next)
                self.revision = batch.revision
                for watch in self._watches:
                    watch.hand(batch)
                if all_told:
                    await self._file.changed(seen)
        except AetherError as error:
            for watch in self._watches:
                watch.fail(error)

    def _next(self, db: sqlite3.Connection) -> tuple[Batch, bool]:
        return history.changes(db, self.revision + 1, b"")


class Watch(AsyncIterator[Batch]):
    """One consumer's place in the history, as `aether.model.kv.KV.watch` promises it."""

    def __init__(self, file: SqliteFile, tail: Tail, prefix: str, position: int, progress_secs: float) -> None:
        self._file = file
        self._tail = tail
        self._prefix = prefix
        self._position = position
        """Changes before this revision have been told, or were not asked for."""
        self._progress = progress_secs
        self._held: deque[tuple[Batch, int]] = deque()
        self._held_events = self._held_bytes = 0
        self._behind = True
        """It reads the history by itself; what the tail hands out is not for it yet."""
        self._failure: AetherError | None = None
        self._came = asyncio.Event()

    async def open(self) -> None:
        """Raises ServiceUnavailable."""
        await self._tail.join(self)
        if not self._position:
            self._reach(await self._file.read(history.revision_of))

    async def close(self) -> None:
        await self._tail.leave(self)

    def hand(self, batch: Batch) -> None:
        """The tail's next changes; those of other prefixes among them."""
        if self._behind:
            # wakes nobody: whoever is behind is reading, and looks at the tail's revision when that is done
            return
        events = tuple(e for e in batch.events if e.kv.key.startswith(self._prefix) and self._is_due(e))
        if not events:
            if not self._held:
                # or it would have to look for what it has missed among changes that are forgotten meanwhile
                self._position = max(self._position, batch.revision + 1)
            return
        size = sum(len(event.kv.value) + history.ROW_BYTES for event in events)
        if self._held_events + len(events) > HELD_EVENTS or self._held_bytes + size > HELD_BYTES:
            self._behind = True
            self._held.clear()
            self._held_events = self._held_bytes = 0
        else:
            self._held.append((Batch(batch.revision, events), size))
            self._held_events += len(events)
            self._held_bytes += size
        self._came.set()

    def fail(self, error: AetherError) -> None:
        self._failure = error
        self._came.set()

    async def __anext__(self) -> Batch:
        while True:
            if self._held:
                batch, size = self._held.popleft()
                self._held_events -= len(batch.events)
                self._held_bytes -= size
                self._position = batch.revision + 1
                return batch
            if self._failure is not None:
                raise self._failure
            if self._behind:
                batch, _ = await self._file.read(self._next)
                self._reach(batch.revision)
                if batch.events:
                    return batch
                continue
            if not await self._something_came():
                # the file itself is asked: a notice says that the store answers
                await self._file.read(history.revision_of)
                if not (self._held or self._behind or self._failure):
                    self._position = max(self._position, self._tail.revision + 1)
                    return Batch(self._position - 1)

    async def _something_came(self) -> bool:
        self._came.clear()
        if self._held or self._behind or self._failure:
            return True
        try:
            async with asyncio.timeout(self._progress or None):
                await self._came.wait()
        except TimeoutError:
            return False
        return True

    def _reach(self, revision: int) -> None:
        """Everything up to `revision` has been told: take the rest from the tail, unless that is further already."""
        self._position = revision + 1
        self._behind = self._tail.revision > revision

    def _is_due(self, event: Event) -> bool:
        return event.kv.mod_revision >= self._position

    def _next(self, db: sqlite3.Connection) -> tuple[Batch, bool]:
        return history.changes(db, self._position, self._prefix.encode())
