"""Bring a database to this build's schema: forward only, under a lock, when the server starts.

`HEAD` is asserted by a test to be the newest migration, so that a start at head compares two strings and
never imports Alembic. The whole upgrade is one transaction: on SQLite its write lock, on PostgreSQL an
advisory lock keeps a second server waiting until the first is done.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from aether.model.errors import ConfigError, ServiceUnavailable

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy.ext.asyncio import AsyncConnection

    from aether.stores.database.engine import Database

HEAD = "0016"
MIGRATIONS = Path(__file__).parent / "migrations"
WAIT_SECS = 120.0
"""How long a start waits for another one that changes the schema."""
_AGAIN_SECS = 0.1
_ADVISORY_LOCK = 0x0AE7_4E12


async def upgrade(database: Database) -> None:
    """Run the missing migrations. Raises ConfigError when the schema is newer than this build knows."""
    async with database.read() as tx:
        if await tx.run_sync(current) == HEAD:
            return
    async with database.patient() as tx:
        if tx.dialect.name == "postgresql":
            await _take_lock(tx)
        await tx.run_sync(_migrate)


async def _take_lock(tx: AsyncConnection) -> None:
    """Asked for again and again, because a wait at the server ends with the time that any lock may take."""
    deadline = asyncio.get_running_loop().time() + WAIT_SECS
    query = sa.text("SELECT pg_try_advisory_xact_lock(:key)")
    while not await tx.scalar(query, {"key": _ADVISORY_LOCK}):
        if asyncio.get_running_loop().time() >= deadline:
            raise ServiceUnavailable("another server has been changing the schema of the database for minutes")
        await asyncio.sleep(_AGAIN_SECS)


def current(connection: sa.Connection) -> str | None:
    """The schema version of the database, None for an empty one."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def config(connection: sa.Connection | None = None) -> Config:
    """Alembic's configuration without a file; commands run on `connection`, inside its transaction."""
    from alembic.config import Config

    made = Config()
    made.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    made.attributes["connection"] = connection
    return made


def _migrate(connection: sa.Connection) -> None:
    found = current(connection)
    if found == HEAD:
        return
    from alembic import command
    from alembic.script import ScriptDirectory

    settings = config(connection)
    known = {script.revision for script in ScriptDirectory.from_config(settings).walk_revisions()}
    if found is not None and found not in known:
        raise ConfigError(
            f"the database has schema {found}, made by a newer Aether; this one knows {HEAD}: update it"
        )
    command.upgrade(settings, "head")
