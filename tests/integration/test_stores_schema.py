"""The migrations produce exactly the tables that the code declares, on both databases."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from aether.identity.secrets import hash_token
from aether.identity.service import Identity
from aether.model.errors import ConfigError
from aether.model.times import now_us
from aether.settings import StaticToken
from aether.stores.database import schema
from aether.stores.database.engine import Database
from aether.stores.database.tables import metadata
from support.databases import KINDS, Databases, connected


def database_at(folder: Path) -> Database:
    return Database(f"sqlite+aiosqlite:///{folder}/aether.db")


@pytest.fixture(params=KINDS)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database in which there is nothing, not even the schema."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path}/aether.db"
        return
    databases: Databases = request.getfixturevalue("postgresql")
    url = databases.empty()
    yield url
    databases.drop(url)


def test_head_is_the_newest_migration() -> None:
    assert ScriptDirectory.from_config(schema.config()).get_heads() == [schema.HEAD]


async def test_the_schema_does_not_drift(empty_url: str) -> None:
    database = connected(empty_url)
    await database.open()

    def differences(connection: sa.Connection) -> list[object]:
        options = {"compare_type": True, "compare_server_default": True}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))

    async with database.read() as tx:
        assert await tx.run_sync(differences) == []
        checks = await tx.run_sync(lambda c: {x["name"] for x in sa.inspect(c).get_check_constraints("deployments")})
    await database.close()
    assert checks == {"ck_deployments_status", "ck_deployments_strategy"}


async def test_the_database_file_is_private(tmp_path: Path) -> None:
    database = database_at(tmp_path)
    await database.open()
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    await database.close()


async def test_two_servers_may_start_at_once(empty_url: str) -> None:
    databases = [connected(empty_url) for _ in range(4)]
    await asyncio.gather(*(database.open() for database in databases))
    for database in databases:
        async with database.read() as tx:
            assert await tx.run_sync(schema.current) == schema.HEAD
        await database.close()


async def test_a_newer_schema_is_refused(database: Database) -> None:
    async with database.write() as tx:
        await tx.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match="newer Aether"):
        await database.open()


async def test_migrations_keep_what_there_is(empty_url: str) -> None:
    rows = (
        ("applications", {"id": "a", "name": "a", "owner": "o", "created_at": 1}),
        ("artifacts", {"id": "f", "app_id": "a", "digest": "d", "size_bytes": 1, "status": "stored",
                       "storage_key": "k", "created_at": 1}),
        ("deployments", {"id": "d", "app_id": "a", "artifact_id": "f", "digest": "d", "config_version": 0,
                         "status": "active", "strategy": "rolling", "command": "c", "timeout_secs": 1.0,
                         "created_by": "o", "created_at": 1}),
        ("deployment_events", {"deployment_id": "d", "phase": "active", "message": "m", "timestamp": 1}),
        ("instances", {"id": "i", "app_id": "a", "deployment_id": "d", "status": "ready", "created_at": 1}),
    )  # fmt: skip
    database = connected(empty_url)
    await database.kind.prepare()

    def old(connection: sa.Connection) -> None:
        command.upgrade(schema.config(connection), "0001")
        for table, values in rows:
            names, places = ", ".join(values), ", ".join(f":{name}" for name in values)
            connection.execute(sa.text(f"INSERT INTO {table} ({names}) VALUES ({places})"), values)

    async with database.write() as tx:
        await tx.run_sync(old)
    await database.open()
    async with database.read() as tx:
        assert await tx.run_sync(schema.current) == schema.HEAD
        for table, _ in rows:
            assert (await tx.execute(sa.text(f"SELECT count(*) FROM {table}"))).scalar() == 1, table
    await database.close()


async def test_a_start_at_head_does_not_load_alembic(database_url: str) -> None:
    script = (
        "import asyncio, sys\n"
        "from aether.stores.database.engine import Database\n"
        "async def main():\n"
        f"    database = Database('{database_url}')\n"
        "    await database.open()\n"
        "    await database.close()\n"
        "asyncio.run(main())\n"
        "sys.exit('alembic' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


async def test_apps_and_tokens_from_before_there_were_users_stay_usable(empty_url: str) -> None:
    database = connected(empty_url)
    await database.kind.prepare()

    def first(connection: sa.Connection) -> None:
        command.upgrade(schema.config(connection), "0001")
        connection.execute(
            sa.text("INSERT INTO applications (id, name, owner, created_at) VALUES ('a', 'shop', 'ann', 1)")
        )
        insert = "INSERT INTO tokens (id, token_hash, name, role, kind, created_at, expires_at) VALUES "
        hashed = hash_token("aes_old")
        connection.execute(sa.text(f"{insert} ('t', '{hashed}', 'admin', 'admin', 'session', 1, {now_us() * 2})"))

    async with database.write() as tx:
        await tx.run_sync(first)
    await database.open()
    identity = Identity(database, [StaticToken("plain", "deployer", "dan")])
    for token in ("aes_old", "plain"):
        caller = await identity.tokens.authenticate(token)
        assert caller.owner == "default"
        await identity.ownership.check_app(caller, "shop")
    async with database.read() as tx:
        assert (await tx.execute(sa.text("SELECT name, owner FROM applications"))).all() == [("shop", "default")]
    await database.close()
