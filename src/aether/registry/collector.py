"""Collecting uploads that nobody completed.

Safe beside uploads: a row is failed first, in a transaction that only takes it from `pending`, so that a
complete either comes first and wins or comes later and is refused; only then is the object deleted. Objects
are deleted by name, never because something else has not been seen yet: one without a row must also be older
than any URL that could have written it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from aether.model.database import DatabasePort
from aether.model.errors import AetherError
from aether.observability.logging import logger
from aether.observability.metrics import Metrics
from aether.registry import records
from aether.registry.ports import ObjectStore
from aether.settings import Settings

_BATCH = 500
_SLACK_SECS = 60
_log = logger(__name__)


class PendingCollector:
    """`clock` returns seconds since the epoch."""

    def __init__(
        self,
        database: DatabasePort,
        objects: ObjectStore,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._objects = objects
        self._settings = settings
        self._metrics = metrics
        self._clock = clock

    async def run(self, stop: asyncio.Event) -> None:
        """Collect every `pending_gc_interval_secs` until `stop` is set; an outage is logged and outlived."""
        interval = self._settings.pending_gc_interval_secs
        if not interval:
            return
        while not stop.is_set():
            try:
                await self.collect()
            except (AetherError, SQLAlchemyError) as error:
                _log.warning("collecting pending uploads failed", error=str(error))
            try:
                async with asyncio.timeout(interval):
                    await stop.wait()
            except TimeoutError:
                continue

    async def collect(self) -> int:
        """One round; returns how many objects were deleted."""
        self._metrics.pending_gc_runs.inc()
        deleted = await self._collect_expired() + await self._collect_orphans()
        async with self._database.write() as tx:
            await records.forget_settled(tx, self._now_us())
        self._metrics.pending_gc_deleted.inc(deleted)
        return deleted

    async def _collect_expired(self) -> int:
        deleted = 0
        while True:
            async with self._database.write() as tx:
                expired = await records.expired_uploads(tx, self._now_us(), _BATCH)
                for upload in expired:
                    await records.set_status(tx, upload.id, "failed", only_from=("pending",))
            for upload in expired:
                deleted += await self._delete(upload.pending_key)
            if len(expired) < _BATCH:
                return deleted

    async def _collect_orphans(self) -> int:
        """Objects that a late PUT left after its upload was completed, failed or forgotten."""
        oldest = self._clock() - self._settings.presign_expire_secs - _SLACK_SECS
        deleted = 0
        for prefix in ("pending/", "claimed/"):
            keys = [key async for key, _, modified in self._objects.list(prefix) if modified < oldest]
            for start in range(0, len(keys), _BATCH):
                batch = {key.removeprefix(prefix): key for key in keys[start : start + _BATCH]}
                async with self._database.read() as tx:
                    live = await records.live_uploads(tx, list(batch))
                for upload_id, key in batch.items():
                    if upload_id not in live:
                        deleted += await self._delete(key)
        return deleted

    async def _delete(self, key: str) -> int:
        try:
            await self._objects.size(key)
        except AetherError:
            return 0
        await self._objects.delete(key)
        return 1

    def _now_us(self) -> int:
        return int(self._clock() * 1_000_000)
