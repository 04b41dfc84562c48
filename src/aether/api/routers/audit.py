"""The audit log, for admins."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import get
from litestar.params import QueryParameter

from aether.api.paging import DEFAULT_LIMIT, Cursor, Limit, Page, decode_cursor, page
from aether.api.services import Deps
from aether.identity.audit import Entry
from aether.model.times import from_iso, to_iso

Actor = Annotated[str | None, QueryParameter(name="actor", max_length=200, description="Only what this one did.")]
Since = Annotated[str | None, QueryParameter(name="since", description="Only from this ISO-8601 time on.")]


class AuditEntry(msgspec.Struct):
    """`action` is method and route, `target` what it was about, `outcome` ok or the code of the failure."""

    id: str
    time: str
    actor: str
    actor_kind: str
    action: str
    target: str
    outcome: str
    status: int
    address: str
    request_id: str
    trace_id: str


@get("/audit", tags=["audit"])
async def list_audit(
    services: Deps,
    actor: Actor = None,
    since: Since = None,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> Page[AuditEntry]:
    """Every change that somebody made or tried, newest first."""
    keys = decode_cursor(cursor, int, str)
    rows = await services.identity.audit.list(
        actor=actor,
        since=None if since is None else from_iso(since),
        before=None if keys is None else (keys[0], keys[1]),
        limit=limit,
    )
    return page(rows, limit, _view, lambda row: (row.time, row.id))


def _view(row: Entry) -> AuditEntry:
    return AuditEntry(
        row.id, to_iso(row.time), row.actor, row.actor_kind, row.action, row.target, row.outcome, row.status,
        row.address, row.request_id, row.trace_id,
    )  # fmt: skip


HANDLERS = [list_audit]
