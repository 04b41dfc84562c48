"""From an upload to an artifact: the steps, and what a kill between any two of them leaves.

    1 one transaction   row `completing`, with all that was said: the intent
    2 parts put together (uploads in parts)
    3 claim             no URL reaches the bytes any more
    4 verify            every byte is hashed; what is not the artifact is deleted and the upload fails
    5 move              artifacts/<app>/<digest>/app.tar.gz, durable
    6 one transaction   quota, artifact row, upload `completed`

Killed after any step, the upload is `completing` and its bytes are at exactly one of three keys; a repeated complete
or `recover`, here or on another server, goes on from there. Answering means that step 6 is committed. Everything from
1 to 6 is done alone with the artifact (`locks`). What fails for good has a row that says so before its bytes go, so
that a kill between the two leaves bytes that the collectors delete, never an artifact that a client was told is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.model.errors import (
    AetherError,
    BadRequest,
    Conflict,
    DigestMismatch,
    NotFound,
    QuotaExceeded,
    SignatureRequired,
)
from aether.model.times import now_us
from aether.observability import tracing
from aether.registry import events, idempotency, records, upload_rows
from aether.registry.events import What
from aether.registry.locks import Hold
from aether.registry.public_keys import PublicKey, active_keys, signer
from aether.registry.records import Artifact
from aether.registry.tools import Tools
from aether.registry.upload_rows import Said, Upload

_AGAIN = "presign again"


@dataclass(frozen=True, slots=True)
class Completed:
    """A verified artifact; `duplicate` when another upload had brought it before, `fresh` when it was stored just
    now."""

    artifact: Artifact
    duplicate: bool
    fresh: bool = False


class Completing:
    """The caller holds the artifact: `hold` is that of (app, digest) of the upload."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._database = tools.database
        self._objects = tools.objects
        self._settings = tools.settings
        self._metrics = tools.metrics

    async def run(self, hold: Hold, upload: Upload, said: Said, actor: str) -> Completed:
        """Raises NotFound, BadRequest, Conflict, IdempotencyConflict, DigestMismatch, QuotaExceeded,
        SignatureRequired, and ServiceUnavailable of the store or when another server took over."""
        try:
            return await self._run(hold, upload, said, actor)
        except AetherError:
            # what an overtaken server finds gone is another's doing and says nothing of the upload
            hold.check()
            raise

    async def _run(self, hold: Hold, upload: Upload, said: Said, actor: str) -> Completed:
        upload, known = await self._begin(hold, upload, said, actor)
        if known is not None:
            return await self._link(hold, upload, known, actor)
        source = await self._bytes_of(hold, upload)
        with tracing.span("hash artifact", {"aether.size_bytes": upload.size_bytes}):
            await self._verify(hold, upload, source, actor)
        target = records.storage_key(upload.app, upload.digest)
        if source != target:
            with tracing.span("store artifact"):
                hold.check()
                await self._objects.move(source, target)
            if self._tools.hashes_again(upload.size_bytes):
                await self._compare(hold, upload, target, *await self._objects.sha256(target), actor)
        return await self._record(hold, upload, actor)

    # --- 1

    async def _begin(self, hold: Hold, upload: Upload, said: Said, actor: str) -> tuple[Upload, Artifact | None]:
        """The upload, `completing` from now on, and the artifact that makes it needless."""
        try:
            return await self._begin_once(hold, upload, said, actor)
        except IntegrityError:  # somebody took the same idempotency key, or deleted the app, at this moment
            async with self._database.read(brief=True) as tx:
                await records.app_id(tx, upload.app)
            return await self._begin_once(hold, upload, said, actor)

    async def _begin_once(self, hold: Hold, seen: Upload, said: Said, actor: str) -> tuple[Upload, Artifact | None]:
        over_quota: QuotaExceeded | None = None
        async with self._database.write(brief=not self._tools.quotas.limited) as tx:
            await hold.confirm(tx)
            # before the upload is locked: what refers to an app waits for one that is being deleted, and a deletion
            # for the app's uploads
            if said.idempotency_key is not None:
                await idempotency.take(tx, seen.app_id, said.idempotency_key, seen.digest, now_us())
            upload = await upload_rows.find(tx, seen.id, lock=True)
            if upload is None:
                raise NotFound(f"the upload is gone; {_AGAIN}")
            known = await records.stored(tx, upload.app_id, upload.digest)
            self._refuse_ended(upload, known)
            signature = said.signature or upload.signature
            if known is None:
                self._need_signature(await self._signer(tx, upload.app_id, upload.digest, signature))
                try:
                    await self._tools.quotas.check(tx, upload.app_id, upload.size_bytes)
                except QuotaExceeded as error:
                    over_quota = error
            if upload.status != "completed":
                upload = await upload_rows.begin_completing(tx, upload, said)
        if over_quota is not None:
            await self._reject(hold, upload, None, over_quota.message, actor)
            self._metrics.quota_exceeded.inc()
            raise over_quota
        if known is not None and not await self._tools.is_there(known):
            known = None
        return upload, known

    def _refuse_ended(self, upload: Upload, known: Artifact | None) -> None:
        if upload.status == "failed":
            raise Conflict(f"this upload failed or expired; {_AGAIN}")
        if known is None and upload.status == "completed":
            raise Conflict(f"the artifact of this upload was deleted; {_AGAIN}")
        if known is None and upload.status == "pending" and upload.expires_at <= now_us():
            raise Conflict(f"this upload has expired; {_AGAIN}")

    async def _signer(self, tx: AsyncConnection, app_id: str, digest: str, signature: str | None) -> PublicKey | None:
        if signature is None:
            return None
        return signer(await active_keys(tx, app_id, lock=True), digest, signature)

    def _need_signature(self, key: PublicKey | None) -> None:
        if key is None and self._settings.require_signature:
            raise SignatureRequired(
                "this server keeps signed artifacts only: sign with AETHER_SIGNING_KEY, and have the public key "
                "added to the app"
            )

    # --- a duplicate

    async def _link(self, hold: Hold, upload: Upload, known: Artifact, actor: str) -> Completed:
        """The artifact is stored: of this upload only its signature may be news."""
        duplicate = known.upload_id != upload.id
        happened: list[What] = []
        async with self._database.write(brief=True) as tx:
            await hold.confirm(tx)
            if await self.sign(tx, known, upload.signature, actor):
                happened.append(What.SIGNED)
            if duplicate and upload.status != "completed":
                happened.append(What.DUPLICATE)
                await events.add(tx, self._row(upload, What.DUPLICATE, actor, artifact_id=known.id))
            await records.remember_key(tx, known, upload.idempotency_key)
            await upload_rows.set_status(tx, upload.id, "completed", only_from=upload_rows.LIVE)
            known = await records.stored(tx, upload.app_id, upload.digest) or known
        self._tools.tell(*happened)
        if duplicate:
            await self._discard(hold, upload)
        return Completed(known, duplicate)

    async def sign(self, tx: AsyncConnection, known: Artifact, signature: str | None, actor: str) -> bool:
        """Keep the signature of a stored artifact unless the one that it has is good. True when it was found good."""
        if signature is None or known.verified:
            return False
        key = await self._signer(tx, known.app_id, known.digest, signature)
        if key is None and known.signature is not None:
            return False
        await records.sign(tx, known, signature, None if key is None else key.id)
        if key is None:
            return False
        row = events.row(known.app_id, known.digest, What.SIGNED, actor, key.key_id, artifact_id=known.id)
        await events.add(tx, row)
        return True

    async def _discard(self, hold: Hold, upload: Upload) -> None:
        """Delete what a needless upload has sent."""
        hold.check()
        if upload.multipart_id is not None:
            await self._objects.abort_multipart(upload.pending_key, upload.multipart_id)
        try:
            await self._objects.delete(await self._objects.claim(upload.pending_key))
        except NotFound:
            return

    # --- 2 and 3

    async def _bytes_of(self, hold: Hold, upload: Upload) -> str:
        """The key at which the bytes to verify are, whatever step an earlier attempt reached."""
        hold.check()
        if upload.multipart_id is not None:
            try:
                await self._objects.finish_multipart(upload.pending_key, upload.multipart_id, upload.named_parts)
            except BadRequest:
                await self._put_back(upload)
                raise
            except NotFound:
                pass  # an earlier attempt may have moved the object on; else claiming finds nothing
        try:
            return await self._objects.claim(upload.pending_key)
        except NotFound:
            pass
        target = records.storage_key(upload.app, upload.digest)
        try:
            await self._objects.size(target)
        except NotFound:
            await self._put_back(upload)
            raise BadRequest("nothing was uploaded yet: PUT the artifact to its URL, then complete") from None
        return target

    async def _put_back(self, upload: Upload) -> None:
        async with self._database.write(brief=True) as tx:
            await upload_rows.set_status(tx, upload.id, "pending", only_from=("completing",))

    # --- 4

    async def _verify(self, hold: Hold, upload: Upload, source: str, actor: str) -> None:
        """What is cheap to ask comes first and saves reading the rest; every byte is hashed whatever it says."""
        if self._settings.verify_remote_size:
            size = await self._objects.size(source)
            if size != upload.size_bytes:
                await self._compare(hold, upload, source, None, size, actor)
        if self._settings.verify_remote_digest:
            kept = await self._objects.kept_sha256(source)
            if kept is not None:
                await self._compare(hold, upload, source, kept, upload.size_bytes, actor)
        await self._compare(hold, upload, source, *await self._objects.sha256(source), actor)

    async def _compare(
        self, hold: Hold, upload: Upload, source: str, digest: str | None, size: int, actor: str
    ) -> None:
        if digest in (upload.digest, None) and size == upload.size_bytes:
            return
        self._metrics.digest_mismatch.inc()
        details: dict[str, Any] = {"expected": upload.digest, "size_bytes": size}
        if digest is not None:
            details["actual"] = digest
        if size != upload.size_bytes:
            why = f"{size} bytes were uploaded, {upload.size_bytes} were announced"
        else:
            why = "the uploaded bytes are not the announced artifact"
        await self._reject(hold, upload, source, why, actor)
        raise DigestMismatch(f"{why}; they were deleted", details)

    async def _reject(self, hold: Hold, upload: Upload, source: str | None, why: str, actor: str) -> None:
        """Fail the upload for good, then delete its bytes, which are at `source` if it was claimed."""
        async with self._database.write(brief=True) as tx:
            await hold.confirm(tx)
            await events.add(tx, self._row(upload, What.REJECTED, actor, why))
            await upload_rows.set_status(tx, upload.id, "failed", only_from=upload_rows.LIVE)
        self._tools.tell(What.REJECTED)
        if source is None:
            await self._discard(hold, upload)
        else:
            hold.check()
            await self._objects.delete(source)

    # --- 6

    async def _record(self, hold: Hold, upload: Upload, actor: str) -> Completed:
        target = records.storage_key(upload.app, upload.digest)
        try:
            async with self._database.write(brief=not self._tools.quotas.limited) as tx:
                await hold.confirm(tx)
                stored, added, happened = await self._store(tx, upload, actor)
        except NotFound:
            hold.check()
            await self._objects.delete(target)
            raise
        except (QuotaExceeded, SignatureRequired) as error:
            if isinstance(error, QuotaExceeded):
                self._metrics.quota_exceeded.inc()
            await self._reject(hold, upload, target, error.message, actor)
            raise
        self._tools.tell(*happened)
        self._metrics.upload_bytes.inc(upload.size_bytes)
        self._metrics.upload_seconds.observe(max(0, now_us() - upload.created_at) / 1_000_000)
        self._metrics.artifacts.inc(added - happened.count(What.TOMBSTONED))
        return Completed(stored, duplicate=stored.upload_id != upload.id, fresh=True)

    async def _store(self, tx: AsyncConnection, upload: Upload, actor: str) -> tuple[Artifact, bool, list[What]]:
        """The artifact, whether it is a new one, and what happened. Raises NotFound, QuotaExceeded,
        SignatureRequired, Conflict."""
        happened = [What.COMPLETED]
        if not await records.lock_app(tx, upload.app_id):
            raise NotFound(f"there is no app '{upload.app}'")
        key = await self._signer(tx, upload.app_id, upload.digest, upload.signature)
        # a stored artifact whose object was lost gets it back: it has its place and its signature already
        known = await records.any_of(tx, upload.app_id, upload.digest)
        if known is None or known.status != "stored":
            self._need_signature(key)
            happened += [What.TOMBSTONED] * await self._tools.quotas.admit(tx, upload.app_id, upload.size_bytes)
        verified_by = None if key is None else key.id
        if known is None:
            added, stored = True, await records.add_artifact(tx, upload, verified_by, now_us())
        else:
            added = await records.revive(tx, upload, verified_by, now_us())
            stored = await records.stored(tx, upload.app_id, upload.digest)
            if stored is None:
                raise Conflict(f"the artifact was deleted at the same moment; {_AGAIN}")
            await records.remember_key(tx, stored, upload.idempotency_key)
        await events.add(tx, self._row(upload, What.COMPLETED, actor, _size(upload), artifact_id=stored.id))
        if added and key is not None:
            happened.append(What.SIGNED)
            await events.add(tx, self._row(upload, What.SIGNED, actor, key.key_id, artifact_id=stored.id))
        if not await upload_rows.set_status(tx, upload.id, "completed", only_from=upload_rows.LIVE):
            raise Conflict(f"this upload was given up by somebody else; {_AGAIN}")
        return stored, added, happened

    def _row(
        self, upload: Upload, event: What, actor: str, detail: str = "", *, artifact_id: str | None = None
    ) -> Mapping[str, Any]:
        return events.row(
            upload.app_id, upload.digest, event, actor, detail, artifact_id=artifact_id, upload_id=upload.id
        )


def _size(upload: Upload) -> str:
    return f"{upload.size_bytes} bytes"
