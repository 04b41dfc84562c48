"""Transactions over a relational database named by a URL.

Callers see `read()` and `write()` and write SQLAlchemy Core; which database answers is known here and in the
migrations only. Schema changes are left to `aether.stores.database.schema`.

SQLite settings and why:

- WAL, so that readers never wait for the writer.
- `synchronous=FULL`. NORMAL would already survive kill -9, because a committed page is in the kernel's cache;
  FULL also keeps acknowledged deployments through a power cut, for one fdatasync per commit (0.2 ms on an
  NVMe disk). The control plane commits tens of times per deployment, not thousands of times per second.
- `BEGIN IMMEDIATE` for writers: a transaction that reads first and upgrades later can fail halfway with
  SQLITE_BUSY and cannot be retried by the database; one that takes the lock first cannot.
- Writers of this process queue on a lock, first come first served; SQLite's own busy handler sleeps and
  polls, which starves. The busy timeout remains for other processes (backup, a second server).
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from aether.model.errors import ServiceUnavailable
from aether.stores.database import sqlite

_T = TypeVar("_T")
_BUSY_RETRY_SECS = 0.02


class Database:
    """A bounded pool of connections with one queue of writers.

    `timeout_secs` bounds every wait for a connection, for the writers' turn and for another process's lock;
    past it the caller gets ServiceUnavailable.
    """

    def __init__(self, url: str, *, pool_size: int = 6, timeout_secs: float = 5.0) -> None:
        self.url = sa.make_url(url)
        self._timeout = timeout_secs
        self._is_sqlite = self.url.get_backend_name() == "sqlite"
        self._writers = asyncio.Lock()
        special: dict[str, Any] = {"pool_pre_ping": True}
        if self._is_sqlite:
            path = self.url.database or ""
            special = {"async_creator": lambda: sqlite.connect(path, timeout_secs)}
        self.engine = create_async_engine(
            self.url,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=timeout_secs,
            **special,
        )
        if self._is_sqlite:
            event.listen(self.engine.sync_engine, "connect", _configure_sqlite)
            event.listen(self.engine.sync_engine, "begin", _begin_sqlite)

    async def open(self) -> None:
        """Make the database file (0600) if absent and bring the schema to head. Raises ServiceUnavailable
        when the database does not answer and ConfigError when a newer Aether made it."""
        from aether.stores.database import schema

        if self._is_sqlite and self.url.database:
            os.close(os.open(self.url.database, os.O_RDWR | os.O_CREAT, 0o600))
        async with self._translated():
            await schema.upgrade(self)

    async def close(self) -> None:
        await self.engine.dispose()

    async def check(self) -> None:
        """Answer quickly whether the database can be read. Raises ServiceUnavailable."""
        async with self.read() as tx:
            await tx.execute(sa.text("SELECT 1"))

    @asynccontextmanager
    async def read(self) -> AsyncGenerator[AsyncConnection]:
        """One snapshot. Raises ServiceUnavailable when no connection is free or the database is away."""
        async with self._translated(), self.engine.connect() as connection:
            yield connection  # closing rolls back, shielded from cancellation

    @asynccontextmanager
    async def write(self) -> AsyncGenerator[AsyncConnection]:
        """One transaction that holds the write lock from its start; committed on leaving.

        Raises ServiceUnavailable when the lock cannot be had in time or the database is full or away; then
        nothing was written. A cancelled caller leaves either everything or nothing.
        """
        async with self._translated():
            if not self._is_sqlite:
                async with self.engine.connect() as connection, _ended(connection):
                    yield connection
                return
            await self._take_turn()
            try:
                async with self.engine.connect() as connection:
                    await self._begin_immediate(connection)
                    async with _ended(connection):
                        yield connection
            finally:
                self._writers.release()

    async def _take_turn(self) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._writers.acquire()
        except TimeoutError:
            raise ServiceUnavailable("the database is busy: too many writers are waiting; try again") from None

    async def _begin_immediate(self, connection: AsyncConnection) -> None:
        """BEGIN IMMEDIATE, again while another process holds the lock (SQLite gives up at once in some
        states, such as a WAL recovery under way, without consulting the busy timeout)."""
        await connection.execution_options(aether_write=True)
        deadline = asyncio.get_running_loop().time() + self._timeout
        while True:
            try:
                await connection.begin()
                return
            except DBAPIError as error:
                if not is_busy(error) or asyncio.get_running_loop().time() >= deadline:
                    raise
                await asyncio.sleep(_BUSY_RETRY_SECS)

    @asynccontextmanager
    async def _translated(self) -> AsyncGenerator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except PoolTimeout:
            raise ServiceUnavailable("the database is busy: no connection became free in time; try again") from None
        except DBAPIError as error:
            if is_busy(error):
                raise ServiceUnavailable("the database is locked by another process; try again") from error
            if (reason := _outage(error)) is not None:
                raise ServiceUnavailable(reason) from error
            raise
        except (sqlite3.OperationalError, OSError) as error:
            raise ServiceUnavailable(f"the database cannot be reached: {error}") from error


@asynccontextmanager
async def _ended(connection: AsyncConnection) -> AsyncGenerator[None]:
    """Commit on success, roll back on anything else; both run to their end even when the caller is cancelled,
    because a connection abandoned in the middle of a commit would leave the outcome unknown."""
    try:
        yield
    except BaseException:
        await _to_the_end(connection.rollback())
        raise
    await _to_the_end(connection.commit())


async def _to_the_end(work: Awaitable[_T]) -> _T:
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            # the caller's cancellation may arrive in the very step in which the work ends; it still counts
            cancelled = cancelled or not task.cancelled()
        except BaseException:  # noqa: BLE001 - the outcome is taken from the task below
            break
    if cancelled:
        if not task.cancelled():
            task.exception()
        raise asyncio.CancelledError
    return task.result()


def is_busy(error: DBAPIError) -> bool:
    """True when SQLite reports another connection's lock."""
    name = getattr(error.orig, "sqlite_errorname", "") or ""
    return name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


def _outage(error: DBAPIError) -> str | None:
    name = getattr(error.orig, "sqlite_errorname", "") or ""
    if name.startswith("SQLITE_FULL"):
        return "the disk that holds the database is full"
    if name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return f"the database cannot be used: {error.orig}"
    if error.connection_invalidated:
        return "the connection to the database was lost; try again"
    return None


def _configure_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "cache_size=-4096",
        "temp_store=MEMORY",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("aether_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
