"""SQLite's writers: one at a time, first come first served, and brief ones in one transaction.

A flush to the disk takes longer than the statements of a brief write. So brief writers that wait at the same moment
share a transaction: each has a savepoint in it, sees what those before it did, and is told the outcome of the one
commit. Who begins it also queues its end, behind those that wait already; nobody waits for others to come. What one
of them raises takes back only its own part, and is told when the rest is committed, because it may rest on that.

Their statements run in the event loop's thread: each takes microseconds, and going to another thread and back takes
hundreds of them, most of all when the loop is busy. Beginning and committing wait for the disk and other processes,
and stay in the connection's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aether.model.errors import ServiceUnavailable
from aether.stores.database.ending import to_the_end

_log = structlog.stdlib.get_logger("aether.database")


class _Begin(Protocol):
    async def __call__(self, connection: AsyncConnection, /) -> None: ...


class _Shared:
    """One transaction of several writers. `done` is the outcome of its commit."""

    def __init__(self, connection: AsyncConnection, raw: Any) -> None:
        self.connection = connection
        self.raw = raw
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def broken(self) -> bool:
        """SQLite itself has taken everything back, as it does when the disk is full."""
        return not self.raw.in_transaction


class Together:
    """`begin` starts a writing transaction on a connection."""

    def __init__(self, timeout_secs: float, begin: _Begin) -> None:
        self._timeout = timeout_secs
        self._begin = begin
        self._lock = asyncio.Lock()
        self._open: _Shared | None = None
        self._ending: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[None]:
        """The turn of one writer of this process, alone. Raises ServiceUnavailable."""
        async with self._turn():
            await self._end()
            yield

    @asynccontextmanager
    async def member(self, engine: AsyncEngine) -> AsyncGenerator[AsyncConnection]:
        """One brief write, committed on leaving. Raises ServiceUnavailable."""
        refused: BaseException | None = None
        async with self._turn():
            if self._open is not None and self._open.broken:
                await self._end()
            first = self._open is None
            shared = self._open = self._open or await self._begun(engine)
            if not first:
                shared.raw.at_once("SAVEPOINT writer")
            try:
                yield shared.connection
            except BaseException as error:  # noqa: BLE001 - raised again below
                refused = error
                await to_the_end(self._take_back(shared, first=first))
            else:
                if not first:
                    shared.raw.at_once("RELEASE writer")
            if first and refused is None:
                ending = asyncio.create_task(self._end_in_turn(shared), name="commit")
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)
        if not first or refused is None:
            await to_the_end(shared.done)
        if refused is not None:
            raise refused

    async def close(self) -> None:
        """Wait for the end of what was written."""
        if self._ending:
            await asyncio.wait(self._ending)

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None]:
        try:
            async with asyncio.timeout(self._timeout):
                await self._lock.acquire()
        except TimeoutError:
            raise ServiceUnavailable("the database is busy: too many writers are waiting; try again") from None
        try:
            yield
        finally:
            self._lock.release()

    async def _begun(self, engine: AsyncEngine) -> _Shared:
        connection = await engine.connect()
        try:
            await self._begin(connection)
            raw: Any = (await connection.get_raw_connection()).driver_connection
        except BaseException:
            await to_the_end(connection.close())
            raise
        raw.brief = True
        return _Shared(connection, raw)

    async def _take_back(self, shared: _Shared, *, first: bool) -> None:
        if first:
            self._open = None
            await _give_back(shared)
        elif not shared.broken:
            shared.raw.at_once("ROLLBACK TO writer")
            shared.raw.at_once("RELEASE writer")

    async def _end_in_turn(self, shared: _Shared) -> None:
        async with self._lock:
            if self._open is shared:
                await self._end()

    async def _end(self) -> None:
        """Commit what is open; its writers are told how that went."""
        shared, self._open = self._open, None
        if shared is not None:
            await to_the_end(_commit(shared))


async def _commit(shared: _Shared) -> None:
    shared.raw.brief = False
    outcome: BaseException | None = None
    try:
        if shared.broken:
            outcome = ServiceUnavailable("the database took the change back: its disk is full or failing; try again")
        else:
            await shared.connection.commit()
    except BaseException as error:  # noqa: BLE001 - told to every writer
        outcome = error
    await _give_back(shared)
    if outcome is None:
        shared.done.set_result(None)
    else:
        shared.done.set_exception(outcome)
        shared.done.exception()  # seen, even when every writer was cancelled


async def _give_back(shared: _Shared) -> None:
    """Closing rolls back what was not committed."""
    try:
        await shared.connection.close()
    except DBAPIError as error:
        _log.debug("a transaction ended with its connection", error=str(error))
