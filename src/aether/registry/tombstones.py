"""Marking artifacts that nobody needs, within a caller's transaction; what is due is the rule of `retention`.

Whoever calls holds the app (`records.lock_app`), so that two never mark the same app at once; an artifact is locked
before what uses it is read, so that a deployment that begins meanwhile comes first and keeps it, or comes after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.model.deployment import DeploymentStatus
from aether.registry import events
from aether.registry.events import What
from aether.registry.retention import Stored, Use, surplus
from aether.stores.database.tables import artifacts, deployments


@dataclass(frozen=True, slots=True)
class Keep:
    """How many artifacts of an app stay, and how long what is young or tombstoned does, in seconds."""

    latest: int
    grace_secs: float

    def young_since(self, now: int) -> int:
        return now - int(self.grace_secs * 1_000_000)


@dataclass(frozen=True, slots=True)
class Doomed:
    id: str
    app_id: str
    digest: str
    size_bytes: int


async def surplus_of(
    tx: AsyncConnection, app_id: str, keep: Keep, now: int, *, lock: bool = False
) -> Sequence[Doomed]:
    """What of an app is due; with `lock` it stays so until the transaction ends."""
    if not keep.latest:
        return []
    query = (
        sa.select(
            artifacts.c.id, artifacts.c.app_id, artifacts.c.digest, artifacts.c.size_bytes, artifacts.c.created_at,
            artifacts.c.pinned,
        )
        .where(artifacts.c.app_id == app_id, artifacts.c.status == "stored")
        .order_by(artifacts.c.id)
    )  # fmt: skip
    rows = {row.id: row for row in await tx.execute(query.with_for_update() if lock else query)}
    stored = [Stored(row.id, row.app_id, row.created_at, bool(row.pinned)) for row in rows.values()]
    used = await tx.execute(
        sa.select(deployments.c.artifact_id, deployments.c.app_id, deployments.c.status, deployments.c.release).where(
            deployments.c.app_id == app_id
        )
    )
    uses = [Use(row.artifact_id, row.app_id, DeploymentStatus(row.status), row.release) for row in used]
    due = surplus(stored, uses, keep=keep.latest, young_since=keep.young_since(now))
    return [_doomed(rows[artifact_id]) for artifact_id in due]


async def bury(tx: AsyncConnection, doomed: Sequence[Doomed], now: int, why: str) -> None:
    """Take artifacts out of every list; until their bytes go, a deployment that names one takes it back."""
    if not doomed:
        return
    ids = [one.id for one in doomed]
    values = {"status": "deleted", "deleted_at": now, "purged_at": None}
    await tx.execute(sa.update(artifacts).where(artifacts.c.id.in_(ids)).values(values))
    rows = [
        events.row(one.app_id, one.digest, What.TOMBSTONED, events.SERVER, why, artifact_id=one.id) for one in doomed
    ]
    await events.add(tx, *rows)


def _doomed(row: Any) -> Doomed:
    return Doomed(row.id, row.app_id, row.digest, row.size_bytes)
