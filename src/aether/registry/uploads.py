"""Uploads in one piece: a signed URL, a PUT of the client's, and completion. Also what a server does for those that a
killed one left in the middle.

    presign    a row `pending`, a signed URL for pending/<upload>
    PUT        pending/<upload> (the store's business; replaceable until it is claimed)
    complete   the steps of `completing`

Uploads in parts are in `multipart`, those through the server in `legacy`; collecting what nobody completed is left to
`collector`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Generator
from dataclasses import dataclass

from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from aether.model.errors import (
    AetherError,
    BadRequest,
    IdempotencyConflict,
    NotFound,
    PayloadTooLarge,
    QuotaExceeded,
)
from aether.model.names import new_id
from aether.model.objects import SignedRequest
from aether.model.times import now_us
from aether.observability.logging import logger
from aether.registry import events, idempotency, records, upload_rows
from aether.registry.checks import check_artifact_digest, check_described, check_said
from aether.registry.completing import Completed, Completing
from aether.registry.events import What
from aether.registry.records import Artifact
from aether.registry.tools import Tools
from aether.registry.upload_rows import Said, Upload

RECOVERY_SECS = 5.0
"""Between looks for what a killed server left; it counts when that server's lease has lapsed."""
_LARGEST = 5 * 1024**4
"""What object stores take."""
_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Announced:
    """An artifact that a client is about to upload."""

    app: str
    digest: str
    size_bytes: int
    content_digest: str | None = None
    runtime: str | None = None


@dataclass(frozen=True, slots=True)
class Presigned:
    """`request` is None for a duplicate: there is nothing to upload."""

    storage_key: str
    upload_id: str | None
    request: SignedRequest | None


