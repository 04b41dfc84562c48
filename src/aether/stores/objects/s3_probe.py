"""What one S3 store can do, found out by doing it: stores differ, and none of them says so.

A few bytes are written below `probe/` and taken away again; what a killed server left there goes an hour later.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import base64
import hashlib
import time
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError

from aether.model.errors import ConfigError
from aether.model.names import new_id
from aether.stores.objects.s3_client import S3Options
from aether.stores.objects.s3_errors import FAILURES, explained, status_of

PREFIX = "probe/"
_BYTES = b"aether looks what this store can do\n"
_OTHER = b"AETHER LOOKS WHAT THIS STORE CAN DO\n"
_OLD_SECS = 3600.0


@dataclass(frozen=True, slots=True)
class Abilities:
    """What of S3 may be relied on."""

    checksums: bool
    """It refuses a PUT whose bytes do not have the announced SHA-256, and remembers that of what it keeps."""
    copies: bool
    """It copies what it keeps by itself, encrypted objects included."""
    pinned_copies: bool
    """It refuses to copy a source that has another ETag than the named one."""

    def told(self) -> str:
        named = {
            "checks checksums": self.checksums,
            "copies by itself": self.copies,
            "pins copies": self.pinned_copies,
        }
        return ", ".join(name if able else f"does not: {name}" for name, able in named.items())


async def probe(client: Any, options: S3Options) -> Abilities:
    """Raises ConfigError naming the fix, ServiceUnavailable."""
    try:
        return await _Probe(client, options).run()
    except FAILURES as error:
        raise explained(error, options.bucket, options.where) from error


class _Probe:
    def __init__(self, client: Any, options: S3Options) -> None:
        self._client = client
        self._options = options
        self._bucket = {"Bucket": options.bucket}
        self._key = f"{PREFIX}{new_id()}"

    async def run(self) -> Abilities:
        listed = await self._client.list_objects_v2(**self._bucket, Prefix=PREFIX, MaxKeys=100)
        self._check_region(listed)
        for left in listed.get("Contents", ()):
            if left["LastModified"].timestamp() < time.time() - _OLD_SECS:
                await self._client.delete_object(**self._bucket, Key=left["Key"])
        await self._put(_BYTES)
        try:
            await self._check_encrypted()
            return Abilities(await self._checksums(), await self._copies(), await self._pinned())
        finally:
            for key in (self._key, f"{self._key}.copy"):
                await self._client.delete_object(**self._bucket, Key=key)

    def _check_region(self, listed: Any) -> None:
        """Requests follow a redirect, signed URLs do not."""
        found = listed["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-bucket-region")
        region = self._client.meta.region_name
        if found and not self._options.endpoint_url and found != region:
            raise ConfigError(
                f"the bucket '{self._options.bucket}' is in {found}, not {region}: set AWS_REGION={found}"
            )

    async def _put(self, data: bytes, **more: Any) -> None:
        wanted = {**self._options.encryption(), **more}
        await self._client.put_object(**self._bucket, Key=self._key, Body=data, **wanted)

    async def _check_encrypted(self) -> None:
        wanted = self._options.sse
        found = await self._client.head_object(**self._bucket, Key=self._key)
        if wanted and found.get("ServerSideEncryption") != wanted:
            raise ConfigError(
                f"the object store at {self._options.where} takes AETHER_S3_SSE={wanted} and does not encrypt: set "
                "its encryption up, or unset AETHER_S3_SSE"
            )

    async def _checksums(self) -> bool:
        right = base64.b64encode(hashlib.sha256(_BYTES).digest()).decode()
        if not await self._refuses(lambda: self._put(_OTHER, ChecksumSHA256=right)):
            await self._put(_BYTES)
            return False
        if await self._refuses(lambda: self._put(_BYTES, ChecksumSHA256=right)):
            return False
        found = await self._client.head_object(**self._bucket, Key=self._key, ChecksumMode="ENABLED")
        return found.get("ChecksumSHA256") == right

    async def _copies(self) -> bool:
        return not await self._refuses(self._copy)

    async def _pinned(self) -> bool:
        return await self._refuses(
            lambda: self._copy(CopySourceIfMatch=f'"{hashlib.md5(_OTHER, usedforsecurity=False).hexdigest()}"'), 412
        )

    async def _copy(self, **more: Any) -> None:
        await self._client.copy_object(
            **self._bucket,
            Key=f"{self._key}.copy",
            CopySource={"Bucket": self._options.bucket, "Key": self._key},
            **self._options.encryption(),
            **more,
        )

    async def _refuses(self, ask: Any, *only: int) -> bool:
        try:
            await ask()
        except ClientError as error:
            status = status_of(error)
            if only and status not in only:
                return False
            if only or status in (400, 501):
                return True
            raise
        return False
