"""The audit log: who did what to which thing, with what outcome, in which request.

Only what is known to be harmless is written: route templates and names, never a body, a query or a header. A row
that cannot be written is logged in its stead; the change it tells of has happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from aether.model.database import DatabasePort
from aether.model.errors import AetherError
from aether.model.names import new_id
from aether.model.times import now_us
from aether.observability.logging import logger
from aether.stores.database.tables import audit

_log = logger("aether.audit")


@dataclass(frozen=True, slots=True)
class Entry:
    """`action` is a method and a route template, `target` the name or id that it was about, `outcome` ok or the
    code of the failure."""

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

    async def record(self, entry: Entry) -> None:
        """Never raises for a database that is away: the answer must tell what happened to the change."""
        row = {
            "id": new_id(),
            "time": now_us(),
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
        try:
            async with self._database.write() as tx:
                await tx.execute(sa.insert(audit).values(row))
        except AetherError as error:
            _log.error("an audit entry could not be kept", error=error.message, **row)

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
