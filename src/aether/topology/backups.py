"""Backups of an embedded server: made by the running one or from its folder while it is down, and put back."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from aether import __version__
from aether.backup.restore import Restored, Tools, restore, verify
from aether.backup.write import Plan, Writer, sweep
from aether.model.errors import LocalIOError
from aether.stores.database import snapshot
from aether.topology.folder import owned


def writer(data: Path, plan: Plan) -> Writer:
    """A backup of a data directory whose lock this process holds."""
    return Writer(data, __version__, snapshot.take, plan)


@contextmanager
def offline(data: Path, plan: Plan) -> Generator[Writer]:
    """A backup of a folder on which no server runs. Raises LocalIOError when there is none, or one runs."""
    if not (data / "aether.db").is_file():
        raise LocalIOError(
            f"{data} has no aether.db, so there is nothing to save it with; what a server keeps on PostgreSQL is "
            "saved with pg_dump, its artifacts with their object store's own tools (docs/backup.md)"
        )
    with owned(data):
        sweep(data)
        made = writer(data, plan)
        try:
            made.prepare()
            yield made
        finally:
            made.close()


def put_back(source: IO[bytes], target: Path, passphrase: Callable[[], str], *, force: bool) -> Restored:
    """Make `target` what a backup holds; refused while a server runs on it. See `aether.backup.restore`."""
    tools = Tools(snapshot.check, passphrase)
    if force and (target / "up.lock").exists():
        with owned(target):
            return restore(source, target, tools, force=True)
    return restore(source, target, tools, force=force)


def look_at(source: IO[bytes], scratch: Path, passphrase: Callable[[], str]) -> Restored:
    """Verify a backup and keep nothing."""
    return verify(source, Tools(snapshot.check, passphrase), scratch)
