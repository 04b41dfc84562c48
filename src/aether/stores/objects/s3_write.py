"""Writing what this server itself holds into a bucket, in bounded memory.

Small: one request that may be repeated. Of a known size: one request whose body passes as it comes, so that what
breaks off is for the store to drop. Of any size: parts of a few MiB.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any
from xml.etree import ElementTree

import aiohttp
from yarl import URL

from aether.model.errors import AetherError, BadRequest
from aether.model.objects import MAX_PART_BYTES
from aether.stores.objects.s3_client import Clients, S3Options
from aether.stores.objects.s3_copy import give_up
from aether.stores.objects.s3_errors import from_code, told

SMALL_BYTES = 1024**2
_SIGNED_SECS = 3600


class Writer:
    """Open until `close`."""

    def __init__(self, clients: Clients, options: S3Options) -> None:
        self._clients = clients
        self._options = options
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def put(self, key: str, body: AsyncIterator[bytes], size: int | None) -> None:
        """Raises BadRequest unless `body` has `size` bytes, ServiceUnavailable, and whatever `body` raises."""
        if size is None or size > MAX_PART_BYTES or size <= SMALL_BYTES:
            await self._in_parts(key, body, size)
        else:
            await self._in_one(key, body, size)

    async def _in_one(self, key: str, body: AsyncIterator[bytes], size: int) -> None:
        """A signed URL is the one way to send bytes to S3 without having read all of them before."""
        wanted = {"Bucket": self._options.bucket, "Key": key, "ContentLength": size, **self._options.encryption()}
        headers = {"Content-Length": str(size), **self._options.encryption_headers()}
        exact = _Exact(body, size)
        try:
            with told():
                url = await self._clients.once.generate_presigned_url(
                    "put_object", Params=wanted, ExpiresIn=_SIGNED_SECS
                )
                session = self._session = self._session or self._connect()
                async with session.put(
                    URL(url, encoded=True), data=exact.blocks(), headers=headers, allow_redirects=False
                ) as answer:
                    text = await answer.text()
        except AetherError:
            if exact.failure is not None:
                raise exact.failure from None
            raise
        if answer.status >= 300:
            raise from_code(_code(text), answer.status)

    async def _in_parts(self, key: str, body: AsyncIterator[bytes], size: int | None) -> None:
        where = {"Bucket": self._options.bucket, "Key": key}
        step = self._options.put_part_bytes
        held, total, parts = bytearray(), 0, list[dict[str, Any]]()
        client = self._clients.calling

        async def part(data: bytes) -> None:
            with told():
                if "UploadId" not in where:
                    begun = await client.create_multipart_upload(**where, **self._options.encryption())
                    where["UploadId"] = begun["UploadId"]
                number = len(parts) + 1
                sent = await client.upload_part(**where, PartNumber=number, Body=data)
                parts.append({"PartNumber": number, "ETag": sent["ETag"]})

        try:
            async for block in body:
                held += block
                total += len(block)
                while len(held) >= step:
                    await part(bytes(memoryview(held)[:step]))
                    del held[:step]
            if size is not None and total != size:
                raise BadRequest(f"{total} bytes arrived, {size} were announced; nothing was kept")
            if not parts:
                with told():
                    await client.put_object(**where, Body=bytes(held), **self._options.encryption())
                return
            if held:
                await part(bytes(held))
            with told():
                await client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
        except BaseException:
            if "UploadId" in where:
                await give_up(client, where)
            raise

    def _connect(self) -> aiohttp.ClientSession:
        trusted = ssl.create_default_context(cafile=self._clients.ca_bundle)
        timeout = aiohttp.ClientTimeout(
            sock_connect=self._options.connect_timeout_secs, sock_read=self._options.read_timeout_secs
        )
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._options.connections, ssl=trusted),
            timeout=timeout,
            skip_auto_headers={"Content-Type"},
            trust_env=True,
        )


class _Exact:
    """Blocks of `body` as long as they are no more than `size` bytes. aiohttp wraps what a body raises: the cause is
    kept here."""

    def __init__(self, body: AsyncIterator[bytes], size: int) -> None:
        self._body = body
        self._size = size
        self.failure: BaseException | None = None

    async def blocks(self) -> AsyncGenerator[bytes]:
        total = 0
        try:
            async for block in self._body:
                total += len(block)
                if total > self._size:
                    raise BadRequest(
                        f"more than the {self._size} bytes that were announced arrived; nothing was kept"
                    )
                yield block
            if total != self._size:
                raise BadRequest(f"{total} bytes arrived, {self._size} were announced; nothing was kept")
        except Exception as error:
            self.failure = error
            raise


def _code(text: str) -> str:
    try:
        return ElementTree.fromstring(text).findtext("Code") or ""
    except ElementTree.ParseError:
        return ""
