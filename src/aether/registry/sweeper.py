"""Taking artifacts away: a tombstone first, the bytes after a grace, and objects that no row knows.

tombstone   the row says `deleted`; it is taken in the transaction that saw that nothing needs the artifact, so a
            deployment that begins at the same moment comes first and keeps it, or comes later and finds it deleted.
            Until the bytes go, a deployment or a rollback that names it takes the tombstone off again.
purge       the row says that the bytes go, then they go, under the lock that completing an upload of the same
            artifact takes; a kill between the two leaves an object that no row knows.
orphans     objects that no row knows and that are older than any upload under way.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any

import sqlalchemy as sa

from aether.model.database import DatabasePort
from aether.model.errors import NotFound
from aether.registry import events, records, upload_rows
from aether.registry.events import What
from aether.registry.ports import ObjectStore
from aether.registry.service import Registry
from aether.registry.tombstones import Doomed, Keep, bury, surplus_of
from aether.retention import Swept
from aether.stores.database.tables import applications, artifacts, uploads

__all__ = ["ArtifactSweeper", "EventSweeper", "Keep", "OrphanSweeper"]

_PREFIX = "artifacts/"
_BATCH = 1000


class ArtifactSweeper:
    """The chore `artifacts`. `clock` returns seconds since the epoch."""

    name = "artifacts"

    def __init__(
        self,
        database: DatabasePort,
        registry: Registry,
        keep: Keep,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._registry = registry
        self._keep = keep
        self._clock = clock

    async def sweep(self, *, dry_run: bool) -> Swept:
        crowded = await self._crowded()
        if dry_run:
            sizes = {row.id: row.size_bytes for row in await self._ripe()}
            for app_id in crowded:
                async with self._database.read() as tx:
                    due = await surplus_of(tx, app_id, self._keep, self._ago(0))
                sizes |= {one.id: one.size_bytes for one in due}
            return Swept(len(sizes), sum(sizes.values()))
        buried = 0
        for app_id in crowded:
            buried += await self._bury(app_id)
        gone = [row.size_bytes for row in await self._ripe() if await self._registry.purge(row.id)]
        if buried:
            self._registry.tools.tell(*[What.TOMBSTONED] * buried)
            await self._registry.count()
        return Swept(len(gone), sum(gone))

    async def _crowded(self) -> Sequence[str]:
        """Apps with more artifacts than are kept."""
        if not self._keep.latest:
            return []
        query = sa.select(artifacts.c.app_id).where(artifacts.c.status == "stored").group_by(artifacts.c.app_id)
        async with self._database.read() as tx:
            return list((await tx.execute(query.having(sa.func.count() > self._keep.latest))).scalars())

    async def _bury(self, app_id: str) -> int:
        """A transaction for each app, so that whoever else writes gets a turn."""
        now = self._ago(0)
        async with self._database.write() as tx:
            if not await records.lock_app(tx, app_id):
                return 0
            due: Sequence[Doomed] = await surplus_of(tx, app_id, self._keep, now, lock=True)
            await bury(tx, due, now, "older than the newest ones, and nobody needs it")
        return len(due)

    async def _ripe(self) -> Sequence[sa.Row[*tuple[Any, ...]]]:
        """Tombstones whose grace is over."""
        query = sa.select(artifacts.c.id, artifacts.c.size_bytes).where(
            artifacts.c.status == "deleted",
            artifacts.c.purged_at.is_(None),
            artifacts.c.deleted_at <= self._ago(self._keep.grace_secs),
        )
        async with self._database.read() as tx:
            return (await tx.execute(query)).all()

    def _ago(self, secs: float) -> int:
        return int((self._clock() - secs) * 1_000_000)


class EventSweeper:
    """The chore `artifact-events`: rows of events, as old as audit rows may be. A `ttl_secs` of 0 keeps all."""

    name = "artifact-events"

    def __init__(self, database: DatabasePort, ttl_secs: float, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._ttl = ttl_secs
        self._clock = clock

    async def sweep(self, *, dry_run: bool) -> Swept:
        if not self._ttl:
            return Swept()
        before = int((self._clock() - self._ttl) * 1_000_000)
        if dry_run:
            async with self._database.read() as tx:
                return Swept(await events.count_old(tx, before))
        gone = 0
        while True:
            async with self._database.write() as tx:
                dropped = await events.prune(tx, before, _BATCH)
            gone += dropped
            if dropped < _BATCH:
                return Swept(gone)


class OrphanSweeper:
    """The chore `orphans`: stored objects that no row knows. `oldest_secs` is longer than any upload is under way."""

    name = "orphans"

    def __init__(
        self,
        database: DatabasePort,
        objects: ObjectStore,
        registry: Registry,
        oldest_secs: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._objects = objects
        self._registry = registry
        self._oldest = oldest_secs
        self._clock = clock

    async def sweep(self, *, dry_run: bool) -> Swept:
        deleted = size = 0
        async for key, app, digest, found in self._unknown():
            if not dry_run and not await self._delete(key, app, digest):
                continue
            deleted += 1
            size += found
        return Swept(deleted, size)

    async def _unknown(self) -> AsyncIterator[tuple[str, str, str, int]]:
        """Old objects that no row seemed to know a moment ago."""
        before = self._clock() - self._oldest
        listed = [entry async for entry in self._objects.list(_PREFIX)]
        old: list[tuple[str, str, str, int]] = []
        for key, size, modified in listed:
            parts = key.removeprefix(_PREFIX).split("/")
            if modified < before and len(parts) == 3:
                old.append((key, parts[0], parts[1], size))
        for start in range(0, len(old), _BATCH):
            batch = old[start : start + _BATCH]
            known = await self._known({digest for _, _, digest, _ in batch})
            for entry in batch:
                if entry[1:3] not in known:
                    yield entry

    async def _delete(self, key: str, app: str, digest: str) -> bool:
        """Under the lock of the artifact, and only if it is still unknown then."""
        async with self._database.read() as tx:
            app_id = await tx.scalar(sa.select(applications.c.id).where(applications.c.name == app))
        async with self._registry.alone_with(app_id or app, digest) as hold:
            if (app, digest) in await self._known({digest}):
                return False
            try:
                await self._objects.size(key)
            except NotFound:
                return False
            hold.check()
            await self._objects.delete(key)
            return True

    async def _known(self, digests: Collection[str]) -> set[tuple[str, str]]:
        """(app, digest) of what is stored, or is being uploaded."""
        stored = sa.select(applications.c.name, artifacts.c.digest).join(
            applications, applications.c.id == artifacts.c.app_id
        )
        under_way = sa.select(applications.c.name, uploads.c.digest).join(
            applications, applications.c.id == uploads.c.app_id
        )
        async with self._database.read() as tx:
            found = [
                *await tx.execute(stored.where(artifacts.c.digest.in_(digests), artifacts.c.purged_at.is_(None))),
                *await tx.execute(
                    under_way.where(uploads.c.digest.in_(digests), uploads.c.status.in_(upload_rows.LIVE))
                ),
            ]
        return {(row[0], row[1]) for row in found}
