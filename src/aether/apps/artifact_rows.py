"""Artifacts as deployments need them: found, and kept from being taken away (see `aether.registry.sweeper`)."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.apps.records import AppRow
from aether.model.errors import ArtifactGone, NotFound
from aether.registry import events
from aether.registry.events import What
from aether.stores.database.tables import artifacts


async def find_artifact(tx: AsyncConnection, app: AppRow, digest: str) -> sa.Row[*tuple[Any, ...]]:
    """The app's artifact, also one that is to be taken away and still there. Raises NotFound."""
    found = await tx.execute(
        sa.select(artifacts.c.id, artifacts.c.runtime).where(
            artifacts.c.app_id == app.id,
            artifacts.c.digest == digest,
            artifacts.c.purged_at.is_(None),
        )
    )
    row = found.one_or_none()
    if row is None:
        raise NotFound(f"app '{app.name}' has no artifact {digest[:12]}; upload it first")
    return row


async def need_artifact(tx: AsyncConnection, artifact_id: str, digest: str) -> None:
    """Keep the artifact from being taken away: locked until the deployment that needs it is on record."""
    found = await tx.execute(
        sa.select(artifacts.c.app_id, artifacts.c.status, artifacts.c.purged_at)
        .where(artifacts.c.id == artifact_id)
        .with_for_update()
    )
    row = found.one()
    if row.purged_at is not None:
        raise ArtifactGone(
            f"the artifact {digest[:12]} is no longer stored: only the newest of an app are kept "
            "(AETHER_RETAIN_LATEST_PER_APP); check the code out as it was and deploy it again",
            {"digest": digest},
        )
    if row.status != "stored":
        await tx.execute(
            sa.update(artifacts).where(artifacts.c.id == artifact_id).values(status="stored", deleted_at=None)
        )
        event = events.row(row.app_id, digest, What.RESTORED, events.SERVER, artifact_id=artifact_id)
        await events.add(tx, event)
