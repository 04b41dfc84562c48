"""A copy of a SQLite database as of one moment, made while others read and write, and the check of such a copy."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from aether.model.errors import ConfigError, LocalIOError
from aether.model.snapshot import Snapshot
from aether.stores.database.schema import HEAD, MIGRATIONS

_BUSY_SECS = 30.0
_COUNTED = ("applications", "artifacts", "deployments", "configs", "functions", "users", "teams", "tokens")


def take(source: Path, target: Path) -> Snapshot:
    """Copy `source` to the new file `target` (0600), without its free pages. Blocks; writers go on meanwhile.
    Raises LocalIOError."""
    try:
        target.touch(mode=0o600, exist_ok=False)
        with closing(sqlite3.connect(source, timeout=_BUSY_SECS, isolation_level=None)) as database:
            database.execute("VACUUM INTO ?", (str(target),))
        return _described(target)
    except (sqlite3.Error, OSError) as error:
        raise LocalIOError(f"the database {source} cannot be copied: {error}") from error


def check(path: Path) -> Snapshot:
    """What a copy says about itself. Raises LocalIOError when it is damaged, ConfigError when a newer Aether made
    it."""
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            [[verdict]] = database.execute("PRAGMA quick_check(1)").fetchall()
        if verdict != "ok":
            raise LocalIOError(f"the database in the backup is damaged: {verdict}")
        found = _described(path)
    except sqlite3.Error as error:
        raise LocalIOError(f"the database in the backup is damaged: {error}") from error
    if not list((MIGRATIONS / "versions").glob(f"{found.schema}_*.py")):
        raise ConfigError(
            f"the backup has schema {found.schema}, made by a newer Aether; this one knows {HEAD}: update it first"
        )
    return found


def _described(path: Path) -> Snapshot:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        [[schema]] = database.execute("SELECT version_num FROM alembic_version").fetchall()
        objects = database.execute(
            "SELECT a.storage_key FROM artifacts a JOIN applications p ON p.id = a.app_id "
            "WHERE a.status = 'stored' AND p.deleting_at IS NULL ORDER BY 1"
        ).fetchall()
        if "function_versions" in tables:
            objects += database.execute(
                "SELECT DISTINCT 'functions/' || code_digest FROM function_versions WHERE code_digest IS NOT NULL "
                "ORDER BY 1"
            ).fetchall()
        if "function_runtimes" in tables:
            objects += database.execute(
                "SELECT DISTINCT 'runtimes/' || digest FROM function_runtimes ORDER BY 1"
            ).fetchall()
        keys = database.execute("SELECT id FROM secret_keys").fetchall() if "secret_keys" in tables else []
        counts = {
            table: int(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
            for table in _COUNTED
            if table in tables
        }
    return Snapshot(str(schema), [row[0] for row in objects], [row[0] for row in keys], counts)
