"""Chores that take away what functions leave behind: old versions, code that no version has, records of calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import sqlalchemy as sa

from aether.functions.catalogue import LOCK
from aether.functions.code import PREFIX, CodeStore
from aether.functions.invocations import KEPT_PER_FUNCTION, Invocations
from aether.model.database import DatabasePort
from aether.registry.locks import ArtifactLocks
from aether.retention import Swept
from aether.stores.database.tables import function_versions, functions

KEPT_VERSIONS = 100
_BATCH = 500


class VersionSweeper:
    """The chore `function-versions`: all but the newest `kept` versions of each function."""

    name = "function-versions"

    def __init__(self, database: DatabasePort, kept: int = KEPT_VERSIONS) -> None:
        self._database = database
        self._kept = kept

    async def sweep(self, *, dry_run: bool) -> Swept:
        newest = sa.select(functions.c.version).where(functions.c.id == function_versions.c.function_id)
        old = function_versions.c.version <= newest.scalar_subquery() - self._kept
        if dry_run:
            async with self._database.read() as tx:
                query = sa.select(sa.func.count()).select_from(function_versions).where(old)
                return Swept((await tx.execute(query)).scalar_one())
        async with self._database.write() as tx:
            return Swept((await tx.execute(sa.delete(function_versions).where(old))).rowcount)


class CodeSweeper:
    """The chore `function-code`: archives that no version has for `grace_secs`. `clock` returns seconds since the
    epoch; `locks` are the catalogue's."""

    name = "function-code"

    def __init__(
        self,
        database: DatabasePort,
        codes: CodeStore,
        locks: ArtifactLocks,
        grace_secs: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._codes = codes
        self._locks = locks
        self._grace = grace_secs
        self._clock = clock

    async def sweep(self, *, dry_run: bool) -> Swept:
        before = self._clock() - self._grace
        listed = [
            (key.removeprefix(PREFIX), size)
            async for key, size, modified in self._codes.objects.list(PREFIX)
            if modified < before
        ]
        deleted = total = 0
        for start in range(0, len(listed), _BATCH):
            batch = listed[start : start + _BATCH]
            known = await self._known([digest for digest, _ in batch])
            for digest, size in batch:
                if digest in known or not (dry_run or await self._delete(digest)):
                    continue
                deleted += 1
                total += size
        if not dry_run:
            await self._codes.trim()
        return Swept(deleted, total)

    async def _delete(self, digest: str) -> bool:
        """Alone with the digest, and only if nobody has it then."""
        async with self._locks.alone_with(LOCK, digest) as hold:
            if await self._known([digest]):
                return False
            hold.check()
            await self._codes.objects.delete(PREFIX + digest)
            return True

    async def _known(self, digests: Collection[str]) -> set[str]:
        query = sa.select(function_versions.c.code_digest).where(function_versions.c.code_digest.in_(digests))
        async with self._database.read() as tx:
            return set((await tx.execute(query.distinct())).scalars())


class InvocationSweeper:
    """The chore `function-invocations`: those older than `ttl_secs`, and of each function all but the newest. A
    `ttl_secs` of 0 sets no age."""

    name = "function-invocations"

    def __init__(
        self,
        invocations: Invocations,
        ttl_secs: float,
        kept: int = KEPT_PER_FUNCTION,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._invocations = invocations
        self._ttl = ttl_secs
        self._kept = kept
        self._clock = clock

    async def sweep(self, *, dry_run: bool) -> Swept:
        before = int((self._clock() - self._ttl) * 1_000_000) if self._ttl else 0
        return Swept(await self._invocations.prune(before, self._kept, dry_run=dry_run))
