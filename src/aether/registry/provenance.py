"""Where artifacts come from: DSSE envelopes that their builders sign, and that the server signs too when it has found
a signature of one of the app's keys in them.

What is stored is the builder's envelope, byte for byte. The server's signatures are made once, when it comes, and put
beside the builder's on the way out. Which of them hold is judged anew whenever somebody asks.
"""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.artifact import dsse, provenance
from aether.artifact.dsse import Envelope, Signature
from aether.artifact.signature import verify_bytes
from aether.model.database import DatabasePort
from aether.model.errors import BadRequest
from aether.model.times import now_us
from aether.registry import records
from aether.registry.attestation_keys import AttestationKeys
from aether.registry.checks import check_artifact_digest
from aether.registry.documents import Document, Documents
from aether.registry.public_keys import PublicKeys, active_keys
from aether.registry.records import PROVENANCE, Artifact
from aether.stores.database.tables import applications, artifacts, attestations, public_keys

MAX_BUILDER_SIGNATURES = dsse.MAX_SIGNATURES - 2
"""Two places are the server's."""
_MAX_BUILDER = 300
Only = sa.ColumnElement[bool] | None


@dataclass(frozen=True, slots=True)
class Attested:
    """An artifact with provenance, as a list shows it. `verified`: a key that is active has signed it."""

    artifact_id: str
    app: str
    digest: str
    sha256: str
    builder: str
    verified: bool
    created_by: str
    created_at: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """One signature of an envelope. `by` is builder or server; `key_id` is that of the key it was found to be made
    with, None when no key that is known fits. `active`: the key counts now."""

    by: str
    keyid: str
    key_id: str | None
    public_key_hex: str | None
    verified: bool
    active: bool


@dataclass(frozen=True, slots=True)
class Provenance:
    attested: Attested
    statement: Mapping[str, Any]
    signatures: Sequence[Verdict]


@dataclass(frozen=True, slots=True)
class _Known:
    """A key by which a signature may hold."""

    id: str
    public_key_hex: str
    active: bool


class Provenances:
    def __init__(
        self, database: DatabasePort, documents: Documents, public_keys: PublicKeys, own: AttestationKeys
    ) -> None:
        self._database = database
        self._documents = documents
        self._public_keys = public_keys
        self._own = own

    async def put(
        self, digest: str, app: str | None, body: bytes, actor: str, only: Only = None
    ) -> tuple[Document, bool]:
        """Store an envelope about an artifact; also whether an active key of the app has signed it.

        Raises NotFound, InvalidDigest, BadRequest (no such envelope), DigestMismatch (about another artifact).
        """
        found = await self._documents.of(digest, app, only)
        envelope, statement = await asyncio.to_thread(_read, body)
        provenance.check(statement, found.digest, found.app)
        builder = str(statement["predicate"]["runDetails"]["builder"]["id"])
        if len(builder) > _MAX_BUILDER:
            raise BadRequest(f"'builder.id' of the provenance has more than {_MAX_BUILDER} characters")
        async with self._database.read() as tx:
            keys = {key.public_key_hex: key.id for key in await active_keys(tx, found.app_id)}
        signed_by = [keys[key] for key in await asyncio.to_thread(envelope.verify, list(keys))]
        own = await self._sign(envelope) if signed_by else []

        async def beside(tx: AsyncConnection, row: Artifact, sha256: str) -> None:
            same = (attestations.c.artifact_id == row.id, attestations.c.sha256 == sha256)
            await tx.execute(sa.delete(attestations).where(*same))
            # one that neither counts nor is about to was given up half-way
            counts = (attestations.c.artifact_id == row.id, attestations.c.sha256 != (row.provenance_digest or ""))
            await tx.execute(sa.delete(attestations).where(*counts))
            await tx.execute(
                sa.insert(attestations).values(
                    artifact_id=row.id, sha256=sha256, builder=builder, verified_by=json.dumps(signed_by),
                    countersignatures=json.dumps([[one.keyid, b64encode(one.sig).decode()] for one in own]),
                    created_by=actor, created_at=now_us(),
                )
            )  # fmt: skip

        told = f"signed by {len(signed_by)} of the app's keys"
        stored = await self._documents.keep(PROVENANCE, found, body, actor, told, beside)
        return stored, bool(signed_by)

    async def _sign(self, envelope: Envelope) -> list[Signature]:
        bare = replace(envelope, signatures=())
        seeds = await self._own.seeds()

        def signed() -> list[Signature]:
            return [bare.signed(seed).signatures[0] for seed in seeds]

        return await asyncio.to_thread(signed)

    async def list(
        self, app: str | None, limit: int, after: tuple[int, str] | None, only: Only = None
    ) -> Sequence[Attested]:
        """The newest first. Raises NotFound for an unknown app."""
        query = _ATTESTED.order_by(attestations.c.created_at.desc(), attestations.c.artifact_id.desc()).limit(limit)
        if only is not None:
            query = query.where(only)
        if after is not None:
            place = sa.tuple_(attestations.c.created_at, attestations.c.artifact_id)
            query = query.where(place < sa.tuple_(*map(sa.literal, after)))
        async with self._database.read() as tx:
            if app is not None:
                query = query.where(artifacts.c.app_id == await records.app_id(tx, app))
            rows = (await tx.execute(query)).all()
            counting = await _active_among(tx, {key for row in rows for key in json.loads(row.verified_by)})
        return [_attested(row, counting) for row in rows]

    async def get(self, digest: str, app: str | None, only: Only = None) -> Provenance:
        """The statement about an artifact and which signatures of it hold. Raises NotFound, InvalidDigest,
        DigestMismatch."""
        found, envelope, row = await self._stored(digest, app, only)
        statement = provenance.decode(envelope.payload)
        known = [
            _Known(key.key_id, key.public_key_hex, key.active) for key in await self._public_keys.list(found.app)
        ]
        own = [_Known(key.id, key.public_key_hex, key.active) for key in await self._own.list()]
        verdicts = await asyncio.to_thread(_judge, envelope, _own_signatures(row), known, own)
        return Provenance(await self._with_keys(row), statement, verdicts)

    async def attestation(self, digest: str, app: str | None, only: Only = None) -> bytes:
        """The envelope with the builder's signatures and the server's. Raises as `get` does."""
        _, envelope, row = await self._stored(digest, app, only)
        own = _own_signatures(row)
        names = {one.keyid for one in own}
        # a name of ours on a signature of somebody else's is a lie
        theirs = [one for one in envelope.signatures if one.keyid not in names]
        return replace(envelope, signatures=(*theirs, *own)).encode()

    async def _stored(
        self, digest: str, app: str | None, only: Only
    ) -> tuple[Artifact, Envelope, sa.Row[*tuple[Any, ...]]]:
        check_artifact_digest(digest)
        found, body = await self._documents.get(PROVENANCE, digest, app, only)
        async with self._database.read() as tx:
            row = (await tx.execute(_ATTESTED.where(artifacts.c.id == found.id))).one_or_none()
        if row is None:  # it is being written for the first time
            raise records.no_document(found, PROVENANCE)
        return found, await asyncio.to_thread(dsse.decode, body), row

    async def _with_keys(self, row: sa.Row[*tuple[Any, ...]]) -> Attested:
        async with self._database.read() as tx:
            return _attested(row, await _active_among(tx, set(json.loads(row.verified_by))))


