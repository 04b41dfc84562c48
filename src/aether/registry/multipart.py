"""Uploads in parts: begun or taken up again, a signed URL for each part, and completion with all of their etags.

    init           the store begins an upload of pending/<upload>, then its row is written; killed between the two the
                   store has an upload that no row knows, which the collector aborts
    presign-part   a URL for one part, of exactly its size
    complete       the parts are recorded with the intent, put together, and then it is an upload like any other

The same caller that asks again for the same artifact gets the upload under way with the parts that have arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from aether.model.errors import AetherError, BadRequest, Conflict, NotFound, ServiceUnavailable
from aether.model.objects import MAX_PARTS, Part, SignedRequest
from aether.model.times import now_us
from aether.registry import records, upload_rows
from aether.registry.checks import check_artifact_digest, check_parts
from aether.registry.completing import Completed
from aether.registry.events import What
from aether.registry.tools import Tools
from aether.registry.upload_rows import Said, Upload
from aether.registry.uploads import Announced, Uploads

MAX_PRESIGNED = 100
"""Parts in one request."""
_MIB = 1024**2
_MAX_MULTIPART_ID = 1024
"""What the column holds."""


@dataclass(frozen=True, slots=True)
class PartUrl:
    number: int
    size_bytes: int
    request: SignedRequest


@dataclass(frozen=True, slots=True)
class Begun:
    """An upload in parts; `upload_id` is None for a duplicate. `parts` have arrived already."""

    storage_key: str
    upload_id: str | None
    part_size_bytes: int
    part_count: int
    expires_at: int | None
    parts: Sequence[Part] = ()


def part_size(size_bytes: int, wanted: int) -> int:
    """`wanted`, or as many whole MiB more as keep the upload below the number of parts that stores take."""
    if size_bytes <= wanted * MAX_PARTS:
        return wanted
    smallest = -(-size_bytes // MAX_PARTS)
    return -(-smallest // _MIB) * _MIB


def part_count(size_bytes: int, part_size_bytes: int) -> int:
    return -(-size_bytes // part_size_bytes)


def size_of(number: int, size_bytes: int, part_size_bytes: int) -> int:
    """Bytes of one part; the last one is what is left."""
    return min(part_size_bytes, size_bytes - (number - 1) * part_size_bytes)


class Multipart:
    def __init__(self, tools: Tools, uploads: Uploads) -> None:
        self._tools = tools
        self._uploads = uploads
        self._database = tools.database
        self._objects = tools.objects
        self._metrics = tools.metrics

    async def init(self, announced: Announced, created_by: str) -> Begun:
        """Raises as `Uploads.presign` does."""
        self._metrics.multipart_inits.inc()
        app_id, known = await self._uploads.announce(announced)
        size = part_size(announced.size_bytes, self._tools.settings.multipart_part_size_bytes)
        if known is not None:
            return Begun(known.storage_key, None, size, part_count(announced.size_bytes, size), None)
        resumed = await self._resume(announced, app_id, created_by)
        if resumed is not None:
            return resumed
        upload = self._uploads.new(announced, app_id, created_by)
        multipart_id = await self._objects.begin_multipart(upload.pending_key)
        upload = _in_parts(upload, multipart_id, size)
        try:
            await self._uploads.begin(upload, What.MULTIPART_BEGUN)
        except NotFound:
            await self._objects.abort_multipart(upload.pending_key, multipart_id)
            raise
        return _begun(upload, [])

    async def _resume(self, announced: Announced, app_id: str, created_by: str) -> Begun | None:
        now = now_us()
        async with self._database.read() as tx:
            under_way = await upload_rows.resumable(
                tx, app_id, announced.digest, announced.size_bytes, created_by, now
            )
        for upload in under_way:
            try:
                arrived = await self._objects.parts(upload.pending_key, upload.multipart_id or "")
            except NotFound:
                continue  # its parts were put together or dropped
            async with self._database.write() as tx:
                expires_at = self._uploads.expiry(now)
                still = await upload_rows.prolong(tx, upload.id, expires_at)
            if still:
                return _begun(replace(upload, expires_at=expires_at), arrived)
        return None

    async def presign_parts(self, app: str, upload_id: str, numbers: Sequence[int]) -> Sequence[PartUrl]:
        """Raises NotFound, BadRequest (no such part, too many at once), Conflict (not under way)."""
        if not 1 <= len(numbers) <= MAX_PRESIGNED:
            raise BadRequest(f"1 to {MAX_PRESIGNED} parts can be asked for at once")
        if len(set(numbers)) != len(numbers):
            raise BadRequest("a part is asked for twice")
        upload = await self._upload(app, upload_id)
        if upload.status != "pending":
            raise Conflict("this upload is over: no part can be added")
        if upload.expires_at <= now_us():
            raise Conflict("this upload has expired; begin again")
        size = upload.part_size_bytes or 0
        count = part_count(upload.size_bytes, size)
        if beyond := [number for number in numbers if not 1 <= number <= count]:
            raise BadRequest(f"the upload has {count} parts; there is no part {beyond[0]}")
        expires = self._tools.settings.presign_expire_secs
        found: list[PartUrl] = []
        for number in numbers:
            length = size_of(number, upload.size_bytes, size)
            request = await self._objects.sign_part(
                upload.pending_key, upload.multipart_id or "", number, length, expires
            )
            found.append(PartUrl(number, length, request))
        self._metrics.multipart_part_presigns.inc(len(found))
        return found

    async def complete(self, announced: Announced, upload_id: str, said: Said, actor: str) -> Completed:
        """As `Uploads.complete`. Raises BadRequest too for a part that is missing, out of order, or has another etag;
        the upload goes on then."""
        try:
            check_artifact_digest(announced.digest)
            upload = await self._upload(announced.app, upload_id)
            size = upload.part_size_bytes or 0
            count = part_count(upload.size_bytes, size)
            check_parts(said.parts or (), count)
            done = await self._uploads.complete(announced, upload_id, said, actor, in_parts=True)
        except AetherError:
            self._metrics.multipart_complete_failures.inc()
            raise
        self._metrics.multipart_completes.inc()
        if done.fresh:
            self._metrics.parts.observe(count)
            for number in range(1, count + 1):
                self._metrics.part_bytes.observe(size_of(number, upload.size_bytes, size))
        return done

    async def _upload(self, app: str, upload_id: str) -> Upload:
        async with self._database.read() as tx:
            app_id = await records.app_id(tx, app)
            upload = await upload_rows.find(tx, upload_id)
        if upload is None or upload.app_id != app_id:
            raise NotFound(f"there is no upload '{upload_id[:64]}' for app '{app}'; begin one")
        if upload.multipart_id is None or not upload.part_size_bytes:
            raise BadRequest("this upload is in one piece: it is completed at /artifacts/complete")
        return upload


def _in_parts(upload: Upload, multipart_id: str, part_size_bytes: int) -> Upload:
    if len(multipart_id) > _MAX_MULTIPART_ID:
        raise ServiceUnavailable("the object store names its uploads with more than can be kept")
    return replace(upload, multipart_id=multipart_id, part_size_bytes=part_size_bytes)


def _begun(upload: Upload, arrived: Sequence[Part]) -> Begun:
    size = upload.part_size_bytes or 0
    return Begun(
        records.storage_key(upload.app, upload.digest),
        upload.id,
        size,
        part_count(upload.size_bytes, size),
        upload.expires_at,
        arrived,
    )
