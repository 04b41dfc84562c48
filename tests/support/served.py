"""The API on a real uvicorn over a loopback port, with the directory store in a temporary folder or the S3 store that
the environment names, and the database of the test (`support.databases`): SQLite, or both in a module with
`pytest.mark.usefixtures("database_url")`."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import sqlalchemy as sa
from argon2 import PasswordHasher
from yarl import URL

from aether.api.app import create_api
from aether.api.server import ApiServer, loopback_socket
from aether.api.services import Services
from aether.identity.passwords import Passwords
from aether.identity.roles import DEFAULT_TEAM
from aether.identity.service import Identity
from aether.leases import Leases
from aether.model.names import new_id
from aether.model.times import now_us
from aether.observability.metrics import Metrics
from aether.registry.service import Registry
from aether.settings import Settings, load
from aether.stores.database.engine import Database
from aether.stores.database.tables import applications
from aether.stores.keys import keyring
from aether.stores.objects.filesystem import FilesystemObjects
from aether.stores.objects.signing import UrlSigner, load_key
from aether.topology.objects import open_objects
from support.databases import connected, current_url

_PREFIXES = ("pending/", "claimed/", "artifacts/")
_CHEAP = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
_STORE = ("AETHER_STORAGE_MODE", "AETHER_S3_ENDPOINT_URL", "AETHER_ARTIFACT_BUCKET")
TOKENS = {"AETHER_API_TOKENS": "tok-admin:admin:ann,tok-deployer:deployer:dan,tok-reader:reader:rob"}


@dataclass
class Served:
    """Everything behind one API, and a client that carries the deployer's token."""

    port: int
    folder: Path
    settings: Settings
    database: Database
    objects: FilesystemObjects
    registry: Registry
    services: Services
    metrics: Metrics
    client: aiohttp.ClientSession

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def add_app(self, name: str, owner: str = DEFAULT_TEAM) -> str:
        return await add_app(self.database, name, owner)

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """(status, decoded body)."""
        async with self.client.request(method, self.base + path, **options) as answer:
            body = await answer.read()
            return answer.status, await answer.json() if "json" in answer.content_type else body

    async def presign(self, app: str, data: bytes, **more: Any) -> dict[str, Any]:
        body = {"app": app, "digest": digest_of(data), "size_bytes": len(data), **more}
        status, made = await self.call("POST", "/artifacts/presign", json=body)
        assert status == 200, made
        return made

    async def put(self, signed: dict[str, Any], data: bytes) -> int:
        if not signed["url"].startswith("/"):
            return (await self.outside(signed, data))[0]
        status, _ = await self.call("PUT", signed["url"], data=io.BytesIO(data))
        return status

    async def outside(self, signed: dict[str, Any], data: bytes = b"") -> tuple[int, bytes, str]:
        """Make a signed request as whoever has no token: (status, body, ETag)."""
        url = signed["url"] if "://" in signed["url"] else self.base + signed["url"]
        body = io.BytesIO(data) if signed["method"] == "PUT" else None
        timeout = aiohttp.ClientTimeout(60)
        async with (
            aiohttp.ClientSession(timeout=timeout) as client,
            client.request(
                signed["method"], URL(url, encoded=True), data=body, headers=signed["headers"],
                skip_auto_headers=["Content-Type"],
            ) as answer,
        ):  # fmt: skip
            return answer.status, await answer.read(), answer.headers.get("ETag", "")

    async def download(self, digest: str, query: str = "") -> tuple[int, bytes]:
        """What the redirect leads to."""
        path = f"{self.base}/artifacts/{digest}/download{query}"
        async with self.client.get(path, allow_redirects=False) as answer:
            if answer.status != 307:
                return answer.status, await answer.read()
            url = answer.headers["Location"]
        status, body, _ = await self.outside({"method": "GET", "url": url, "headers": {}})
        return status, body

    async def keys(self) -> set[str]:
        """Keys of all objects, whatever the store is."""
        return {key for prefix in _PREFIXES async for key in self._keys(prefix)}

    async def _keys(self, prefix: str) -> AsyncIterator[str]:
        async for key, _, _ in self.objects.list(prefix):
            yield key

    async def complete(self, app: str, data: bytes, upload_id: str, **more: Any) -> tuple[int, Any]:
        body = {"app": app, "digest": digest_of(data), "size_bytes": len(data), "upload_id": upload_id, **more}
        return await self.call("POST", "/artifacts/complete", json=body)

    async def upload(self, app: str, data: bytes) -> dict[str, Any]:
        signed = await self.presign(app, data)
        assert await self.put(signed, data) == 200
        status, done = await self.complete(app, data, signed["upload_id"])
        assert status == 200, done
        return done

    def files(self) -> set[str]:
        """Keys of all objects, half-received ones included."""
        root = self.folder / "objects"
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def add_app(database: Database, name: str, owner: str = DEFAULT_TEAM) -> str:
    app_id = new_id()
    async with database.write() as tx:
        row = {"id": app_id, "name": name, "owner": owner, "created_at": now_us()}
        await tx.execute(sa.insert(applications).values(row))
    return app_id


@asynccontextmanager
async def served(
    folder: Path, objects_root: Path | None = None, lease_secs: float = 0.0, **environ: str
) -> AsyncIterator[Served]:
    """With `lease_secs` it is one of several servers on the database and the folder."""
    named = {name: os.environ[name] for name in _STORE if name in os.environ}
    settings = load({**TOKENS, **named, **environ}, data_dir=folder)
    database = connected(current_url(folder))
    await database.open()
    objects: Any
    if settings.storage_mode == "s3":
        objects = (await open_objects(settings)).objects
    else:
        objects = FilesystemObjects(objects_root or folder / "objects", UrlSigner(load_key(folder / "signing.key")))
        await objects.open()
    metrics = Metrics()
    sealer = keyring.load(folder, given="", file=None, in_use=())
    leases = Leases(database, f"{os.getpid()}-{new_id()}", ttl_secs=lease_secs) if lease_secs else None
    if leases is not None:
        leases.start()
    registry = Registry(database, objects, settings, metrics, sealer, leases)
    await registry.attestation_keys.ensure()
    services = Services(
        settings,
        Identity(database, settings.api_tokens, required=settings.auth_required, passwords=Passwords(_CHEAP)),
        registry=registry,
        transfer=None if settings.storage_mode == "s3" else objects,
        metrics=metrics,
        checks={"database": database.check, "objects": objects.check},
    )
    sock, port = loopback_socket()
    server = ApiServer(create_api(services), sock, grace_secs=1)
    await server.start()
    headers = {"Authorization": "Bearer tok-deployer"}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(60)) as client:
        try:
            yield Served(port, folder, settings, database, objects, registry, services, metrics, client)
        finally:
            services.shutdown.set()
            await client.close()
            await server.stop()
            if leases is not None:
                await leases.close()
            await objects.close()
            await database.close()


def random_bytes(size: int) -> bytes:
    return os.urandom(size)
