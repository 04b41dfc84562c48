"""SQLite for an event loop: one thread switch per statement, one writer at a time, and how it is set.

aiosqlite runs every step of a cursor (open, execute, fetch, close) in its thread on its own, and each step
costs two thread switches, which on a busy server is most of the price of a query. The results of this server
are small, so a statement is run and fetched in one go. Everything else is left to aiosqlite and SQLAlchemy.

Settings and why:

- WAL, so that readers never wait for the writer.
- `synchronous=FULL`. NORMAL would already survive kill -9, because a committed page is in the kernel's cache;
  FULL also keeps acknowledged deployments through a power cut, for one fdatasync per commit (0.2 ms on an
  NVMe disk). The control plane commits tens of times per deployment, not thousands of times per second.
- `BEGIN IMMEDIATE` for writers: a transaction that reads first and upgrades later can fail halfway with
  SQLITE_BUSY and cannot be retried by the database; one that takes the lock first cannot.
- `secure_delete=ON`, so that what an update or a delete takes away is overwritten and not left in free pages.
- Writers of this process queue (`aether.stores.database.together`); SQLite's own busy handler sleeps and
  polls, which starves. The busy timeout remains for other processes (backup, a second server).
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, cast

import aiosqlite
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.model.errors import AetherError, ServiceUnavailable
from aether.stores.database.together import Together

BUSY_RETRY_SECS = 0.02


class _Outcome:
    """What a finished statement left; plain data, so that reading it needs no thread."""

    __slots__ = ("description", "lastrowid", "rowcount", "rows")

    def __init__(self, cursor: sqlite3.Cursor, rows: list[Any]) -> None:
        self.description = cursor.description
        self.rowcount = cursor.rowcount
        self.lastrowid = cursor.lastrowid
        self.rows = rows


class _Cursor:
    """The part of aiosqlite's cursor that SQLAlchemy uses."""

    def __init__(self, owner: _Connection, connection: sqlite3.Connection) -> None:
        self._owner = owner
        self._connection = connection
        self._outcome: _Outcome | None = None
        self.arraysize = 1

    async def __aenter__(self) -> _Cursor:
        return self

    @property
    def description(self) -> Any:
        return None if self._outcome is None else self._outcome.description

    @property
    def rowcount(self) -> int:
        return -1 if self._outcome is None else self._outcome.rowcount

    @property
    def lastrowid(self) -> int | None:
        return None if self._outcome is None else self._outcome.lastrowid

    async def execute(self, sql: str, parameters: Any = ()) -> _Cursor:
        def work() -> _Outcome:
            cursor = self._connection.execute(sql, parameters)
            outcome = _Outcome(cursor, cursor.fetchall() if cursor.description else [])
            # RETURNING knows the number of rows only when all are fetched.
            outcome.rowcount = cursor.rowcount
            cursor.close()
            return outcome

        self._outcome = work() if self._owner.brief else await self._owner.run(work)
        return self

    async def executemany(self, sql: str, parameters: Sequence[Any]) -> _Cursor:
        def work() -> _Outcome:
            cursor = self._connection.executemany(sql, parameters)
            outcome = _Outcome(cursor, [])
            cursor.close()
            return outcome

        self._outcome = work() if self._owner.brief else await self._owner.run(work)
        return self

    async def fetchall(self) -> list[Any]:
        if self._outcome is None:
            return []
        rows, self._outcome.rows = self._outcome.rows, []
        return rows

    async def close(self) -> None:
        return


class _Connection(aiosqlite.Connection):
    def __init__(self, connector: Callable[[], sqlite3.Connection]) -> None:
        super().__init__(connector, 64)
        # A server that ends by an exception must not hang on a connection that nobody closed.
        self._thread.daemon = True
        self.brief = False
        """Statements of the transaction touch a handful of rows each: they run where they are asked for."""

    def cursor(self) -> Any:
        return _Cursor(self, self._conn)

    async def run(self, work: Callable[[], Any]) -> Any:
        """In the connection's thread."""
        return await cast("Callable[..., Any]", self._execute)(work)  # pyright: ignore[reportUnknownMemberType]

    def at_once(self, sql: str) -> None:
        """Run what waits for nothing, such as a deferred BEGIN."""
        self._conn.execute(sql).close()

    async def rollback(self) -> None:
        if self.brief:
            self._conn.rollback()
        else:
            await super().rollback()


def connect(path: str, timeout_secs: float) -> aiosqlite.Connection:
    """An unopened connection, to be awaited. Transactions are left to the caller: nothing begins by itself."""
    return _Connection(
        lambda: sqlite3.connect(path, timeout=timeout_secs, isolation_level=None, check_same_thread=False)
    )


class SQLite:
    """What `aether.stores.database.engine` has to know of the one database and not of the other."""

    name = "sqlite"

    def __init__(self, url: str, timeout_secs: float) -> None:
        self.url = url
        self._path = sa.make_url(url).database or ""
        self._timeout = timeout_secs
        self.together = Together(timeout_secs, self.begin_write)

    @property
    def options(self) -> dict[str, Any]:
        return {"async_creator": lambda: connect(self._path, self._timeout)}

    def patient(self) -> None:
        return None

    def listen(self, engine: sa.Engine) -> None:
        event.listen(engine, "connect", _configure)
        event.listen(engine, "begin", _begin)
        event.listen(engine, "checkin", _no_longer_brief)

    async def prepare(self) -> None:
        """Make the file, for its owner alone, if there is none. Raises OSError."""
        if self._path:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))

    def turn(self) -> AbstractAsyncContextManager[None]:
        return self.together.turn()

    async def begin_read(self, connection: AsyncConnection, *, brief: bool) -> None:
        """Its first statement begins it."""
        if brief:
            raw: Any = (await connection.get_raw_connection()).driver_connection
            raw.brief = True

    async def begin_write(self, connection: AsyncConnection) -> None:
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
                await asyncio.sleep(BUSY_RETRY_SECS)

    def meaning(self, error: BaseException) -> AetherError | None:
        """What a failure means to whoever asked; None for one that is a bug of ours."""
        if isinstance(error, DBAPIError):
            if is_busy(error):
                return ServiceUnavailable("the database is locked by another process; try again")
            reason = _outage(error)
            return None if reason is None else ServiceUnavailable(reason)
        return ServiceUnavailable(f"the database cannot be reached: {error}")

    def is_spoilt(self, error: BaseException) -> bool:
        return False


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


def _configure(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "secure_delete=ON",
        "foreign_keys=ON",
        "cache_size=-4096",
        "temp_store=MEMORY",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    if connection.get_execution_options().get("aether_write", False):
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        cast("_Connection", connection.connection.driver_connection).at_once("BEGIN")


def _no_longer_brief(connection: Any, _record: Any) -> None:
    if connection is not None:
        connection.driver_connection.brief = False
