"""Records of invocations: written in batches by whoever serves them, listed newest first, let go when old or many.

A batch may come twice, when its sender was not told that it arrived, and of a function that is gone by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.model.database import DatabasePort
from aether.model.function_instance import Invocation, StartKind
from aether.stores.database.tables import function_invocations, functions

KEPT_PER_FUNCTION = 10_000
MAX_PATH = 200
_BATCH = 500
_INSERT = sa.insert(function_invocations)


class Invocations:
    """Implements `InvocationSink`."""

    def __init__(self, database: DatabasePort) -> None:
        self._database = database

    async def add(self, invocations: Sequence[Invocation]) -> None:
        """Write them; those of functions that are gone, and those that are known already, are left out. Raises
        ServiceUnavailable."""
        for start in range(0, len(invocations), _BATCH):
            batch = {one.id: one for one in invocations[start : start + _BATCH]}
            try:
                await self._add(batch)
            except IntegrityError:
                # somebody else wrote some of them between the look and the insert, and this time that is seen
                await self._add(batch)

    async def _add(self, batch: dict[str, Invocation]) -> None:
        async with self._database.write() as tx:
            known = set(await _ids(tx, function_invocations.c.id, batch.keys()))
            alive = set(await _ids(tx, functions.c.id, {one.function_id for one in batch.values()}))
            rows = [_row(one) for one in batch.values() if one.id not in known and one.function_id in alive]
            if rows:
                await tx.execute(_INSERT, rows)

    async def list(
        self, function_id: str, *, before: tuple[int, str] | None = None, limit: int = 50
    ) -> Sequence[Invocation]:
        """Newest first, `limit` + 1 at most; `before` is (microseconds since the epoch, id) of the last one seen."""
        table = function_invocations
        query = sa.select(table).where(table.c.function_id == function_id)
        if before is not None:
            query = query.where(sa.tuple_(table.c.started_at, table.c.id) < sa.tuple_(*map(sa.literal, before)))
        query = query.order_by(table.c.started_at.desc(), table.c.id.desc()).limit(limit + 1)
        async with self._database.read() as tx:
            return [
                Invocation(
                    row.id, row.function_id, row.version, row.instance_id, row.started_at / 1_000_000,
                    row.duration_ms, row.method, row.path, row.status, StartKind(row.start),
                )
                for row in await tx.execute(query)
            ]  # fmt: skip

    async def prune(self, before: int, kept: int = KEPT_PER_FUNCTION, *, dry_run: bool = False) -> int:
        """Drop those older than `before` (microseconds since the epoch) and of each function all but the newest
        `kept`, some at a time; returns how many."""
        gone = await self._drop(function_invocations.c.started_at < before, dry_run)
        for function_id in await self._crowded(kept):
            async with self._database.read() as tx:
                oldest = await tx.scalar(
                    sa.select(function_invocations.c.started_at)
                    .where(function_invocations.c.function_id == function_id)
                    .order_by(function_invocations.c.started_at.desc())
                    .offset(kept)
                    .limit(1)
                )
            if oldest is not None:
                one = function_invocations.c.function_id == function_id
                gone += await self._drop(sa.and_(one, function_invocations.c.started_at <= oldest), dry_run)
        return gone

    async def _crowded(self, kept: int) -> Sequence[str]:
        query = sa.select(function_invocations.c.function_id).group_by(function_invocations.c.function_id)
        async with self._database.read() as tx:
            return list((await tx.execute(query.having(sa.func.count() > kept))).scalars())

    async def _drop(self, which: sa.ColumnElement[bool], dry_run: bool) -> int:
        if dry_run:
            async with self._database.read() as tx:
                counted = sa.select(sa.func.count()).select_from(function_invocations).where(which)
                return (await tx.execute(counted)).scalar_one()
        some = sa.select(function_invocations.c.id).where(which).limit(_BATCH).scalar_subquery()
        gone = 0
        while True:
            # a transaction each, so that whoever else writes gets a turn
            async with self._database.write() as tx:
                query = sa.delete(function_invocations).where(function_invocations.c.id.in_(some))
                dropped = (await tx.execute(query)).rowcount
            gone += dropped
            if dropped < _BATCH:
                return gone


async def _ids(tx: AsyncConnection, column: sa.Column[str], among: Iterable[str]) -> Sequence[str]:
    return list((await tx.execute(sa.select(column).where(column.in_(among)))).scalars())


def _row(one: Invocation) -> dict[str, object]:
    return {
        "id": one.id,
        "function_id": one.function_id,
        "version": one.version,
        "instance_id": one.instance_id,
        "started_at": round(one.started_at * 1_000_000),
        "duration_ms": one.duration_ms,
        "method": _text(one.method)[:32],
        "path": _text(one.path)[:MAX_PATH],
        "status": one.status,
        "start": one.start.value,
    }


def _text(text: str) -> str:
    """Without what a database cannot keep."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