class Uploads:
    """Every digest is lower-case hex SHA-256 of the `.tar.gz`."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._database = tools.database
        self._objects = tools.objects
        self._metrics = tools.metrics
        self._completing = Completing(tools)

    async def presign(self, announced: Announced, created_by: str) -> Presigned:
        """Begin an upload, or find that this app already has the artifact.

        Raises MissingDigest, InvalidDigest, BadRequest, PayloadTooLarge, QuotaExceeded, NotFound for an unknown app.
        """
        self._metrics.presign_requests.inc()
        try:
            app_id, known = await self.announce(announced)
            if known is not None:
                return Presigned(known.storage_key, None, None)
            expires = self._tools.settings.presign_expire_secs
            upload = self.new(announced, app_id, created_by)
            request = await self._objects.sign_put(
                upload.pending_key, upload.size_bytes, expires, sha256=upload.digest
            )
            await self.begin(upload, What.PRESIGNED)
        except AetherError:
            self._metrics.presign_failures.inc()
            raise
        return Presigned(records.storage_key(announced.app, announced.digest), upload.id, request)

    # --- steps that all kinds of uploads share

    async def announce(self, announced: Announced) -> tuple[str, Artifact | None]:
        """The app's id, and the artifact if it is stored already. Raises as `presign` does."""
        self.check(announced)
        async with self._database.read(brief=True) as tx:
            app_id = await records.app_id(tx, announced.app)
            known = await records.stored(tx, app_id, announced.digest)
        if known is not None and await self._tools.is_there(known):
            self._tools.tell(What.DUPLICATE)
            return app_id, known
        if known is None and self._tools.quotas.limited:
            try:
                async with self._database.read() as tx:
                    await self._tools.quotas.check(tx, app_id, announced.size_bytes)
            except QuotaExceeded:
                self._metrics.quota_exceeded.inc()
                raise
        return app_id, None

    def check(self, announced: Announced) -> None:
        check_artifact_digest(announced.digest)
        check_described(announced.content_digest, announced.runtime)
        size, limit = announced.size_bytes, self._tools.settings.max_artifact_size_bytes
        if size <= 0:
            raise BadRequest("size_bytes must be more than zero")
        if size > (limit or _LARGEST):
            self._metrics.size_exceeded.inc()
            raise PayloadTooLarge(
                f"the artifact has {size} bytes; this server takes up to {limit or _LARGEST} "
                "(AETHER_MAX_ARTIFACT_SIZE_BYTES)"
            )

    def new(self, announced: Announced, app_id: str, created_by: str) -> Upload:
        """An upload that no row tells of yet."""
        now = now_us()
        return Upload(
            id=new_id(),
            app_id=app_id,
            app=announced.app,
            digest=announced.digest,
            content_digest=announced.content_digest,
            runtime=announced.runtime,
            size_bytes=announced.size_bytes,
            status="pending",
            created_by=created_by,
            created_at=now,
            expires_at=self.expiry(now),
        )

    def expiry(self, now: int) -> int:
        """When an upload that is heard of now is given up, in microseconds since the epoch."""
        settings = self._tools.settings
        return now + max(settings.pending_ttl_secs, settings.presign_expire_secs) * 1_000_000

    async def begin(self, upload: Upload, event: What) -> None:
        """Record an upload. Raises NotFound when its app was deleted meanwhile."""
        row = events.row(upload.app_id, upload.digest, event, upload.created_by, upload_id=upload.id)
        try:
            async with self._database.write(brief=True) as tx:
                await upload_rows.add(tx, upload)
                await events.add(tx, row)
        except IntegrityError:
            raise NotFound(f"there is no app '{upload.app}'") from None
        self._tools.tell(event)

    # --- completing

    async def complete(
        self, announced: Announced, upload_id: str | None, said: Said, actor: str, *, in_parts: bool = False
    ) -> Completed:
        """Verify an upload and make it an artifact; repeating it gives the same answer. What `said` describes counts
        where presign was not told. Without an `upload_id` the artifact must be stored: only the signature is new.

        Raises NotFound (app, upload), BadRequest (another digest or size than presigned, nothing uploaded),
        DigestMismatch (the bytes are deleted), IdempotencyConflict, Conflict (failed or expired upload),
        QuotaExceeded, SignatureRequired.
        """
        began = time.perf_counter()
        try:
            with self.in_progress():
                done = await self._complete(announced, upload_id, said, actor, in_parts)
        except AetherError:
            self._metrics.complete_failures.inc()
            raise
        self._metrics.complete_seconds.observe(time.perf_counter() - began)
        return done

    async def _complete(
        self, announced: Announced, upload_id: str | None, said: Said, actor: str, in_parts: bool
    ) -> Completed:
        check_artifact_digest(announced.digest)
        check_said(said)
        app, digest = announced.app, announced.digest
        async with self._database.read(brief=True) as tx:
            app_id = await records.app_id(tx, app)
            upload = None if upload_id is None else await upload_rows.find(tx, upload_id)
        if upload_id is None:
            return await self._sign(app_id, digest, said, actor)
        if upload is None or upload.app_id != app_id:
            raise NotFound(f"there is no upload '{upload_id[:64]}' for app '{app}'; presign one")
        if upload.digest != digest or upload.size_bytes != announced.size_bytes:
            raise BadRequest("the upload was presigned for another digest or size")
        if in_parts != (upload.multipart_id is not None):
            right = "/artifacts/multipart/complete" if upload.multipart_id else "/artifacts/complete"
            raise BadRequest(f"this upload is completed at {right}")
        # One at a time for each artifact: whoever comes second finds it and touches nothing.
        async with self._tools.locks.alone_with(app_id, digest) as hold:
            return await self._completing.run(hold, upload, said, actor)

    async def _sign(self, app_id: str, digest: str, said: Said, actor: str) -> Completed:
        async with self._tools.locks.alone_with(app_id, digest) as hold, self._database.write() as tx:
            await hold.confirm(tx)
            if said.idempotency_key is not None:
                try:
                    await idempotency.take(tx, app_id, said.idempotency_key, digest, now_us())
                except IntegrityError:
                    raise IdempotencyConflict("this idempotency key is in use") from None
            known = await records.stored(tx, app_id, digest)
            if known is None:
                raise NotFound("there is no artifact with this digest: presign, upload and complete with upload_id")
            signed = await self._completing.sign(tx, known, said.signature, actor)
            known = await records.stored(tx, app_id, digest) or known
        if signed:
            self._tools.tell(What.SIGNED)
        return Completed(known, duplicate=True)

    @contextlib.contextmanager
    def in_progress(self) -> Generator[None]:
        """Count an upload that this server receives or verifies."""
        self._metrics.uploads_in_progress.inc()
        try:
            yield
        finally:
            self._metrics.uploads_in_progress.dec()

    # --- what a killed server left

    async def recover(self) -> int:
        """Finish what a killed server left `completing`; returns how many became artifacts.

        An upload that cannot be finished is failed or put back; what another server works on, or may still work on,
        is left alone, and an outage leaves it for the next time.
        """
        async with self._database.read() as tx:
            interrupted = await upload_rows.in_status(tx, "completing")
        finished = 0
        for upload in interrupted:
            try:
                async with self._tools.locks.if_free(upload.app_id, upload.digest) as hold:
                    if hold is not None:
                        await self._completing.run(hold, upload, Said(), upload.created_by)
                        finished += 1
            except AetherError as error:
                _log.warning("an interrupted upload was not finished", upload_id=upload.id, error=error.message)
        return finished

    async def keep_recovering(self, stop: asyncio.Event) -> None:
        """Take up, again and again, what servers that share the database left when they were killed."""
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECOVERY_SECS):
                    await stop.wait()
                    return
            try:
                await self.recover()
            except (AetherError, SQLAlchemyError) as error:
                _log.warning("interrupted uploads could not be looked for", error=str(error))
