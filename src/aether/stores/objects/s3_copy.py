"""Copying inside a bucket: whole, in parts, or through this server where the store cannot.

A copy is asked for once. One that was given up may still land later, and a second one to the same key would then be
overwritten with what the source holds by that time: who tries again takes another key, or copies from a source that
never changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aether.model.errors import ServiceUnavailable
from aether.stores.objects.s3_client import Clients, S3Options
from aether.stores.objects.s3_errors import told
from aether.stores.objects.s3_probe import Abilities

_AT_ONCE = 4


class Copier:
    """`through` moves an object through this server: (source, target, size)."""

    def __init__(
        self,
        clients: Clients,
        options: S3Options,
        abilities: Abilities,
        through: Callable[[str, str, int], Awaitable[None]],
    ) -> None:
        self._clients = clients
        self._options = options
        self._abilities = abilities
        self._through = through

    async def copy(self, source: str, target: str, *, replaced: bool) -> None:
        """Raises NotFound without the source, ServiceUnavailable. The target is whole and like the source, or not
        there; a source that may be `replaced` meanwhile gives whatever it has, and is to be hashed afterwards."""
        found = await self._head(source)
        size = int(found["ContentLength"])
        pin = self._abilities.pinned_copies and not replaced
        pinned = {"CopySourceIfMatch": found["ETag"]} if pin else {}
        if not self._abilities.copies:
            await self._through(source, target, size)
        elif size > self._options.copy_part_bytes:
            await self._in_parts(source, target, size, pinned)
        else:
            await self._whole(source, target, pinned)
        if not replaced:
            made = await self._head(target)
            was, now = whole_checksum(found), whole_checksum(made)
            if int(made["ContentLength"]) != size or (was and now and was != now):
                with told():
                    await self._clients.calling.delete_object(Bucket=self._options.bucket, Key=target)
                raise ServiceUnavailable("the object store made a copy that is not like its source; try again")

    async def _head(self, key: str) -> Any:
        more = {"ChecksumMode": "ENABLED"} if self._abilities.checksums else {}
        with told():
            return await self._clients.calling.head_object(Bucket=self._options.bucket, Key=key, **more)

    async def _whole(self, source: str, target: str, pinned: dict[str, str]) -> None:
        more = {"ChecksumAlgorithm": "SHA256"} if self._abilities.checksums else {}
        with told():
            await self._clients.once.copy_object(
                Bucket=self._options.bucket,
                Key=target,
                CopySource=self._source(source),
                **pinned,
                **more,
                **self._options.encryption(),
            )

    async def _in_parts(self, source: str, target: str, size: int, pinned: dict[str, str]) -> None:
        step = self._options.copy_part_bytes
        where = {"Bucket": self._options.bucket, "Key": target}
        with told():
            begun = await self._clients.calling.create_multipart_upload(**where, **self._options.encryption())
        where["UploadId"] = begun["UploadId"]
        turns = asyncio.Semaphore(_AT_ONCE)

        async def copy(number: int) -> dict[str, Any]:
            first = (number - 1) * step
            async with turns:
                with told():
                    done = await self._clients.calling.upload_part_copy(
                        **where,
                        PartNumber=number,
                        CopySource=self._source(source),
                        CopySourceRange=f"bytes={first}-{min(first + step, size) - 1}",
                        **pinned,
                    )
            return {"PartNumber": number, "ETag": done["CopyPartResult"]["ETag"]}

        copies = [asyncio.ensure_future(copy(number)) for number in range(1, -(-size // step) + 1)]
        try:
            parts = await asyncio.gather(*copies)
            with told():
                await self._clients.once.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
        except BaseException:
            for copying in copies:
                copying.cancel()
            await asyncio.gather(*copies, return_exceptions=True)
            await give_up(self._clients.calling, where)
            raise

    def _source(self, key: str) -> dict[str, str]:
        return {"Bucket": self._options.bucket, "Key": key}


async def give_up(client: Any, where: dict[str, str]) -> None:
    """Abort an upload in parts as far as the store can be reached: what is left of it is collected like any other."""
    try:
        with told():
            await client.abort_multipart_upload(**where)
    except ServiceUnavailable:
        return


def whole_checksum(described: Any) -> str:
    """The SHA-256 that the store keeps of all bytes in one, if it does."""
    checksum = str(described.get("ChecksumSHA256", ""))
    return "" if "-" in checksum or described.get("ChecksumType") == "COMPOSITE" else checksum
