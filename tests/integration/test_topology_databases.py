"""What the doctor says of a database, and that nothing shows its password."""

from __future__ import annotations

from pathlib import Path

import pytest

from aether.model.errors import LocalIOError
from aether.settings import load
from aether.stores.database import schema
from aether.topology.backups import offline
from aether.topology.databases import open_database
from aether.topology.doctor import _database
from support.databases import Databases, rows


def test_the_doctor_names_what_there_is_and_changes_nothing(postgresql: Databases, tmp_path: Path) -> None:
    empty, full = postgresql.empty(), postgresql.fresh()
    found = _database(load({"DATABASE_URL": empty}, data_dir=tmp_path))
    assert (found.status, "(empty)" in found.message) == ("ok", True)
    assert rows(empty, "select count(*) from pg_tables where schemaname = 'public'") == [(0,)]
    found = _database(load({"DATABASE_URL": full}, data_dir=tmp_path))
    assert f"(schema {schema.HEAD})" in found.message
    assert "PostgreSQL 1" in found.message
    assert "aether.db" in _database(load({}, data_dir=tmp_path)).message
    for url in (empty, full):
        postgresql.drop(url)


def test_a_database_that_is_away_is_a_failure_without_its_password(tmp_path: Path) -> None:
    settings = load({"DATABASE_URL": "postgresql://ann:s3cret@127.0.0.1:1/aether"}, data_dir=tmp_path)
    found = _database(settings)
    assert found.status == "fail"
    assert "cannot be reached" in found.message
    shown = settings.masked()["AETHER_DATABASE_URL"]
    assert shown == "postgresql://ann:****@127.0.0.1:1/aether"
    assert "s3cret" not in found.message + repr(settings) + str(settings.masked())


async def test_the_pool_is_no_larger_than_what_may_be_changed_at_once(postgresql: Databases, tmp_path: Path) -> None:
    url = postgresql.fresh()
    for limit, size in (("2", 2), ("0", 12), ("64", 12)):
        environ = {"DATABASE_URL": url, "AETHER_MAX_CONCURRENT_CONTROL": limit}
        database = await open_database(load(environ, data_dir=tmp_path))
        assert database.engine.pool.size() == size  # type: ignore[attr-defined]
        await database.close()
    postgresql.drop(url)


def test_a_folder_of_servers_on_postgresql_is_no_backup(tmp_path: Path) -> None:
    with pytest.raises(LocalIOError, match="pg_dump"), offline(tmp_path, None):  # type: ignore[arg-type]
        pass
