"""Transactions over a relational database named by a URL.

Callers see `read()` and `write()` and write SQLAlchemy Core. What SQLite and PostgreSQL want each is in the modules
named after them; schema changes are left to `aether.stores.database.schema`.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from aether.model.database import alongside
from aether.model.errors import AetherError, ServiceUnavailable
from aether.stores.database import sqlite
from aether.stores.database.ending import to_the_end
from aether.stores.database.together import Together

if TYPE_CHECKING:
    from aether.stores.database.postgresql import PostgreSQL

_log = structlog.stdlib.get_logger("aether.database")
_SCRUBBED = 1
"""SQLite's user_version of a database that holds nothing from before variables were sealed."""


class Kind(Protocol):
    """One of the two databases."""

    @property
    def name(self) -> str: ...

    @property
    def url(self) -> str: ...

    @property
    def options(self) -> dict[str, Any]: ...

    def patient(self) -> dict[str, Any] | None:
        """Options of an engine whose statements are not broken off; None when none is."""
        ...

    def listen(self, engine: sa.Engine) -> None: ...

    async def prepare(self) -> None: ...

    @property
    def together(self) -> Together | None:
        """What brief writers share; None where each has a transaction of its own."""
        ...

    def turn(self) -> AbstractAsyncContextManager[None]: ...

    async def begin_read(self, connection: AsyncConnection, *, brief: bool) -> None: ...

    async def begin_write(self, connection: AsyncConnection) -> None: ...

    def meaning(self, error: BaseException) -> AetherError | None: ...

    def is_spoilt(self, error: BaseException) -> bool: ...


