"""Which database a server keeps its records in: a file of the data directory, or PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import sqlalchemy as sa

from aether.settings import Settings
from aether.stores.database.engine import Database

if TYPE_CHECKING:
    from aether.stores.database.signals import Signals


POOL_SIZE = 12
"""Connections of one server to PostgreSQL, besides the one for signals."""


def database_url(settings: Settings) -> str:
    return settings.database_url or f"sqlite+aiosqlite:///{settings.data_dir / 'aether.db'}"


def open_signals(settings: Settings, heard: Callable[[Sequence[str] | None], None]) -> Signals | None:
    """How servers of this database tell each other of changes; None where they have to look."""
    if not settings.database_url:
        return None
    from aether.stores.database.postgresql import Address
    from aether.stores.database.signals import Signals

    return Signals(Address(settings.database_url), heard)


async def found_in(settings: Settings) -> str:
    """The database in words, without changing anything in it. Raises ConfigError and ServiceUnavailable."""
    from aether.stores.database import schema

    database = Database(database_url(settings), pool_size=1)
    try:
        async with database.read() as tx:
            version = await tx.scalar(sa.text("SHOW server_version"))
            found = await tx.run_sync(schema.current)
    finally:
        await database.close()
    state = {None: "empty", schema.HEAD: f"schema {found}"}.get(found, f"schema {found}, which a start changes")
    return f"PostgreSQL {version} ({state})"


async def open_database(settings: Settings) -> Database:
    """The caller closes it. Raises ConfigError and ServiceUnavailable."""
    # a change takes one connection; what lasts takes none
    most = settings.max_concurrent_control or POOL_SIZE
    database = Database(database_url(settings), pool_size=min(POOL_SIZE, most) if settings.database_url else 6)
    try:
        await database.open()
    except BaseException:
        await database.close()
        raise
    return database
