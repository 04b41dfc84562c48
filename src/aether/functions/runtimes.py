"""Language runtimes of functions: those that are shipped, and those that an admin registers with a root file system.

A registered name means one image for as long as any kept version of a function names it: it cannot be removed before.
What guests are made of it is the business of whoever runs functions.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.functions.contents import Arrived, Contents
from aether.functions.root_images import check_image, check_init
from aether.model.database import DatabasePort
from aether.model.errors import BadRequest, Conflict, NotFound
from aether.model.function import FunctionDefinition, check_runtime_name
from aether.model.function_instance import RuntimeImage
from aether.model.times import now_us
from aether.registry.locks import ArtifactLocks
from aether.retention import Swept
from aether.stores.database.tables import function_runtimes, function_versions, functions

SHIPPED = ("node", "python")
PREFIX = "runtimes/"
"""Of the keys in the object store; the digest follows."""
MAX_IMAGE_BYTES = 2 << 30
LOCK = "function-runtimes"
"""Under which a digest is held while its image is stored or swept."""
_NAMED = 5
_log = structlog.stdlib.get_logger("aether.functions")


@dataclass(frozen=True, slots=True)
class Runtime:
    """A registered runtime; `init` is the command that is put before the entrypoint."""

    name: str
    digest: str
    size_bytes: int
    init: tuple[str, ...]
    created_by: str
    created_at: int


class Runtimes:
    """Implements `RegisteredRuntimes`. `locks` are those of the functions' catalogue."""

    def __init__(self, database: DatabasePort, images: Contents, locks: ArtifactLocks) -> None:
        self._database = database
        self.images = images
        self._locks = locks

    async def list(self) -> Sequence[Runtime]:
        """The registered ones, by name."""
        async with self._database.read() as tx:
            rows = (await tx.execute(sa.select(function_runtimes).order_by(function_runtimes.c.name))).all()
        return [_runtime(row) for row in rows]

    def arriving(self, body: AsyncIterator[bytes]) -> AbstractAsyncContextManager[Arrived]:
        """Take in an image for `add`. Raises PayloadTooLarge, ServiceUnavailable."""
        return self.images.arriving(body)

    async def check_new(self, name: str, init: Sequence[str]) -> None:
        """What can be said before the image has come. Raises BadRequest, Conflict."""
        check_runtime_name(name)
        check_init(init)
        if name in SHIPPED:
            raise Conflict(f"the runtime '{name}' is shipped with the server; choose another name")
        if await self.has(name):
            raise _taken(name)

    async def add(self, name: str, init: Sequence[str], arrived: Arrived, actor: str) -> Runtime:
        """Register what has come in. Raises BadRequest for an image that no guest can have as its root, Conflict for
        a name that is taken, ServiceUnavailable."""
        await self.check_new(name, init)
        await self.images.run(lambda: check_image(arrived.path, init))
        made = Runtime(name, arrived.digest, arrived.size_bytes, tuple(init), actor, now_us())
        async with self._locks.alone_with(LOCK, arrived.digest) as hold:
            await self.images.keep(arrived)
            hold.check()
            try:
                async with self._database.write() as tx:
                    await tx.execute(
                        sa.insert(function_runtimes).values(
                            name=name, digest=made.digest, size_bytes=made.size_bytes,
                            init=json.dumps(made.init), created_by=actor, created_at=made.created_at,
                        )
                    )  # fmt: skip
            except IntegrityError:
                raise _taken(name) from None
        _log.info("function runtime registered", runtime=name, digest=made.digest)
        return made

    async def remove(self, name: str) -> None:
        """Raises NotFound, and Conflict for one that is shipped or that a version of a function names."""
        if name in SHIPPED:
            raise Conflict(f"the runtime '{name}' is shipped with the server and cannot be removed")
        async with self._database.write() as tx:
            # locked first: a version that is being made holds the row until it can be seen
            query = sa.select(function_runtimes.c.name).where(function_runtimes.c.name == name)
            if await tx.scalar(query.with_for_update()) is None:
                raise NotFound(f"there is no registered runtime '{name}'")
            if users := await _users(tx, name):
                shown = ", ".join(users[:_NAMED]) + (", ..." if len(users) > _NAMED else "")
                raise Conflict(
                    f"the runtime '{name}' is named by versions of {shown}; delete these functions first, or "
                    "register the other image under another name",
                    {"functions": users},
                )
            await tx.execute(sa.delete(function_runtimes).where(function_runtimes.c.name == name))
        _log.info("function runtime removed", runtime=name)

    async def has(self, name: str) -> bool:
        """See `RegisteredRuntimes`."""
        async with self._database.read() as tx:
            query = sa.select(function_runtimes.c.name).where(function_runtimes.c.name == name)
            return await tx.scalar(query) is not None

    async def fetch(self, name: str) -> RuntimeImage:
        """See `RegisteredRuntimes`."""
        async with self._database.read() as tx:
            query = sa.select(function_runtimes).where(function_runtimes.c.name == name)
            row = (await tx.execute(query)).one_or_none()
        if row is None:
            raise NotFound(f"there is no runtime called '{name}'")
        found = _runtime(row)
        return RuntimeImage(await self.images.have(found.digest), found.init)


