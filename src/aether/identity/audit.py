"""The audit log: who did what to which thing, with what outcome, in which request.

Only what is known to be harmless is written: route templates and names, never a body, a query or a header. A change
and its row are one transaction; what the change came to is added before its answer leaves. A row that stays
`unanswered` tells of a change that was made although its caller was never told: the server was killed in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.model.database import DatabasePort
from aether.model.errors import AetherError
from aether.model.names import new_id
from aether.model.times import now_us
from aether.observability.logging import logger
from aether.stores.database.tables import audit

UNANSWERED = "unanswered"
_INSERT = sa.insert(audit)
_TOLD = [column.name for column in audit.c if column.name not in ("id", "time")]
_COMPLETE = (
    sa.update(audit)
    .where(audit.c.id == sa.bindparam("of"))
    .values({name: sa.bindparam(f"is_{name}") for name in _TOLD})
)
_log = logger("aether.audit")


@dataclass(frozen=True, slots=True)
class Entry:
    """`action` is a method and a route template, `target` the name or id that it was about, `outcome` ok,
    the code of the failure, or `UNANSWERED`; `time` 0 is now, `id` "" a new one."""

    actor: str
    actor_kind: str
    action: str
    target: str
    outcome: str
    status: int
    address: str
    request_id: str
    trace_id: str
    time: int = 0
    id: str = ""


class AuditLog:
    def __init__(self, database: DatabasePort) -> None:
        self._database = database

    async def begin(self, tx: AsyncConnection, entry: Entry) -> None:
        """Write the row of a change within the change's own transaction; `entry.id` names it."""
        await tx.execute(_INSERT, _row(entry))

    async def record(self, entry: Entry, *, begun: bool = False) -> None:
        """Write the outcome: into the row that was begun, or else a new one. Never raises for a database that is
        away: the answer must tell what happened to the change."""
        row = _row(entry)
        try:
            async with self._database.write(brief=True) as tx:
                # the transaction that began the row may have been taken back
                if not (begun and await _complete(tx, row)):
                    await tx.execute(_INSERT, row)
        except AetherError as error:
            _log.error("an audit entry could not be kept", error=error.message, **row)

    async def prune(self, before: int, limit: int = 10_000) -> int:
        """Drop at most `limit` rows older than `before` (microseconds since the epoch); returns how many."""
        old = sa.select(audit.c.id).where(audit.c.time < before).order_by(audit.c.time).limit(limit)
        async with self._database.write() as tx:
            return (await tx.execute(sa.delete(audit).where(audit.c.id.in_(old.scalar_subquery())))).rowcount

    async def count(self, before: int) -> int:
        """How many rows are older than `before` (microseconds since the epoch)."""
        async with self._database.read() as tx:
            query = sa.select(sa.func.count()).select_from(audit).where(audit.c.time < before)
            return (await tx.execute(query)).scalar_one()

    async def list(
        self,
        *,
        actor: str | None = None,
        since: int | None = None,
        before: tuple[int, str] | None = None,
        limit: int = 50,
    ) -> Sequence[Entry]:
        """Newest first, `limit` + 1 at most; `before` is (time, id) of the last one seen."""
        query = sa.select(audit).order_by(audit.c.time.desc(), audit.c.id.desc()).limit(limit + 1)
        if actor is not None:
            query = query.where(audit.c.actor == actor)
        if since is not None:
            query = query.where(audit.c.time >= since)
        if before is not None:
            query = query.where(sa.tuple_(audit.c.time, audit.c.id) < sa.tuple_(*map(sa.literal, before)))
        async with self._database.read() as tx:
            return [
                Entry(
                    row.actor, row.actor_kind, row.action, row.target, row.outcome, row.status, row.address,
                    row.request_id, row.trace_id, row.time, row.id,
                )
                for row in await tx.execute(query)
            ]  # fmt: skip


async def _complete(tx: AsyncConnection, row: dict[str, Any]) -> bool:
    done = await tx.execute(_COMPLETE, {"of": row["id"], **{f"is_{name}": row[name] for name in _TOLD}})
    return done.rowcount == 1


def _row(entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.id or new_id(),
        "time": entry.time or now_us(),
        "actor": entry.actor[:200],
        "actor_kind": entry.actor_kind,
        "action": entry.action[:200],
        "target": entry.target[:400],
        "outcome": entry.outcome,
        "status": entry.status,
        "address": entry.address[:64],
        "request_id": entry.request_id,
        "trace_id": entry.trace_id,
    }
