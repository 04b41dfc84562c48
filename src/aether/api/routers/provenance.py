"""Provenance of artifacts: what there is, what it says, who signed it, and the servers' own keys."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Response, delete, get, post
from litestar.params import FromPath

from aether.api import auditing
from aether.api.artifact_views import registry_of
from aether.api.paging import DEFAULT_LIMIT, Cursor, Limit, Page, decode_cursor, page
from aether.api.routers.artifacts import AppName
from aether.api.services import Caller, Deps
from aether.identity.ownership import visible
from aether.model.times import to_iso, to_iso_or_none
from aether.registry.attestation_keys import AttestationKey
from aether.registry.provenance import Attested


class ProvenanceView(msgspec.Struct):
    """An artifact with provenance. `verified`: a key of the app that is active has signed it; `sha256` is that of the
    envelope as it was sent."""

    app: str
    digest: str
    sha256: str
    builder: str
    verified: bool
    created_by: str
    created_at: str


class SignatureView(msgspec.Struct):
    """`by` is builder or server, `keyid` what the signature says of itself. `key_id` and `public_key_hex` are of the
    key it was made with, null when no key that is known fits; `active`: that key counts now."""

    by: str
    keyid: str
    key_id: str | None
    public_key_hex: str | None
    verified: bool
    active: bool


class ProvenanceDetail(msgspec.Struct):
    """The in-toto statement, decoded, and which signatures hold."""

    app: str
    digest: str
    sha256: str
    builder: str
    verified: bool
    created_by: str
    created_at: str
    statement: dict[str, Any]
    signatures: list[SignatureView]


class ServerKeyView(msgspec.Struct):
    """A key with which the servers sign provenance that they have verified; one that is not active signs no more."""

    keyid: str
    public_key_hex: str
    active: bool
    created_by: str
    created_at: str
    retired_at: str | None


@get("/provenance", tags=["provenance"])
async def list_provenance(
    services: Deps, caller: Caller, app: AppName = None, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None
) -> Page[ProvenanceView]:
    """Provenance of the caller's artifacts, the newest first."""
    after = decode_cursor(cursor, int, str)
    if app is not None:
        await services.identity.ownership.check_app(caller, app)
    place = None if after is None else (after[0], after[1])
    rows = await registry_of(services).provenances.list(app, limit + 1, place, visible(caller))
    return page(rows, limit, _attested, lambda row: (row.created_at, row.artifact_id))


@get("/provenance/keys", tags=["provenance"])
async def list_keys(services: Deps) -> Page[ServerKeyView]:
    """The servers' own keys, retired ones too; there are so few that they are one page."""
    return Page([_key(key) for key in await registry_of(services).attestation_keys.list()])


@post("/provenance/keys", tags=["provenance"])
async def rotate_key(services: Deps, caller: Caller) -> ServerKeyView:
    """Make a key that signs beside the one there is; then retire the old one. 409 when two sign already."""
    made = await registry_of(services).attestation_keys.rotate(caller.name)
    auditing.about(made.id)
    return _key(made)


@delete("/provenance/keys/{key_id:str}", status_code=200, tags=["provenance"])
async def retire_key(key_id: FromPath[str], services: Deps) -> ServerKeyView:
    """Let a key sign no more; what it signed stays signed. 409 for the last one."""
    return _key(await registry_of(services).attestation_keys.retire(key_id))


@get("/provenance/{digest:str}", tags=["provenance"])
async def show_provenance(
    digest: FromPath[str], services: Deps, caller: Caller, app: AppName = None
) -> ProvenanceDetail:
    """What the provenance of an artifact says, and which signatures of it hold now."""
    found = await registry_of(services).provenances.get(digest, app, visible(caller))
    one = found.attested
    return ProvenanceDetail(
        one.app, one.digest, one.sha256, one.builder, one.verified, one.created_by, to_iso(one.created_at),
        dict(found.statement),
        [SignatureView(v.by, v.keyid, v.key_id, v.public_key_hex, v.verified, v.active) for v in found.signatures],
    )  # fmt: skip


@get("/provenance/{digest:str}/attestation", tags=["provenance"], media_type="application/json")
async def attestation(digest: FromPath[str], services: Deps, caller: Caller, app: AppName = None) -> Response[bytes]:
    """The DSSE envelope with the builder's signatures and the servers'."""
    body = await registry_of(services).provenances.attestation(digest, app, visible(caller))
    return Response(body, media_type="application/json", headers={"X-Content-Type-Options": "nosniff"})


def _attested(row: Attested) -> ProvenanceView:
    return ProvenanceView(
        row.app, row.digest, row.sha256, row.builder, row.verified, row.created_by, to_iso(row.created_at)
    )  # fmt: skip


def _key(key: AttestationKey) -> ServerKeyView:
    return ServerKeyView(
        key.id, key.public_key_hex, key.active, key.created_by, to_iso(key.created_at), to_iso_or_none(key.retired_at)
    )  # fmt: skip


HANDLERS = [list_provenance, list_keys, rotate_key, retire_key, show_provenance, attestation]
