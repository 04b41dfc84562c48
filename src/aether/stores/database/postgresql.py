"""PostgreSQL as the server speaks to it: its address, bounded waits, and what its failures mean to a caller.

The address keeps everything that libpq knows (TLS, several hosts, passfiles), because asyncpg reads it itself.

Every wait has an end, at the server and here:

- a connection is made within the caller's time-out, and so is a lock had (`lock_timeout`);
- a statement that takes longer than `STATEMENT_SECS` is broken off by the server, and given up here a little later,
  which also ends waiting for a server whose machine is gone;
- a transaction that does nothing for `IDLE_SECS` is ended by the server: one of ours never does, but a process that
  was frozen in the middle would keep its locks from everybody else.
"""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import urllib.parse
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.model.addresses import without_passwords
from aether.model.errors import AetherError, BadRequest, ConfigError, ServiceUnavailable

STATEMENT_SECS = 15.0
IDLE_SECS = 5.0
PATIENT_IDLE_SECS = 60.0
"""Of a change of the schema, which does more between its statements than talk to the database."""
_GIVE_UP_SECS = 5.0
"""How much longer than the server this side waits for the end of a statement."""
_SCHEMES = ("postgresql", "postgres", "postgresql+asyncpg")

_LOST = "the connection to the database was lost; try again"
_MEANINGS: dict[str, tuple[type[AetherError], str]] = {
    "08": (ServiceUnavailable, _LOST),
    "25P03": (ServiceUnavailable, _LOST),
    "57P01": (ServiceUnavailable, _LOST),
    "57P02": (ServiceUnavailable, _LOST),
    "57P03": (ServiceUnavailable, "the database is starting or stopping; try again"),
    "57P04": (ServiceUnavailable, _LOST),
    "57P05": (ServiceUnavailable, _LOST),
    "57014": (ServiceUnavailable, "the database took too long to answer; try again"),
    "55P03": (ServiceUnavailable, "the database is busy: another change holds what this one needs; try again"),
    "40": (ServiceUnavailable, "two changes got in each other's way and this one was taken back; try again"),
    "25006": (ServiceUnavailable, "the database is read-only: a standby, or on its way to be one; try again"),
    "53100": (ServiceUnavailable, "the disk that holds the database is full"),
    "53": (ServiceUnavailable, "the database has no connection or memory left; try again"),
    "58": (ServiceUnavailable, "the database cannot be used: its server has trouble with its disk"),
    "XX": (ServiceUnavailable, "the database cannot be used: its server has an internal error"),
    "28": (ConfigError, "the database refuses this login: see the user and the password in DATABASE_URL"),
    "3D000": (ConfigError, "there is no such database: see its name in DATABASE_URL, or make it with createdb"),
    "42501": (ConfigError, "the database's user may not do this: it must own the tables, or be let make them"),
    # asyncpg refuses numbers and texts that PostgreSQL would refuse before it sends them
    "22000": (BadRequest, "a value cannot be kept: a number that is too large, or a text that is no text"),
    "22021": (BadRequest, "a text holds a character that cannot be kept, such as NUL"),
    "22001": (BadRequest, "a text is longer than what can be kept"),
    "22003": (BadRequest, "a number is larger than what can be kept"),
}
"""By SQLSTATE or its class, the longest that fits."""