_ATTESTED = (
    sa.select(attestations, artifacts.c.digest, applications.c.name.label("app"))
    .join(
        artifacts,
        sa.and_(artifacts.c.id == attestations.c.artifact_id, artifacts.c.provenance_digest == attestations.c.sha256),
    )
    .join(applications, applications.c.id == artifacts.c.app_id)
    .where(artifacts.c.status == "stored")
)


def _read(body: bytes) -> tuple[Envelope, dict[str, Any]]:
    envelope = dsse.decode(body)
    if len(envelope.signatures) > MAX_BUILDER_SIGNATURES:
        raise BadRequest(f"an envelope has at most {MAX_BUILDER_SIGNATURES} signatures when it is sent")
    return envelope, provenance.decode(envelope.payload)


async def _active_among(tx: AsyncConnection, ids: set[str]) -> set[str]:
    query = sa.select(public_keys.c.id).where(public_keys.c.id.in_(ids), public_keys.c.active)
    return set((await tx.execute(query)).scalars())


def _attested(row: Any, counting: set[str]) -> Attested:
    return Attested(
        artifact_id=row.artifact_id,
        app=row.app,
        digest=row.digest,
        sha256=row.sha256,
        builder=row.builder,
        verified=not counting.isdisjoint(json.loads(row.verified_by)),
        created_by=row.created_by,
        created_at=row.created_at,
    )


def _own_signatures(row: Any) -> list[Signature]:
    return [Signature(keyid, b64decode(sig)) for keyid, sig in json.loads(row.countersignatures)]


def _judge(
    envelope: Envelope, own: Sequence[Signature], known: Sequence[_Known], servers: Sequence[_Known]
) -> list[Verdict]:
    message = dsse.pae(envelope.payload_type, envelope.payload)
    return [
        *(_verdict("builder", message, one, known) for one in envelope.signatures),
        *(_verdict("server", message, one, servers) for one in own),
    ]


def _verdict(by: str, message: bytes, one: Signature, keys: Sequence[_Known]) -> Verdict:
    for key in sorted(keys, key=lambda key: key.id != one.keyid):
        if verify_bytes(message, one.sig, key.public_key_hex):
            return Verdict(by, one.keyid, key.id, key.public_key_hex, True, key.active)
    return Verdict(by, one.keyid, None, None, False, False)
