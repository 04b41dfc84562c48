"""Manifest, SBOM and provenance of artifacts, as the bytes that were sent, beside the artifact in the store.

A document may be replaced. The row names the SHA-256 of the one that counts; before another is written over it, the
row says which (`replacing`), so that after a kill between the two whatever is in the store is known for what it is:
the document that counts, or the one that was to come and had been judged. Anything else was altered and is not shown.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.artifact import dsse, sbom
from aether.model.errors import DigestMismatch, NotFound
from aether.registry import events, records
from aether.registry.checks import check_artifact_digest
from aether.registry.events import What
from aether.registry.judging import Judges
from aether.registry.locks import Hold
from aether.registry.records import MANIFEST, PROVENANCE, SBOM, Artifact
from aether.registry.tools import Tools

LIMITS = {MANIFEST: 32 << 20, SBOM: sbom.MAX_BYTES, PROVENANCE: dsse.MAX_BYTES}
"""Bytes of a document that are taken."""

Beside = Callable[[AsyncConnection, Artifact, str], Awaitable[None]]
"""What else is on record of the document with this SHA-256, written before it is."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document that was stored."""

    app: str
    digest: str
    kind: str
    sha256: str
    size_bytes: int


class Documents:
    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._database = tools.database
        self._objects = tools.objects
        self._judges = Judges()

    async def put(
        self,
        kind: str,
        digest: str,
        app: str | None,
        body: bytes,
        actor: str,
        only: sa.ColumnElement[bool] | None = None,
    ) -> Document:
        """Store a manifest or an SBOM. Raises NotFound, InvalidDigest, BadRequest (not such a document, or several
        apps have the artifact), DigestMismatch (about another one)."""
        found = await self.of(digest, app, only)
        what = await self._judges.check(kind, body, digest)
        return await self.keep(kind, found, body, actor, what)

    async def of(self, digest: str, app: str | None, only: sa.ColumnElement[bool] | None) -> Artifact:
        """The artifact that a document is about to be stored with."""
        check_artifact_digest(digest)
        async with self._database.read() as tx:
            return await records.only_one(tx, digest, app, only)

    async def keep(
        self, kind: str, found: Artifact, body: bytes, actor: str, detail: str, beside: Beside | None = None
    ) -> Document:
        """Store a document that was judged."""
        sha256 = hashlib.sha256(body).hexdigest()
        key = records.document_key(found.app, found.digest, kind)
        async with self._tools.locks.alone_with(found.app_id, found.digest) as hold:
            await self._settle(hold, found)
            async with self._database.write() as tx:
                row = await self._locked(tx, hold, found)
                await records.set_values(tx, row.id, replacing=f"{kind}:{sha256}")
                if beside is not None:
                    await beside(tx, row, sha256)
            hold.check()
            await self._objects.put(key, _once(body), len(body))
            async with self._database.write() as tx:
                row = await self._locked(tx, hold, found)
                await records.set_values(tx, row.id, replacing=None, **{f"{kind}_digest": sha256})
                text = f"{kind} {sha256[:12]}, {detail}"
                event = events.row(row.app_id, row.digest, What.DOCUMENTED, actor, text, artifact_id=row.id)
                await events.add(tx, event)
        self._tools.tell(What.DOCUMENTED)
        return Document(found.app, found.digest, kind, sha256, len(body))

    async def _settle(self, hold: Hold, found: Artifact) -> None:
        """Bring the row up to date with what a killed server had got to."""
        async with self._database.read() as tx:
            row = await records.stored(tx, found.app_id, found.digest)
        if row is None or row.replacing is None:
            return
        kind, _, coming = row.replacing.partition(":")
        try:
            there, _ = await self._objects.sha256(records.document_key(row.app, row.digest, kind))
        except NotFound:
            there = ""
        values = {f"{kind}_digest": coming} if there == coming else {}
        async with self._database.write() as tx:
            await self._locked(tx, hold, found)
            await records.set_values(tx, row.id, replacing=None, **values)

    async def get(
        self, kind: str, digest: str, app: str | None, only: sa.ColumnElement[bool] | None = None
    ) -> tuple[Artifact, bytes]:
        """The document of the newest such artifact. Raises NotFound, InvalidDigest, DigestMismatch when it was
        altered."""
        check_artifact_digest(digest)
        async with self._database.read() as tx:
            found = await records.find(tx, digest, app, only)
        return found, await self.read(kind, found)

    async def read(self, kind: str, found: Artifact) -> bytes:
        """The bytes of a document. Raises NotFound, DigestMismatch."""
        if not _expected(kind, found):
            raise records.no_document(found, kind)
        body = await self._read(kind, found)
        sha256 = hashlib.sha256(body).hexdigest()
        if sha256 in _expected(kind, found):
            return body
        async with self._database.read() as tx:
            now = await records.by_id(tx, found.id)  # it may have been replaced since the row was read
        if now is not None and sha256 in _expected(kind, now):
            return body
        raise DigestMismatch(
            f"the {kind} in the store is not the one that was stored: it was altered; send it again",
            {"expected": found.document_digest(kind), "actual": sha256},
        )

    async def _read(self, kind: str, found: Artifact) -> bytes:
        parts: list[bytes] = []
        size = 0
        try:
            async for block in self._objects.read(records.document_key(found.app, found.digest, kind)):
                parts.append(block)
                size += len(block)
                if size > LIMITS[kind]:
                    raise DigestMismatch(f"the {kind} in the store is not the one that was stored: it has grown")
        except NotFound:
            raise NotFound(f"the {kind} of the artifact {found.digest[:12]} is no longer in the store") from None
        return b"".join(parts)

    async def _locked(self, tx: AsyncConnection, hold: Hold, found: Artifact) -> Artifact:
        await hold.confirm(tx)
        row = await records.stored(tx, found.app_id, found.digest, lock=True)
        if row is None:
            raise NotFound("there is no artifact with this digest")
        return row


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


def _expected(kind: str, row: Artifact) -> set[str]:
    """SHA-256 of what may be in the store: the document that counts, and the one that is being written over it."""
    coming = (row.replacing or "").removeprefix(f"{kind}:")
    return {one for one in (row.document_digest(kind), coming) if one}
