"""An S3 bucket as object store: AWS, MinIO, Ceph and others that speak the protocol.

    pending/<upload>          what clients put by signed URLs; such a URL may replace it for as long as it lives
    claimed/<upload>/<id>     a copy of it that no URL reaches, made under a name of its own; hashed there
    artifacts/...             final: copied from what was hashed
    probe/<id>                a few bytes at the start (`aether.stores.objects.s3_probe`)

Why a copy and not an ETag: an ETag is an MD5 at best, and whoever holds a live URL may put other bytes with the same
one. Why a name of its own for each claim: two servers may claim at once, and a copy that was given up may land late;
nothing ever writes to a name of which somebody may have hashed the content. None of this needs a condition that some
stores ignore. What a kill leaves is another claimed copy, which is collected like every upload that came to nothing.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import structlog

from aether.model.errors import AetherError, BadRequest, ConfigError, NotFound, ServiceUnavailable
from aether.model.names import new_id
from aether.model.objects import MAX_PART_BYTES, Part, SignedRequest
from aether.stores.objects.parts import bare, check_number, check_order, check_parts
from aether.stores.objects.s3_client import Clients, S3Options
from aether.stores.objects.s3_copy import Copier, whole_checksum
from aether.stores.objects.s3_errors import FAILURES, Failed, explained, told
from aether.stores.objects.s3_probe import Abilities, probe
from aether.stores.objects.s3_write import Writer
from aether.stores.objects.signing import check_key

_PENDING, _CLAIMED = "pending/", "claimed/"
_LONGEST_SECS = 7 * 86_400
"""S3 signs for no longer."""
_AWAY_SECS = 1.0
"""So long nobody asks again whether a store is back."""
_ATTEMPTS = 4
_HASHED_AT_ONCE = 8
"""More are no faster, and each of them holds a few blocks."""
_HASHED_BYTES = 512 * 1024
_FIRST_WAIT_SECS = 0.1
_T = TypeVar("_T")
_log = structlog.stdlib.get_logger("aether.objects")


class S3Objects:
    """The port `aether.registry.ports.ObjectStore` on one bucket, for any number of servers at once."""

    def __init__(self, options: S3Options) -> None:
        self._options = options
        self._clients = Clients()
        self._writer = Writer(self._clients, options)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="objects")
        self._hashing = asyncio.Semaphore(_HASHED_AT_ONCE)
        self._abilities: Abilities | None = None
        self._probing = asyncio.Lock()
        self._away: tuple[float, str] | None = None
        """When the store was last found away, on the monotonic clock, and how."""

    async def open(self) -> None:
        """Look at the bucket. One that cannot be reached is looked at again when it is needed; raises ConfigError,
        which names the fix, for everything that waiting does not help."""
        try:
            await self._clients.open(self._options)
            self._abilities = await probe(self._clients.calling, self._options)
        except ServiceUnavailable as error:
            _log.warning("the object store is away; artifacts wait for it", error=error.message)
        except FAILURES as error:
            await self.close()
            raise explained(error, self._options.bucket, self._options.where) from error
        except ConfigError:
            await self.close()
            raise

    async def close(self) -> None:
        await self._writer.close()
        await self._clients.close()
        await asyncio.to_thread(self._threads.shutdown, wait=True)

    async def check(self) -> None:
        """Readiness: the bucket answers. Raises ServiceUnavailable."""
        await self.abilities()
        try:
            await self._clients.once.head_bucket(Bucket=self._options.bucket)
        except FAILURES as error:
            told_so = explained(error, self._options.bucket, self._options.where)
            raise ServiceUnavailable(told_so.message) from error

    async def abilities(self) -> Abilities:
        """What the store can do. Raises ServiceUnavailable while that is not known."""
        async with self._probing:
            if self._abilities is not None:
                return self._abilities
            if self._away is not None and time.monotonic() < self._away[0] + _AWAY_SECS:
                raise ServiceUnavailable(self._away[1])
            try:
                self._abilities = await probe(self._clients.once, self._options)
            except (ConfigError, ServiceUnavailable) as error:
                self._away = time.monotonic(), error.message
                raise ServiceUnavailable(error.message) from error
            return self._abilities

    # --- signed requests

    async def sign_put(
        self, key: str, size_bytes: int, expires_secs: int, *, sha256: str | None = None
    ) -> SignedRequest:
        if size_bytes > MAX_PART_BYTES:
            raise BadRequest(f"an object of more than {MAX_PART_BYTES} bytes is uploaded in parts")
        headers = self._options.encryption_headers()
        wanted = {**self._at(key), "ContentLength": size_bytes, **self._options.encryption()}
        if sha256 is not None and (await self.abilities()).checksums:
            checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
            wanted["ChecksumSHA256"] = headers["x-amz-checksum-sha256"] = checksum
        return await self._signed("PUT", "put_object", wanted, expires_secs, headers)

    async def sign_get(self, key: str, expires_secs: int, filename: str) -> SignedRequest:
        plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "_" for c in filename)
        wanted = {
            **self._at(key),
            "ResponseContentDisposition": f'attachment; filename="{plain}"',
            "ResponseContentType": "application/gzip",
        }
        return await self._signed("GET", "get_object", wanted, expires_secs, {})

    async def sign_part(
        self, key: str, multipart_id: str, number: int, size_bytes: int, expires_secs: int
    ) -> SignedRequest:
        check_number(number)
        wanted = {
            **self._at(key),
            "UploadId": multipart_id,
            "PartNumber": number,
            "ContentLength": size_bytes,
        }
        return await self._signed("PUT", "upload_part", wanted, expires_secs, {})

    async def _signed(
        self, method: str, operation: str, wanted: dict[str, Any], expires_secs: int, headers: dict[str, str]
    ) -> SignedRequest:
        secs = min(expires_secs, _LONGEST_SECS)
        expires_at = int(time.time()) + secs
        with told():
            url = await self._clients.signing.generate_presigned_url(operation, Params=wanted, ExpiresIn=secs)
        return SignedRequest(method, url, headers, expires_at)

    # --- uploads in parts

    async def begin_multipart(self, key: str) -> str:
        with told():
            begun = await self._clients.calling.create_multipart_upload(**self._at(key), **self._options.encryption())
        return str(begun["UploadId"])

    async def parts(self, key: str, multipart_id: str) -> list[Part]:
        found: list[Part] = []
        with told():
            pages = self._clients.calling.get_paginator("list_parts").paginate(**self._at(key), UploadId=multipart_id)
            async for page in pages:
                for item in page.get("Parts", ()):
                    found.append(Part(item["PartNumber"], item["Size"], bare(item["ETag"])))
        return found

    async def finish_multipart(self, key: str, multipart_id: str, parts: Sequence[tuple[int, str]]) -> None:
        check_order(parts)
        await _again(lambda: self._finish(key, multipart_id, parts))

    async def _finish(self, key: str, multipart_id: str, parts: Sequence[tuple[int, str]]) -> None:
        named = [{"PartNumber": number, "ETag": f'"{bare(etag)}"'} for number, etag in parts]
        try:
            with told():
                await self._clients.once.complete_multipart_upload(
                    **self._at(key), UploadId=multipart_id, MultipartUpload={"Parts": named}
                )
        except AetherError:
            # It may be over, by a call whose answer was lost: some stores call that a wrong part, radosgw calls it a
            # completion that is already in progress.
            try:
                check_parts(await self.parts(key, multipart_id), parts)
            except NotFound:
                if await self._there(key) or await self._claimed(key) is not None:
                    return
                raise
            raise

    async def abort_multipart(self, key: str, multipart_id: str) -> None:
        try:
            with told():
                await self._clients.calling.abort_multipart_upload(**self._at(key), UploadId=multipart_id)
        except NotFound:
            return

    async def multipart_uploads(self, prefix: str) -> AsyncIterator[tuple[str, str, float]]:
        """All are asked for: MinIO takes a prefix for the whole key."""
        with told():
            pages = self._clients.calling.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._options.bucket
            )
            async for page in pages:
                for item in page.get("Uploads", ()):
                    if item["Key"].startswith(prefix):
                        yield item["Key"], item["UploadId"], item["Initiated"].timestamp()

    # --- the server's own

    async def put(self, key: str, body: AsyncIterator[bytes], size_bytes: int | None = None) -> None:
        await self._writer.put(check_key(key), body, size_bytes)

    async def size(self, key: str) -> int:
        with told():
            return int((await self._clients.calling.head_object(**self._at(key)))["ContentLength"])

    async def read(self, key: str, chunk_bytes: int = 1 << 20, start: int = 0) -> AsyncGenerator[bytes]:
        """A connection that breaks is taken up again where it broke, a few times in a row."""
        at, failures, pinned = start, 0, dict[str, str]()
        while True:
            try:
                with told():
                    ranged = {"Range": f"bytes={at}-"} if at else {}
                    found = await self._clients.calling.get_object(**self._at(key), **ranged, **pinned)
                    pinned = {"IfMatch": found["ETag"]}
                    end = at + int(found["ContentLength"])
                    async with found["Body"] as body:
                        while at < end:
                            block = await _gathered(body, min(chunk_bytes, end - at))
                            at += len(block)
                            failures = 0
                            yield block
                return
            except ServiceUnavailable:
                failures += 1
                if failures >= _ATTEMPTS:
                    raise
                await _wait(failures)

    async def sha256(self, key: str) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        hashing: asyncio.Future[None] | None = None
        loop = asyncio.get_running_loop()
        async with self._hashing:
            try:
                async for block in self.read(key, _HASHED_BYTES):
                    if hashing is not None:
                        await hashing
                    hashing = loop.run_in_executor(self._threads, digest.update, block)
                    size += len(block)
            finally:
                if hashing is not None:
                    await hashing
        return digest.hexdigest(), size

    async def kept_sha256(self, key: str) -> str | None:
        able = await self.abilities()
        more = {"ChecksumMode": "ENABLED"} if able.checksums else {}
        with told():
            checksum = whole_checksum(await self._clients.calling.head_object(**self._at(key), **more))
        return base64.b64decode(checksum).hex() if checksum else None

    async def claim(self, key: str) -> str:
        if not key.startswith(_PENDING):
            raise BadRequest("only a pending object can be claimed")
        return await _again(lambda: self._claim(key))

    async def _claim(self, key: str) -> str:
        claimed = await self._claimed(key)
        if claimed is None:
            claimed = f"{_claims_of(key)}{new_id()}"
            try:
                await self._copy(key, claimed, replaced=True)
            except NotFound:
                # Somebody else may have been faster.
                claimed = await self._claimed(key)
                if claimed is None:
                    raise
        await self.delete(key)
        return claimed

    async def move(self, source: str, target: str) -> None:
        check_key(target)
        await _again(lambda: self._move(source, target))

    async def _move(self, source: str, target: str) -> None:
        try:
            await self._copy(source, target)
        except NotFound:
            await self.size(target)
            return
        await self.delete(source)

    async def delete(self, key: str) -> None:
        with told():
            await self._clients.calling.delete_object(**self._at(key))

    def local_path(self, key: str) -> str | None:
        return None

    async def list(self, prefix: str) -> AsyncIterator[tuple[str, int, float]]:
        with told():
            pages = self._clients.calling.get_paginator("list_objects_v2").paginate(
                Bucket=self._options.bucket, Prefix=prefix
            )
            async for page in pages:
                for item in page.get("Contents", ()):
                    yield item["Key"], item["Size"], item["LastModified"].timestamp()

    # --- small things

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._options.bucket, "Key": check_key(key)}

    async def _there(self, key: str) -> bool:
        try:
            await self.size(key)
        except NotFound:
            return False
        return True

    async def _claimed(self, key: str) -> str | None:
        """The first claimed copy of a pending object."""
        with told():
            found = await self._clients.calling.list_objects_v2(
                Bucket=self._options.bucket, Prefix=_claims_of(key), MaxKeys=1
            )
        return next((str(item["Key"]) for item in found.get("Contents", ())), None)

    async def _copy(self, source: str, target: str, *, replaced: bool = False) -> None:
        async def through(source: str, target: str, size: int) -> None:
            await self.put(target, self.read(source), size)

        copier = Copier(self._clients, self._options, await self.abilities(), through)
        await copier.copy(source, target, replaced=replaced)


async def _again(work: Callable[[], Awaitable[_T]]) -> _T:
    """What may be repeated, as long as the store answers and says that it failed, up to a few times."""
    attempts = 0
    while True:
        try:
            return await work()
        except Failed:
            attempts += 1
            if attempts >= _ATTEMPTS:
                raise
            await _wait(attempts)


async def _wait(attempts: int) -> None:
    await asyncio.sleep(_FIRST_WAIT_SECS * 2**attempts * random.uniform(0.5, 1.0))


def _claims_of(key: str) -> str:
    return f"{_CLAIMED}{key.removeprefix(_PENDING)}/"


async def _gathered(body: Any, size: int) -> bytes:
    """Exactly `size` bytes: what comes off the wire comes in small pieces."""
    pieces: list[bytes] = []
    while size > 0:
        piece: bytes = await body.read(size)
        if not piece:
            raise ConnectionResetError("the object store ended an object early")
        pieces.append(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
