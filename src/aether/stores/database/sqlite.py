"""SQLite for an event loop, with one thread switch per statement.

aiosqlite runs every step of a cursor (open, execute, fetch, close) in its thread on its own, and each step
costs two thread switches, which on a busy server is most of the price of a query. The results of this server
are small, so a statement is run and fetched in one go. Everything else is left to aiosqlite and SQLAlchemy.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, cast

import aiosqlite


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

    def __init__(self, run: Callable[..., Any], connection: sqlite3.Connection) -> None:
        self._run = run
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

        self._outcome = await self._run(work)
        return self

    async def executemany(self, sql: str, parameters: Sequence[Any]) -> _Cursor:
        def work() -> _Outcome:
            cursor = self._connection.executemany(sql, parameters)
            outcome = _Outcome(cursor, [])
            cursor.close()
            return outcome

        self._outcome = await self._run(work)
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

    def cursor(self) -> Any:
        run = cast("Callable[..., Any]", self._execute)  # pyright: ignore[reportUnknownMemberType]
        return _Cursor(run, self._conn)


def connect(path: str, timeout_secs: float) -> aiosqlite.Connection:
    """An unopened connection, to be awaited. Transactions are left to the caller: nothing begins by itself."""
    return _Connection(
        lambda: sqlite3.connect(path, timeout=timeout_secs, isolation_level=None, check_same_thread=False)
    )
