"""The life of artifacts on record: one row for each step, written in the transaction of the step.

`artifact_events_total` counts the same steps, and downloads, which leave no row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.model.times import now_us
from aether.stores.database.tables import applications, artifact_events

_INSERT = sa.insert(artifact_events)
SERVER = "aether"
"""The actor of what the server does by itself."""


class What(StrEnum):
    PRESIGNED = "presigned"
    MULTIPART_BEGUN = "multipart_begun"
    STREAMED = "streamed"
    """The bytes of an upload come through the server."""
    COMPLETED = "completed"
    DUPLICATE = "duplicate"
    """An upload of what was stored already."""
    REJECTED = "rejected"
    """The bytes are not what was announced, or may not be kept; they were deleted."""
    EXPIRED = "expired"
    SIGNED = "signed"
    """A signature was found good by an active key."""
    DOCUMENTED = "documented"
    """Manifest, SBOM or provenance was stored with it."""
    PINNED = "pinned"
    UNPINNED = "unpinned"
    TOMBSTONED = "tombstoned"
    RESTORED = "restored"
    """A deployment needed it before its bytes were gone."""
    DELETED = "deleted"
    """The bytes are gone."""


@dataclass(frozen=True, slots=True)
class Event:
    id: int
    app: str
    digest: str
    event: str
    actor: str
    detail: str
    timestamp: int


def row(
    app_id: str,
    digest: str,
    event: What,
    actor: str,
    detail: str = "",
    *,
    artifact_id: str | None = None,
    upload_id: str | None = None,
) -> Mapping[str, Any]:
    return {
        "app_id": app_id,
        "digest": digest,
        "artifact_id": artifact_id,
        "upload_id": upload_id,
        "event": event.value,
        "actor": actor[:200],
        "detail": detail,
        "timestamp": now_us(),
    }


async def add(tx: AsyncConnection, *rows: Mapping[str, Any]) -> None:
    """Record what `row` describes."""
    if rows:
        await tx.execute(_INSERT, [dict(one) for one in rows])


async def listed(
    tx: AsyncConnection,
    digest: str,
    app: str | None,
    before: int | None,
    limit: int,
    only: sa.ColumnElement[bool] | None,
) -> Sequence[Event]:
    """Newest first, from just before the id `before`; `only` is a condition on `applications`."""
    query = (
        sa.select(artifact_events, applications.c.name.label("app"))
        .join(applications, applications.c.id == artifact_events.c.app_id)
        .where(artifact_events.c.digest == digest)
        .order_by(artifact_events.c.id.desc())
        .limit(limit)
    )
    if app is not None:
        query = query.where(applications.c.name == app)
    if only is not None:
        query = query.where(only)
    if before is not None:
        query = query.where(artifact_events.c.id < before)
    return [
        Event(one.id, one.app, one.digest, one.event, one.actor, one.detail, one.timestamp)
        for one in await tx.execute(query)
    ]


async def count_old(tx: AsyncConnection, before: int) -> int:
    query = sa.select(sa.func.count()).select_from(artifact_events).where(artifact_events.c.timestamp < before)
    return int(await tx.scalar(query) or 0)


async def prune(tx: AsyncConnection, before: int, limit: int) -> int:
    """Drop up to `limit` of the rows older than `before`; returns how many."""
    old = sa.select(artifact_events.c.id).where(artifact_events.c.timestamp < before).limit(limit)
    return (await tx.execute(sa.delete(artifact_events).where(artifact_events.c.id.in_(old)))).rowcount