class Database:
    """A bounded pool of connections to `sqlite+aiosqlite:///FILE` or `postgresql://...`.

    `timeout_secs` bounds every wait for a connection, for the writers' turn and for another's lock; past it the
    caller gets ServiceUnavailable. Raises ConfigError for a URL that is none.
    """

    def __init__(self, url: str, *, pool_size: int = 6, timeout_secs: float = 5.0) -> None:
        self._timeout = timeout_secs
        self.kind: Kind = (
            sqlite.SQLite(url, timeout_secs) if url.startswith("sqlite") else _postgresql(url, timeout_secs)
        )
        self.engine = create_async_engine(
            self.kind.url,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=timeout_secs,
            hide_parameters=True,  # what is written must not get into a log by way of an error
            **self.kind.options,
        )
        self.kind.listen(self.engine.sync_engine)

    async def open(self) -> None:
        """Make SQLite's file (0600) if absent and bring the schema to head. Raises ServiceUnavailable when the
        database does not answer and ConfigError when it refuses this server or a newer Aether made it."""
        from aether.stores.database import schema

        await self.kind.prepare()
        # SQLite gives up at once, without the busy timeout, while another process turns a new file into WAL
        deadline = asyncio.get_running_loop().time() + self._timeout
        while True:
            try:
                async with self._translated():
                    await schema.upgrade(self)
                return
            except ServiceUnavailable as error:
                late = asyncio.get_running_loop().time() >= deadline
                if late or not (isinstance(error.__cause__, DBAPIError) and sqlite.is_busy(error.__cause__)):
                    raise
                await asyncio.sleep(sqlite.BUSY_RETRY_SECS)

    async def scrub(self) -> None:
        """Once in a database's life: rewrite it without what older versions left in free pages and in the log.

        Noted in the file itself, so that a start broken off in the middle does it again. PostgreSQL has its vacuum.
        """
        if self.kind.name != "sqlite":
            return
        async with self._translated(), self.kind.turn(), self.engine.connect() as connection:
            raw = (await connection.get_raw_connection()).driver_connection
            assert raw is not None
            [[version]] = await (await raw.execute("PRAGMA user_version")).fetchall()
            if version >= _SCRUBBED:
                return
            await raw.execute("VACUUM")
            await raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            await raw.execute(f"PRAGMA user_version={_SCRUBBED}")

    async def close(self) -> None:
        if self.kind.together is not None:
            await self.kind.together.close()
        await self.engine.dispose()

    async def check(self) -> None:
        """Answer quickly whether the database can be read. Raises ServiceUnavailable."""
        async with self.read() as tx:
            await tx.execute(sa.text("SELECT 1"))

    @asynccontextmanager
    async def read(self, *, brief: bool = False) -> AsyncGenerator[AsyncConnection]:
        """One snapshot. Raises ServiceUnavailable when no connection is free or the database is away."""
        async with self._translated(), self.engine.connect() as connection:
            await self.kind.begin_read(connection, brief=brief)
            try:
                yield connection  # closing rolls back, shielded from cancellation
            except Exception as error:
                await self._discard_if_spoilt(connection, error)
                raise

    @asynccontextmanager
    async def write(self, *, brief: bool = False) -> AsyncGenerator[AsyncConnection]:
        """One transaction, committed on leaving; see `aether.model.database` for what it may rely on.

        Raises ServiceUnavailable when what it needs cannot be had in time or the database is full or away; then
        nothing was written, or, when the connection was lost in the very commit, everything may have been. A
        cancelled caller leaves either everything or nothing.
        """
        async with self._translated(), self._begun(brief) as connection:
            yield connection
            if (more := alongside.get()) is not None:
                await more(connection)

    @asynccontextmanager
    async def _begun(self, brief: bool) -> AsyncGenerator[AsyncConnection]:
        if brief and self.kind.together is not None:
            async with self.kind.together.member(self.engine) as connection:
                yield connection
            return
        async with self.kind.turn(), self.engine.connect() as connection:
            await self.kind.begin_write(connection)
            async with self._ended(connection):
                yield connection

    @asynccontextmanager
    async def patient(self) -> AsyncGenerator[AsyncConnection]:
        """As `write`, but a statement may take as long as it takes: for changes of the schema."""
        patient = self.kind.patient()
        if patient is None:
            async with self.write() as tx:
                yield tx
            return
        engine = create_async_engine(self.kind.url, poolclass=sa.NullPool, **patient)
        try:
            async with self._translated(), engine.connect() as connection:
                await self.kind.begin_write(connection)
                async with self._ended(connection):
                    yield connection
        finally:
            await engine.dispose()

    @asynccontextmanager
    async def _ended(self, connection: AsyncConnection) -> AsyncGenerator[None]:
        """Commit on success, roll back on anything else; both run to their end even when the caller is cancelled,
        because a connection abandoned in the middle of a commit would leave the outcome unknown."""
        try:
            yield
        except BaseException as error:
            if not await self._discard_if_spoilt(connection, error):
                await to_the_end(self._roll_back(connection))
            raise
        try:
            await to_the_end(connection.commit())
        except Exception as error:
            await self._discard_if_spoilt(connection, error)
            raise

    async def _roll_back(self, connection: AsyncConnection) -> None:
        """What made it necessary is what the caller is told."""
        try:
            await connection.rollback()
        except (DBAPIError, OSError) as error:
            _log.debug("a transaction ended with its connection", error=str(error))
            await connection.invalidate()

    async def _discard_if_spoilt(self, connection: AsyncConnection, error: BaseException) -> bool:
        """A connection that is no good any more is given back to nobody."""
        if not self.kind.is_spoilt(error):
            return False
        await to_the_end(connection.invalidate())
        return True

    @asynccontextmanager
    async def _translated(self) -> AsyncGenerator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except PoolTimeout:
            raise ServiceUnavailable("the database is busy: no connection became free in time; try again") from None
        except AetherError:
            raise
        except (DBAPIError, sqlite3.OperationalError, OSError) as error:
            if (told := self.kind.meaning(error)) is None:
                raise
            raise told from error
        except Exception as error:
            # asyncpg's own, which nobody wraps while a connection is made
            if not type(error).__module__.startswith("asyncpg.") or (told := self.kind.meaning(error)) is None:
                raise
            raise told from error


def _postgresql(url: str, timeout_secs: float) -> PostgreSQL:
    from aether.stores.database.postgresql import PostgreSQL

    return PostgreSQL(url, timeout_secs)
