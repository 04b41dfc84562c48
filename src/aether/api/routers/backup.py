"""The whole control plane as one download, for admins."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator

import msgspec
from litestar import post
from litestar.params import JSONBody
from litestar.response import Stream

from aether.api.services import Deps
from aether.backup.format import BackupKeys, Kdf
from aether.backup.write import Plan, Writer
from aether.model.errors import BadRequest, ServiceUnavailable


class KeyDerivation(msgspec.Struct, forbid_unknown_fields=True):
    """How the passphrase became `key`: kept in the backup, so that the passphrase alone opens it."""

    salt: str
    n: int
    r: int
    p: int
    name: str = "scrypt"


class NewBackup(msgspec.Struct, forbid_unknown_fields=True):
    """`keys` is sealed, plain or none. Sealed needs `key`, 64 bytes in base64 that the client derived by `kdf` from a
    passphrase; the server never sees the passphrase."""

    keys: str
    key: str | None = None
    kdf: KeyDerivation | None = None
    volumes: bool = True
    logs: bool = False


@post("/backup", status_code=200, media_type="application/x-tar", tags=["backup"])
async def make_backup(data: JSONBody[NewBackup], services: Deps) -> Stream:
    """A backup as of now, streamed while the server goes on. An answer that breaks off is no backup."""
    if services.backup is None:
        raise ServiceUnavailable(
            "this server shares its database with others, so 'aether backup' cannot save it: use pg_dump for the "
            "database and the object store's own tools for the artifacts, and keep secrets.key (docs/backup.md)"
        )
    writer = services.backup(_plan(data))
    preparing = asyncio.ensure_future(asyncio.to_thread(writer.prepare))
    try:
        await asyncio.shield(preparing)
    except BaseException:
        await asyncio.wait([preparing])
        await asyncio.to_thread(writer.close)
        raise
    return Stream(_blocks(writer), media_type="application/x-tar", headers={"Cache-Control": "no-store"})


async def _blocks(writer: Writer) -> AsyncGenerator[bytes]:
    blocks = writer.stream()
    try:
        while (block := await asyncio.to_thread(next, blocks, None)) is not None:
            if block:
                yield block
    finally:
        await asyncio.to_thread(writer.close)


def _plan(data: NewBackup) -> Plan:
    if data.keys not in ("sealed", "plain", "none"):
        raise BadRequest("keys is sealed, plain or none", {"field": "keys"})
    keys: BackupKeys | None = None
    if data.keys == "sealed":
        if data.key is None or data.kdf is None:
            raise BadRequest("sealed keys need key and kdf", {"field": "key"})
        try:
            keys = BackupKeys(
                base64.b64decode(data.key, validate=True), Kdf.from_json(msgspec.structs.asdict(data.kdf))
            )
        except ValueError:
            raise BadRequest("key is 64 bytes in base64, kdf what scrypt was given", {"field": "key"}) from None
    return Plan(keys, data.keys == "plain", data.volumes, data.logs)


HANDLERS = [make_backup]