class Address:
    """A DATABASE_URL. Raises ConfigError when it cannot be one."""

    def __init__(self, url: str) -> None:
        scheme, found, rest = url.partition("://")
        if not found or scheme not in _SCHEMES:
            raise ConfigError("DATABASE_URL must begin with postgresql:// (or postgres://)")
        self.dsn = f"postgresql://{rest}"
        try:
            self._parts = urllib.parse.urlsplit(self.dsn)
            self._query = dict(urllib.parse.parse_qsl(self._parts.query, strict_parsing=bool(self._parts.query)))
        except ValueError as error:
            raise ConfigError(f"DATABASE_URL cannot be read: {error}") from None
        if self._parts.fragment:
            raise ConfigError("DATABASE_URL holds a '#': write it as %23")

    def with_database(self, name: str) -> Address:
        """Another database of the same server."""
        path = "/" + urllib.parse.quote(name, safe="")
        return Address(urllib.parse.urlunsplit(self._parts._replace(path=path)))

    @property
    def database(self) -> str:
        return urllib.parse.unquote(self._parts.path.removeprefix("/")) or self._query.get("dbname", "")

    @property
    def shown(self) -> str:
        """Without its password."""
        return without_passwords(self.dsn)

    async def connect(self, timeout_secs: float, *, patient: bool = False) -> asyncpg.Connection:
        """A connection of one's own, with the bounds that the module tells of; when `patient`, with none on
        statements. Raises ConfigError, what asyncpg raises and OSError; `meaning` knows them all."""
        given = {
            "application_name": "aether",
            "statement_timeout": "0" if patient else f"{STATEMENT_SECS * 1000:.0f}",
            "lock_timeout": f"{timeout_secs * 1000:.0f}",
            "idle_in_transaction_session_timeout": f"{(PATIENT_IDLE_SECS if patient else IDLE_SECS) * 1000:.0f}",
        }
        settings = {name: value for name, value in given.items() if name not in self._query}
        try:
            return await asyncpg.connect(
                self.dsn,
                timeout=timeout_secs,  # pyright: ignore[reportArgumentType]
                command_timeout=None if patient else STATEMENT_SECS + _GIVE_UP_SECS,
                server_settings=settings,
            )
        except OSError:
            raise  # some of what goes wrong with certificates is also a ValueError
        except ValueError as error:
            raise ConfigError(f"DATABASE_URL cannot be used: {error}") from None


class PostgreSQL:
    """What `aether.stores.database.engine` has to know of the one database and not of the other.

    Writers run side by side, each at READ COMMITTED: every statement sees the newest, and what a decision rests on is
    locked before it is read. Readers see one snapshot.
    """

    name = "postgresql"
    together = None

    def __init__(self, url: str, timeout_secs: float) -> None:
        self.address = Address(url)
        self._timeout = timeout_secs

    @property
    def url(self) -> str:
        return "postgresql+asyncpg://"

    @property
    def options(self) -> dict[str, Any]:
        return {"async_creator": lambda: self.address.connect(self._timeout)}

    def patient(self) -> dict[str, Any]:
        return {"async_creator": lambda: self.address.connect(self._timeout, patient=True)}

    def listen(self, engine: sa.Engine) -> None:
        event.listen(engine, "checkout", _check_open)

    async def prepare(self) -> None:
        """A database is made by whoever runs the server of it."""

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[None]:
        """Nobody has to wait: what must not meet is locked."""
        yield

    async def begin_read(self, connection: AsyncConnection, *, brief: bool) -> None:
        await connection.execution_options(isolation_level="REPEATABLE READ")

    async def begin_write(self, connection: AsyncConnection) -> None:
        await connection.execution_options(isolation_level="READ COMMITTED")

    def meaning(self, error: BaseException) -> AetherError | None:
        return meaning(error)

    def is_spoilt(self, error: BaseException) -> bool:
        """Whether the connection on which this happened must not be used again, although it may look alive."""
        cause = getattr(error, "orig", None) or error
        return isinstance(cause, TimeoutError) or getattr(cause, "sqlstate", None) == "25006"


def _check_open(connection: Any, _record: Any, _proxy: Any) -> None:
    """The pool notices by itself, without asking the server, that its connections were closed."""
    if connection.driver_connection.is_closed():
        raise InvalidatePoolError("the server has closed the connection")


def meaning(error: BaseException) -> AetherError | None:
    """What a failure of the driver means to whoever asked; None for one that is a bug of ours."""
    cause = getattr(error, "orig", None) or error
    cause = cause.__cause__ if isinstance(cause.__cause__, (asyncpg.PostgresError, asyncpg.InterfaceError)) else cause
    state: str = getattr(cause, "sqlstate", None) or ""
    for length in (5, 2):
        if (found := _MEANINGS.get(state[:length])) is not None:
            kind, message = found
            return kind(f"{message} ({cause})" if kind is ConfigError else message)
    if isinstance(cause, asyncpg.exceptions.InvalidCachedStatementError):
        return ServiceUnavailable("the schema of the database has just changed; try again")
    if getattr(error, "connection_invalidated", False) or isinstance(cause, asyncpg.InterfaceError):
        return ServiceUnavailable(_LOST)
    if isinstance(cause, TimeoutError):
        return ServiceUnavailable("the database did not answer in time; try again")
    if isinstance(cause, OSError):
        return ServiceUnavailable(f"the database cannot be reached: {cause}")
    return None
