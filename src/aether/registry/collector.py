"""Collecting uploads that nobody completed.

Safe beside uploads: a row is failed first, in a transaction that only takes it from `pending`, so that a
complete either comes first and wins or comes later and is refused; only then are its bytes deleted. Objects and
uploads in parts are deleted by name, never because something else has not been seen yet: one without a row must also
be older than any URL that could have written it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.model.database import DatabasePort
from aether.model.errors import AetherError, NotFound
from aether.observability.logging import logger
from aether.observability.metrics import Metrics
from aether.registry import events, idempotency, upload_rows
from aether.registry.events import What
from aether.registry.ports import ObjectStore
from aether.registry.upload_rows import Upload
from aether.settings import Settings

_BATCH = 500
_SLACK_SECS = 60
_PENDING, _CLAIMED = "pending/", "claimed/"
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
        """One round; returns how many objects and uploads in parts were deleted."""
        self._metrics.pending_gc_runs.inc()
        deleted = await self._collect_expired() + await self._collect_parts() + await self._collect_orphans()
        now = self._now_us()
        async with self._database.write() as tx:
            await upload_rows.forget_settled(tx, now)
            await idempotency.forget(tx, now - self._settings.pending_ttl_secs * 1_000_000)
        self._metrics.pending_gc_deleted.inc(deleted)
        return deleted

    async def _collect_expired(self) -> int:
        deleted = 0
        while True:
            async with self._database.write() as tx:
                found = await upload_rows.expired(tx, self._now_us(), _BATCH)
                failed = [upload for upload in found if await self._fail(tx, upload)]
            for upload in failed:
                self._metrics.events.labels(What.EXPIRED.value).inc()
                if upload.multipart_id is not None:
                    await self._objects.abort_multipart(upload.pending_key, upload.multipart_id)
                    deleted += 1
                deleted += await self._delete(upload.pending_key)
            if len(found) < _BATCH:
                return deleted

    async def _fail(self, tx: AsyncConnection, upload: Upload) -> bool:
        """False when it was completed at the same moment."""
        if not await upload_rows.set_status(tx, upload.id, "failed", only_from=("pending",)):
            return False
        row = events.row(upload.app_id, upload.digest, What.EXPIRED, events.SERVER, upload_id=upload.id)
        await events.add(tx, row)
        return True

    async def _collect_parts(self) -> int:
        """Uploads in parts that no row knows: their server was killed before it could write one, or while it copied a
        large object."""
        oldest = self._oldest()
        found = [
            (key, multipart_id)
            async for key, multipart_id, begun in self._objects.multipart_uploads("")
            if begun < oldest
        ]
        deleted = 0
        for start in range(0, len(found), _BATCH):
            batch = found[start : start + _BATCH]
            async with self._database.read() as tx:
                live = await upload_rows.live(tx, [key.split("/")[1] for key, _ in batch])
            for key, multipart_id in batch:
                if key.split("/")[1] not in live:
                    await self._objects.abort_multipart(key, multipart_id)
                    deleted += 1
        return deleted

    async def _collect_orphans(self) -> int:
        """Objects that a late PUT left after its upload was completed, failed or forgotten."""
        oldest = self._oldest()
        deleted = 0
        for prefix in (_PENDING, _CLAIMED):
            keys = [key async for key, _, modified in self._objects.list(prefix) if modified < oldest]
            for start in range(0, len(keys), _BATCH):
                batch = [(key, key.split("/")[1]) for key in keys[start : start + _BATCH]]
                async with self._database.read() as tx:
                    live = await upload_rows.live(tx, [upload_id for _, upload_id in batch])
                for key, upload_id in batch:
                    if upload_id not in live:
                        deleted += await self._delete(key)
        return deleted

    async def _delete(self, key: str) -> int:
        try:
            await self._objects.size(key)
        except NotFound:
            return 0
        await self._objects.delete(key)
        return 1

    def _oldest(self) -> float:
        return self._clock() - self._settings.presign_expire_secs - _SLACK_SECS

    def _now_us(self) -> int:
        return int(self._clock() * 1_000_000)
