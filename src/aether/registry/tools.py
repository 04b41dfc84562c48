"""What every part of the registry works with, put together once per server."""

from __future__ import annotations

from dataclasses import dataclass

from aether.model.database import DatabasePort
from aether.model.errors import NotFound
from aether.observability.metrics import Metrics
from aether.registry.events import What
from aether.registry.locks import ArtifactLocks
from aether.registry.ports import ObjectStore
from aether.registry.quota import Quota, Quotas
from aether.registry.records import Artifact
from aether.registry.tombstones import Keep
from aether.settings import Settings


@dataclass(frozen=True, slots=True)
class Tools:
    database: DatabasePort
    objects: ObjectStore
    settings: Settings
    metrics: Metrics
    locks: ArtifactLocks

    @property
    def keep(self) -> Keep:
        return Keep(self.settings.retain_latest_per_app, self.settings.retention_grace_secs)

    @property
    def quotas(self) -> Quotas:
        quota = Quota(self.settings.max_artifacts_per_app, self.settings.max_total_bytes_per_app)
        return Quotas(quota, self.keep)

    def tell(self, *happened: What) -> None:
        """Count events whose rows are committed."""
        for event in happened:
            self.metrics.events.labels(event.value).inc()

    async def is_there(self, artifact: Artifact) -> bool:
        """Whether the store still has what the row says: a row alone proves nothing after somebody lost a disk.
        With AETHER_VERIFY_REMOTE_HASH the bytes of smaller ones are read too."""
        try:
            if await self.objects.size(artifact.storage_key) != artifact.size_bytes:
                return False
            if not self.hashes_again(artifact.size_bytes):
                return True
            return (await self.objects.sha256(artifact.storage_key))[0] == artifact.digest
        except NotFound:
            return False

    def hashes_again(self, size_bytes: int) -> bool:
        return self.settings.verify_remote_hash and size_bytes <= self.settings.remote_hash_max_bytes
