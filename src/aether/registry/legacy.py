"""Uploads whose bytes go through the server: deprecated, for clients that know no signed URLs.

The body goes into the store in the pieces in which it comes, under the key of a pending upload, and is then completed
like any other. Broken off, the store keeps nothing and the upload has failed; killed, it expires.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

from aether.model.errors import AetherError, DigestMismatch, Forbidden
from aether.registry import events, upload_rows
from aether.registry.completing import Completed
from aether.registry.events import What
from aether.registry.tools import Tools
from aether.registry.upload_rows import Said, Upload
from aether.registry.uploads import Announced, Uploads


class Legacy:
    def __init__(self, tools: Tools, uploads: Uploads) -> None:
        self._tools = tools
        self._uploads = uploads
        self._database = tools.database

    def refuse_if_presign_is_required(self) -> None:
        if self._tools.settings.require_presign:
            raise Forbidden(
                "this server takes no uploads through itself (AETHER_REQUIRE_PRESIGN): POST /artifacts/presign gives "
                "a URL to PUT to"
            )

    async def receive(self, announced: Announced, body: AsyncIterator[bytes], said: Said, actor: str) -> Completed:
        """Take in an artifact of exactly the announced size and store it; the body of one that is stored already is
        read and compared all the same. Raises as presigning and completing do."""
        self.refuse_if_presign_is_required()
        app_id, known = await self._uploads.announce(announced)
        if known is not None:
            await self._compare(announced, body)
            return await self._uploads.complete(announced, None, said, actor)
        upload = self._uploads.new(announced, app_id, actor)
        await self._uploads.begin(upload, What.STREAMED)
        try:
            with self._uploads.in_progress():
                await self._tools.objects.put(upload.pending_key, body, upload.size_bytes)
        except AetherError as error:
            await self._fail(upload, error)
            raise
        return await self._uploads.complete(announced, upload.id, said, actor)

    async def _compare(self, announced: Announced, body: AsyncIterator[bytes]) -> None:
        hashed = hashlib.sha256()
        async for block in body:
            hashed.update(block)
        if (actual := hashed.hexdigest()) != announced.digest:
            self._tools.metrics.digest_mismatch.inc()
            details = {"expected": announced.digest, "actual": actual}
            raise DigestMismatch("the uploaded bytes are not the announced artifact", details)

    async def _fail(self, upload: Upload, error: AetherError) -> None:
        row = events.row(
            upload.app_id, upload.digest, What.REJECTED, upload.created_by, error.message, upload_id=upload.id
        )
        async with self._database.write() as tx:
            await events.add(tx, row)
            await upload_rows.set_status(tx, upload.id, "failed", only_from=upload_rows.LIVE)
        self._tools.tell(What.REJECTED)
