"""One object store of each kind behind the same few calls, for tests that hold for all of them."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import pytest
from yarl import URL

from aether.model.objects import SignedRequest
from aether.registry.ports import ObjectStore
from aether.stores.objects.s3 import S3Objects
from aether.stores.objects.s3_client import S3Options
from support import s3_servers
from support.s3_servers import S3Server
from support.served import served

KINDS = ["filesystem", *s3_servers.kinds()]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def etag(self) -> str:
        return self.headers["ETag"]


@dataclass
class Bench:
    """A store, and a client that has no token. `server` and `bucket` only where the store is S3."""

    kind: str
    objects: ObjectStore
    client: aiohttp.ClientSession
    base: str = ""
    server: S3Server | None = None
    bucket: str = ""

    async def send(
        self, signed: SignedRequest, data: bytes = b"", *, url: str = "", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Make a signed request, or one like it with another URL or other headers."""
        address = url or signed.url
        address = self.base + address if address.startswith("/") else address
        wanted = dict(signed.headers if headers is None else headers)
        body = io.BytesIO(data) if signed.method == "PUT" else None
        async with self.client.request(
            signed.method, URL(address, encoded=True), data=body, headers=wanted, skip_auto_headers=["Content-Type"]
        ) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def put(self, key: str, data: bytes) -> Answer:
        answer = await self.send(await self.objects.sign_put(key, len(data), 60), data)
        assert answer.status == 200, answer
        return answer

    async def put_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        answer = await self.send(await self.objects.sign_part(key, upload, number, len(data), 60), data)
        assert answer.status == 200, answer
        return answer.etag

    async def keys(self, prefix: str = "") -> list[str]:
        return [key async for key, _, _ in self.objects.list(prefix)]

    async def content(self, key: str) -> bytes:
        return b"".join([block async for block in self.objects.read(key)])

    def lacks(self, what: str) -> NoReturn:
        """End the test here: the store cannot do `what`, and the run says so at its end."""
        pytest.skip(f"unsupported: {self.kind}: {what}")


@asynccontextmanager
async def bench(kind: str, folder: Path, **options: Any) -> AsyncIterator[Bench]:
    """`options` are of S3Options. The credentials of the server must be in the environment."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as client:
        if kind == "filesystem":
            async with served(folder) as api:
                yield Bench(kind, api.objects, client, api.base)
            return
        server = s3_servers.running(kind)
        bucket = options.pop("bucket", None) or server.new_bucket()
        objects = S3Objects(S3Options(bucket, server.endpoint, **options))
        await objects.open()
        try:
            yield Bench(kind, objects, client, server=server, bucket=bucket)
        finally:
            await objects.close()


def credentials(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind != "filesystem":
        for name, value in s3_servers.running(kind).environ().items():
            monkeypatch.setenv(name, value)


async def stream(*blocks: bytes) -> AsyncIterator[bytes]:
    for block in blocks:
        yield block
