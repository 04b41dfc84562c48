"""The queue of one machine: a SQLite file that every process there opens for itself.

What is decided is in `aether.stores.queue.entries`, how processes share the file and are woken in
`aether.stores.local.file`. The time of a delivery counts on a clock that nobody can set, under the name of the
machine's current boot: whoever had something before the machine was started anew has it no more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from aether.model import queue
from aether.model.errors import BadRequest, DeliveryLost
from aether.model.times import now_us
from aether.stores.local.file import SqliteFile
from aether.stores.local.uptime import boot_id, uptime
from aether.stores.queue import entries

if TYPE_CHECKING:
    import sqlite3

_T = TypeVar("_T")


class SqliteQueue:
    """A driver of `aether.model.queue.Queue`. `boot` and `now` are the clock of its deliveries."""

    def __init__(
        self,
        path: Path,
        limits: queue.Limits = queue.Limits(),
        *,
        patience_secs: float = 5.0,
        boot: Callable[[], str] = boot_id,
        now: Callable[[], float] = uptime,
    ) -> None:
        self.limits = limits
        self._file = SqliteFile(path, entries.LAYOUT, entries.VERSION, patience_secs=patience_secs)
        self._boot = boot
        self._now = now
        self._turns: dict[str, asyncio.Lock] = {}
        """Who waits for a topic waits in line, so that one message wakes one consumer of this process."""
        self._undoing: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Raises ServiceUnavailable."""
        await self._file.open()

    async def close(self) -> None:
        if self._undoing:
            await asyncio.wait(self._undoing)
        await self._file.close()

    async def enqueue(self, topic: str, body: bytes, *, dedupe: str = "") -> queue.Enqueued:
        queue.check_name(topic, "topic")
        queue.check_dedupe(dedupe)
        queue.check_body(body)
        return await self._write(lambda db, at: entries.enqueue(db, at, self.limits, topic, body, dedupe))

    async def take(
        self, topic: str, consumer: str, *, limit: int = 1, wait_secs: float = 0.0
    ) -> Sequence[queue.Delivery]:
        _check(topic, consumer, limit)
        until = asyncio.get_running_loop().time() + wait_secs
        if (found := await self._take(topic, consumer, limit)) or wait_secs <= 0:
            return found
        turn = self._turns.setdefault(topic, asyncio.Lock())
        try:
            async with asyncio.timeout_at(until):
                await turn.acquire()
        except TimeoutError:
            return []
        try:
            while True:
                seen = self._file.changes
                if found := await self._take(topic, consumer, limit):
                    return found
                try:
                    async with asyncio.timeout_at(until):
                        await self._file.changed(seen)
                except TimeoutError:
                    return []
        finally:
            turn.release()
            if not turn.locked():
                self._turns.pop(topic, None)

    async def claim_stale(self, topic: str, consumer: str, *, limit: int = 1) -> Sequence[queue.Delivery]:
        _check(topic, consumer, limit)
        return await self._delivered(
            lambda db, at: entries.claim_stale(db, at, self.limits, topic, consumer, limit),
            undo=entries.give_back_all,
        )

    async def extend(self, delivery: queue.Delivery) -> None:
        if not await self._write(lambda db, at: entries.extend(db, at, self.limits, delivery)):
            raise DeliveryLost(f"message {delivery.message.id} is no longer {delivery.consumer}'s")

    async def acknowledge(self, delivery: queue.Delivery) -> bool:
        return await self._file.write(lambda db: entries.acknowledge(db, delivery))

    async def give_back(self, delivery: queue.Delivery) -> bool:
        return await self._file.write(lambda db: entries.give_back(db, delivery))

    async def bury(self, delivery: queue.Delivery, reason: str) -> bool:
        return await self._write(lambda db, at: entries.bury(db, at, self.limits, delivery, reason))

    async def forfeit(self, topic: str, consumer: str) -> int:
        _check(topic, consumer, 1)
        return await self._file.write(lambda db: entries.forfeit(db, topic, consumer))

    async def dead(self, topic: str, *, after: str = "", limit: int = 100) -> Sequence[queue.DeadLetter]:
        queue.check_name(topic, "topic")
        queue.check_limit(limit)
        behind = _number(after) if after else 0
        return await self._file.read(lambda db: entries.dead(db, topic, behind, limit))

    async def redrive(self, topic: str, message_id: str) -> queue.Enqueued:
        number = _number(message_id)
        return await self._write(lambda db, at: entries.redrive(db, at, self.limits, topic, number))

    async def discard(self, topic: str, message_id: str) -> bool:
        number = _number(message_id)
        return await self._file.write(lambda db: entries.discard(db, topic, number))

    async def lengths(self, topic: str) -> queue.Lengths:
        queue.check_name(topic, "topic")
        return await self._file.read(lambda db: entries.lengths(db, topic))

    # ---

    async def _take(self, topic: str, consumer: str, limit: int) -> list[queue.Delivery]:
        # whoever finds nothing must not have to write for it
        if not await self._file.read(lambda db: entries.any_waiting(db, topic)):
            return []
        return await self._delivered(
            lambda db, at: entries.take(db, at, self.limits, topic, consumer, limit), entries.untake
        )

    async def _delivered(
        self,
        work: Callable[[sqlite3.Connection, entries.Moment], list[queue.Delivery]],
        undo: Callable[[sqlite3.Connection, list[queue.Delivery]], None],
    ) -> list[queue.Delivery]:
        """Cancelled, what was delivered to nobody is given back at once and not only after its time."""
        delivering = asyncio.create_task(self._write(work), name="queue delivers")
        try:
            return await asyncio.shield(delivering)
        except asyncio.CancelledError:
            undoing = asyncio.create_task(self._undo(delivering, undo), name="queue takes back")
            self._undoing.add(undoing)
            undoing.add_done_callback(self._undoing.discard)
            raise

    async def _undo(
        self,
        delivering: asyncio.Task[list[queue.Delivery]],
        undo: Callable[[sqlite3.Connection, list[queue.Delivery]], None],
    ) -> None:
        await asyncio.wait((delivering,))
        if not delivering.cancelled() and delivering.exception() is None and delivering.result():
            await self._file.write(lambda db: undo(db, delivering.result()))

    async def _write(self, work: Callable[[sqlite3.Connection, entries.Moment], _T]) -> _T:
        # the clock is looked at once the transaction is the only one, not before its turn has come
        return await self._file.write(lambda db: work(db, entries.Moment(self._boot(), self._now(), now_us())))


def _check(topic: str, consumer: str, limit: int) -> None:
    queue.check_name(topic, "topic")
    queue.check_name(consumer, "consumer's name")
    queue.check_limit(limit)


def _number(message_id: str) -> int:
    if not message_id.isdecimal() or len(message_id) > 18:
        raise BadRequest(f"'{message_id[:40]}' is no id of a message")
    return int(message_id)
