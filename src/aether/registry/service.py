"""The registry: presign, complete, and reading what is stored.

The two phases and what a kill -9 leaves behind:

    presign    a row `pending`, a signed URL for pending/<upload>
    PUT        pending/<upload> (the store's business; replaceable until it is claimed)
    complete   1 row `completing`      the recorded intent
               2 claim                 no URL reaches the bytes any more
               3 hash every byte       a mismatch deletes the object and fails the upload
               4 move                  artifacts/<app>/<digest>/app.tar.gz, flushed to the disk
               5 one transaction       artifact row + row `completed`

Killed after any step, the upload is `completing` and its bytes are at exactly one of the three keys; a
repeated complete or `recover` goes on from there. Answering means that step 5 is committed. Collecting what
nobody completed is left to `aether.registry.collector`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from aether.model.database import DatabasePort
from aether.model.errors import (
    AetherError,
    BadRequest,
    Conflict,
    DigestMismatch,
    IdempotencyConflict,
    MissingDigest,
    NotFound,
    PayloadTooLarge,
)
from aether.model.names import check_digest, new_id
from aether.model.objects import SignedRequest
from aether.model.times import now_us
from aether.observability.logging import logger
from aether.observability.metrics import Metrics
from aether.registry import records
from aether.registry.locks import KeyedLocks
from aether.registry.ports import ObjectStore
from aether.registry.records import Artifact, Upload
from aether.settings import Settings

_MAX_RUNTIME = 64
_MAX_IDEMPOTENCY_KEY = 200
_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Presigned:
    """`request` is None for a duplicate: there is nothing to upload."""

    storage_key: str
    upload_id: str | None
    request: SignedRequest | None


@dataclass(frozen=True, slots=True)
class Completed:
    """A verified artifact; `duplicate` when another upload had brought it before."""

    artifact: Artifact
    duplicate: bool


class Registry:
    """Artifacts of apps. Every digest is lower-case hex SHA-256 of the `.tar.gz`."""

    def __init__(self, database: DatabasePort, objects: ObjectStore, settings: Settings, metrics: Metrics) -> None:
        self._database = database
        self._objects = objects
        self._settings = settings
        self._metrics = metrics
        self._completing = KeyedLocks()

    async def presign(
        self,
        app: str,
        digest: str,
        size_bytes: int,
        *,
        content_digest: str | None = None,
        runtime: str | None = None,
        created_by: str,
    ) -> Presigned:
        """Begin an upload, or find that this app already has the artifact.

        Raises MissingDigest, InvalidDigest, BadRequest, PayloadTooLarge, NotFound for an unknown app.
        """
        self._metrics.presign_requests.inc()
        try:
            self._check_announced(digest, size_bytes, content_digest, runtime)
            async with self._database.read() as tx:
                app_id = await records.app_id(tx, app)
                known = await records.stored(tx, app_id, digest)
            if known is not None and await self._is_there(known):
                self._metrics.events.labels("duplicate").inc()
                return Presigned(known.storage_key, None, None)
            now = now_us()
            keep_secs = max(self._settings.pending_ttl_secs, self._settings.presign_expire_secs)
            upload = Upload(
                id=new_id(),
                app_id=app_id,
                app=app,
                digest=digest,
                content_digest=content_digest,
                runtime=runtime,
                size_bytes=size_bytes,
                status="pending",
                created_by=created_by,
                created_at=now,
                expires_at=now + keep_secs * 1_000_000,
            )
            request = self._objects.sign_put(upload.pending_key, size_bytes, self._settings.presign_expire_secs)
            await self._add_upload(upload)
        except AetherError:
            self._metrics.presign_failures.inc()
            raise
        self._metrics.events.labels("presigned").inc()
        return Presigned(records.storage_key(app, digest), upload.id, request)

    async def complete(
        self,
        app: str,
        digest: str,
        upload_id: str,
        size_bytes: int,
        *,
        content_digest: str | None = None,
        runtime: str | None = None,
        idempotency_key: str | None = None,
    ) -> Completed:
        """Verify an upload and make it an artifact; repeating it gives the same answer. `content_digest` and
        `runtime` count where presign was not told them.

        Raises NotFound (app, upload), BadRequest (another digest or size than presigned, nothing uploaded),
        DigestMismatch (the bytes are deleted), IdempotencyConflict, Conflict (failed or expired upload).
        """
        began = time.perf_counter()
        try:
            _check_digest(digest)
            _check_described(content_digest, runtime)
            if idempotency_key is not None and not 1 <= len(idempotency_key) <= _MAX_IDEMPOTENCY_KEY:
                raise BadRequest(f"an idempotency key has 1 to {_MAX_IDEMPOTENCY_KEY} characters")
            async with self._database.read() as tx:
                app_id = await records.app_id(tx, app)
                found = await records.upload(tx, upload_id)
            if found is None or found.app_id != app_id:
                raise NotFound(f"there is no upload '{upload_id}' for app '{app}'; presign one")
            if found.digest != digest or found.size_bytes != size_bytes:
                raise BadRequest("the upload was presigned for another digest or size")
            if content_digest is not None or runtime is not None:
                async with self._database.write() as tx:
                    await records.describe(tx, upload_id, content_digest, runtime)
            # One at a time per digest: whoever comes second finds the artifact and touches nothing.
            async with self._completing.hold((app_id, digest)):
                done = await self._complete(found.id, idempotency_key)
        except AetherError:
            self._metrics.complete_failures.inc()
            raise
        self._metrics.complete_seconds.observe(time.perf_counter() - began)
        return done

    async def find(self, digest: str, app: str | None = None, only: sa.ColumnElement[bool] | None = None) -> Artifact:
        """The newest stored artifact with this digest, of apps for which `only` (a condition on `applications`)
        holds. Raises NotFound, InvalidDigest."""
        _check_digest(digest)
        async with self._database.read() as tx:
            found = await records.newest(tx, digest, app, only)
        if found is None:
            raise NotFound("there is no artifact with this digest")
        return found

    async def download(
        self, digest: str, app: str | None = None, only: sa.ColumnElement[bool] | None = None
    ) -> SignedRequest:
        """A fresh signed GET of what `find` finds. Raises NotFound, InvalidDigest."""
        found = await self.find(digest, app, only)
        name = f"{found.app}-{digest[:12]}.tar.gz"
        self._metrics.events.labels("download").inc()
        return self._objects.sign_get(found.storage_key, self._settings.presign_expire_secs, name)

    async def list(
        self,
        app: str | None,
        limit: int,
        after: tuple[int, str] | None,
        only: sa.ColumnElement[bool] | None = None,
    ) -> list[Artifact]:
        """Up to `limit` artifacts, newest first; `only` is a condition on `applications`. Raises NotFound for an
        unknown app."""
        async with self._database.read() as tx:
            if app is not None:
                await records.app_id(tx, app)
            return await records.listed(tx, app, limit, after, only)

    async def drop_app(self, app: str) -> None:
        """Delete the objects of an app whose rows are gone. Idempotent."""
        keys = [key async for key, _, _ in self._objects.list(f"artifacts/{app}/")]
        for key in keys:
            await self._objects.delete(key)
        await self.count()

    async def recover(self) -> int:
        """Finish what a killed server left `completing`; returns how many became artifacts.

        An upload that cannot be finished is failed or put back; only an outage leaves it for the next start.
        """
        async with self._database.read() as tx:
            interrupted = await records.uploads_in(tx, "completing")
        finished = 0
        for found in interrupted:
            try:
                async with self._completing.hold((found.app_id, found.digest)):
                    await self._complete(found.id, None)
                finished += 1
            except AetherError as error:
                _log.warning("an interrupted upload was not finished", upload_id=found.id, error=error.message)
        await self.count()
        return finished

    async def count(self) -> None:
        """Bring the gauge of stored artifacts up to date."""
        async with self._database.read() as tx:
            self._metrics.artifacts.set(await records.count(tx))

    # --- steps of complete, under the lock of (app, digest)

    async def _complete(self, upload_id: str, key: str | None) -> Completed:
        async with self._database.write() as tx:
            upload = await records.upload(tx, upload_id)
            if upload is None:
                raise NotFound("the upload is gone; presign again")
            if key is not None:
                used = await records.by_idempotency_key(tx, upload.app_id, key)
                if used is not None and used.digest != upload.digest:
                    raise IdempotencyConflict("this idempotency key was used for another artifact")
            known = await records.stored(tx, upload.app_id, upload.digest)
            if known is None and upload.status == "completed":
                raise Conflict("the artifact of this upload was deleted; presign again")
            if upload.status == "failed":
                raise Conflict("this upload failed or expired; presign again")
            if known is None and upload.status == "pending" and upload.expires_at <= now_us():
                raise Conflict("this upload has expired; presign again")
            if upload.status == "pending":
                await records.set_status(tx, upload.id, "completing", only_from=("pending",))
        if known is not None and await self._is_there(known):
            return await self._link(upload, known, key)
        source = await self._claim(upload)
        await self._verify(upload, source)
        target = records.storage_key(upload.app, upload.digest)
        if source != target:
            await self._objects.move(source, target)
        return await self._record(upload, key)

    async def _link(self, upload: Upload, known: Artifact, key: str | None) -> Completed:
        """The artifact is stored: nothing of this upload is needed."""
        async with self._database.write() as tx:
            await records.set_status(tx, upload.id, "completed", only_from=("pending", "completing"))
            await records.remember_key(tx, known, key)
        if known.upload_id != upload.id:
            await self._discard(upload)
            self._metrics.events.labels("duplicate").inc()
        return Completed(known, duplicate=known.upload_id != upload.id)

    async def _claim(self, upload: Upload) -> str:
        """The key at which the bytes to verify are, whatever step an earlier attempt reached."""
        try:
            return await self._objects.claim(upload.pending_key)
        except NotFound:
            pass
        target = records.storage_key(upload.app, upload.digest)
        try:
            await self._objects.size(target)
        except NotFound:
            async with self._database.write() as tx:
                await records.set_status(tx, upload.id, "pending", only_from=("completing",))
            raise BadRequest("nothing was uploaded yet: PUT the artifact to its URL, then complete") from None
        return target

    async def _verify(self, upload: Upload, source: str) -> None:
        digest, size = await self._objects.sha256(source)
        if digest == upload.digest and size == upload.size_bytes:
            return
        async with self._database.write() as tx:
            await records.set_status(tx, upload.id, "failed", only_from=("completing",))
        await self._objects.delete(source)
        self._metrics.digest_mismatch.inc()
        self._metrics.events.labels("rejected").inc()
        raise DigestMismatch(
            "the uploaded bytes are not the announced artifact; they were deleted",
            {"expected": upload.digest, "actual": digest, "size_bytes": size},
        )

    async def _record(self, upload: Upload, key: str | None) -> Completed:
        try:
            async with self._database.write() as tx:
                added = await records.add_artifact(tx, upload, key, now_us())
                await records.set_status(tx, upload.id, "completed", only_from=("completing", "pending"))
                stored = await records.stored(tx, upload.app_id, upload.digest)
        except IntegrityError:
            return await self._record_failed(upload, key)
        if stored is None:
            raise NotFound("the app was deleted meanwhile")
        if added:
            self._metrics.upload_bytes.inc(upload.size_bytes)
            self._metrics.upload_seconds.observe((now_us() - upload.created_at) / 1_000_000)
            self._metrics.events.labels("completed").inc()
            self._metrics.artifacts.inc()
        return Completed(stored, duplicate=stored.upload_id != upload.id)

    async def _record_failed(self, upload: Upload, key: str | None) -> Completed:
        """A rule of the database was in the way: the app was deleted meanwhile, or the key was used."""
        async with self._database.read() as tx:
            used = None if key is None else await records.by_idempotency_key(tx, upload.app_id, key)
            still = await records.upload(tx, upload.id)
        if still is None:
            await self._objects.delete(records.storage_key(upload.app, upload.digest))
            raise NotFound(f"there is no app '{upload.app}'")
        if used is not None:
            raise IdempotencyConflict("this idempotency key was used for another artifact")
        raise Conflict("the artifact was completed by somebody else at the same moment; try again")

    # --- small things

    async def _is_there(self, artifact: Artifact) -> bool:
        """A row alone proves nothing after somebody lost a disk."""
        try:
            return await self._objects.size(artifact.storage_key) == artifact.size_bytes
        except NotFound:
            return False

    async def _discard(self, upload: Upload) -> None:
        try:
            await self._objects.delete(await self._objects.claim(upload.pending_key))
        except NotFound:
            return

    async def _add_upload(self, upload: Upload) -> None:
        try:
            async with self._database.write() as tx:
                await records.add_upload(tx, upload)
        except IntegrityError:
            raise NotFound(f"there is no app '{upload.app}'") from None

    def _check_announced(self, digest: str, size: int, content_digest: str | None, runtime: str | None) -> None:
        _check_digest(digest)
        _check_described(content_digest, runtime)
        if size <= 0:
            raise BadRequest("size_bytes must be more than zero")
        limit = self._settings.max_artifact_size_bytes
        if limit and size > limit:
            self._metrics.size_exceeded.inc()
            raise PayloadTooLarge(
                f"the artifact has {size} bytes; this server takes up to {limit} (AETHER_MAX_ARTIFACT_SIZE_BYTES)"
            )


def _check_digest(digest: str) -> None:
    if not digest:
        raise MissingDigest("a digest is needed: the SHA-256 of the .tar.gz in 64 lower-case hex characters")
    check_digest(digest)


def _check_described(content_digest: str | None, runtime: str | None) -> None:
    if content_digest is not None:
        check_digest(content_digest)
    if runtime is not None and not 1 <= len(runtime) <= _MAX_RUNTIME:
        raise BadRequest(f"a runtime has 1 to {_MAX_RUNTIME} characters")
