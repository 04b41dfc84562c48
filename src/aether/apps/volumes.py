"""The persistent volumes of apps: which there are, who needs them, and their end.

A volume exists once an instance that names it was started, and is kept until somebody deletes it or its app; a
release that is rolled back to finds it as it was left, or empty when it was deleted meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from aether.apps.ledger import LIVE_INSTANCES
from aether.apps.ports import VolumeStore
from aether.apps.records import UNDER_WAY_VALUES, AppRow, find_app
from aether.model.database import DatabasePort
from aether.model.errors import Conflict, NotFound
from aether.model.volumes import MAX_NAME, from_json
from aether.stores.database.tables import deployments, instances, runs


@dataclass(frozen=True, slots=True)
class VolumeView:
    """`path` is where the active release sees it, None when it does not."""

    name: str
    path: str | None
    used_bytes: int | None
    in_use: bool


class AppVolumes:
    def __init__(self, database: DatabasePort, store: VolumeStore) -> None:
        self._database = database
        self._store = store

    async def list(self, app_name: str) -> Sequence[VolumeView]:
        async with self._database.read() as tx:
            app = await find_app(tx, app_name)
        needed = await self._needed(app)
        active = await self._active(app)
        found: list[VolumeView] = []
        for name in await self._store.names(app_name):
            used = await self._store.used_bytes(app_name, name)
            found.append(VolumeView(name, active.get(name), used, name in needed))
        return found

    async def delete(self, app_name: str, name: str) -> None:
        """Raises NotFound, and Conflict while it is needed."""
        async with self._database.read() as tx:
            app = await find_app(tx, app_name)
        if name not in await self._store.names(app_name):
            raise NotFound(f"app '{app_name}' has no volume '{name[:MAX_NAME]}'")
        if name in await self._needed(app):
            raise Conflict(
                f"volume {name} of {app_name} is in use: deploy without it, and wait until what uses it has ended"
            )
        await self._store.delete(app_name, name)

    async def delete_all(self, app_name: str) -> None:
        """Delete everything that a deleted app kept."""
        await self._store.delete_all(app_name)

    async def _active(self, app: AppRow) -> dict[str, str]:
        query = sa.select(deployments.c.volumes).where(deployments.c.id == app.active_deployment_id)
        async with self._database.read() as tx:
            text = await tx.scalar(query)
        return {volume.name: volume.path for volume in from_json(text or "[]")}

    async def _needed(self, app: AppRow) -> set[str]:
        """Names of the volumes that the active release, a rollout, an instance or a run may be using."""
        living = sa.select(instances.c.deployment_id).where(instances.c.status.in_(LIVE_INSTANCES))
        running = sa.select(runs.c.deployment_id).where(runs.c.ended_at.is_(None))
        query = sa.select(deployments.c.volumes).where(
            deployments.c.app_id == app.id,
            sa.or_(
                deployments.c.id == app.active_deployment_id,
                deployments.c.status.in_(UNDER_WAY_VALUES),
                deployments.c.id.in_(living),
                deployments.c.id.in_(running),
            ),
        )
        async with self._database.read() as tx:
            texts = (await tx.execute(query)).scalars().all()
        return {volume.name for text in texts for volume in from_json(text)}