async def require(tx: AsyncConnection, name: str, *, hold: bool) -> None:
    """Raises BadRequest unless there is such a runtime; with `hold`, in a transaction that writes, it stays until
    that has ended."""
    if name in SHIPPED:
        return
    query = sa.select(function_runtimes.c.name).where(function_runtimes.c.name == name)
    if await tx.scalar(query.with_for_update(read=True) if hold else query) is None:
        names = (await tx.execute(sa.select(function_runtimes.c.name).order_by(function_runtimes.c.name))).scalars()
        known = ", ".join((*SHIPPED, *names))
        raise BadRequest(f"there is no runtime '{name}'; this server has: {known}", {"field": "runtime"})


class RuntimeSweeper:
    """The chore `function-runtimes`: images that no runtime has for `grace_secs`. `clock` returns seconds since the
    epoch; `locks` are those of `Runtimes`."""

    name = "function-runtimes"

    def __init__(
        self,
        database: DatabasePort,
        images: Contents,
        locks: ArtifactLocks,
        grace_secs: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._images = images
        self._locks = locks
        self._grace = grace_secs
        self._clock = clock

    async def sweep(self, *, dry_run: bool) -> Swept:
        before = self._clock() - self._grace
        listed = [
            (key.removeprefix(PREFIX), size)
            async for key, size, modified in self._images.objects.list(PREFIX)
            if modified < before
        ]
        known = await self._known([digest for digest, _ in listed])
        deleted = total = 0
        for digest, size in listed:
            if digest in known or not (dry_run or await self._delete(digest)):
                continue
            deleted += 1
            total += size
        if not dry_run:
            await self._images.trim()
        return Swept(deleted, total)

    async def _delete(self, digest: str) -> bool:
        """Alone with the digest, and only if nobody has it then."""
        async with self._locks.alone_with(LOCK, digest) as hold:
            if await self._known([digest]):
                return False
            hold.check()
            await self._images.objects.delete(PREFIX + digest)
            return True

    async def _known(self, digests: Collection[str]) -> set[str]:
        query = sa.select(function_runtimes.c.digest).distinct()
        async with self._database.read() as tx:
            return set((await tx.execute(query)).scalars()) & set(digests)


async def _users(tx: AsyncConnection, name: str) -> list[str]:
    """Names of the functions that have a version with this runtime."""
    query = (
        sa.select(functions.c.name, function_versions.c.definition)
        .join(functions, functions.c.id == function_versions.c.function_id)
        .where(function_versions.c.definition.contains(json.dumps(name), autoescape=True))
    )
    rows = (await tx.execute(query)).all()
    return sorted({row.name for row in rows if FunctionDefinition.from_json(row.definition).runtime == name})


def _runtime(row: sa.Row[*tuple[Any, ...]]) -> Runtime:
    init = tuple(json.loads(row.init))
    return Runtime(row.name, row.digest, row.size_bytes, init, row.created_by, row.created_at)


def _taken(name: str) -> Conflict:
    return Conflict(f"there is already a runtime '{name}'", {"field": "name"})
