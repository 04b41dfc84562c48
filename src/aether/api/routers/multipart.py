"""Uploads in parts: begin or resume, URLs for parts, complete."""

from __future__ import annotations

import time

import msgspec
from litestar import post
from litestar.params import JSONBody

from aether.api import auditing
from aether.api.artifact_views import CompleteView, complete_view, registry_of
from aether.api.routers.uploads import observe_put
from aether.api.services import Caller, Deps
from aether.model.errors import BadRequest
from aether.model.times import to_iso, to_iso_or_none
from aether.registry.multipart import PartUrl
from aether.registry.upload_rows import Said
from aether.registry.uploads import Announced


class InitMultipart(msgspec.Struct):
    """An upload to begin, or to take up again. `digest` is the SHA-256 of the .tar.gz."""

    app: str
    digest: str = ""
    size_bytes: int = 0
    content_digest: str | None = None
    runtime: str | None = None


class ArrivedPart(msgspec.Struct):
    part_number: int
    size_bytes: int
    etag: str


class MultipartView(msgspec.Struct):
    """`upload_id` is null for a duplicate. `parts` have arrived already."""

    upload_id: str | None
    storage_key: str
    part_size_bytes: int
    part_count: int
    expires_at: str | None
    duplicate: bool
    parts: list[ArrivedPart]


class PresignPart(msgspec.Struct):
    """One part, or up to 100 at once."""

    app: str
    upload_id: str
    part_number: int | None = None
    part_numbers: list[int] | None = None


class PartView(msgspec.Struct):
    """Where to PUT a part of exactly `size_bytes`; the answer's ETag is what completing names it by."""

    method: str
    url: str
    headers: dict[str, str]
    part_number: int
    size_bytes: int
    expires_at: str
    expires_in_secs: int


class PartsView(msgspec.Struct):
    """One for each of the `part_numbers` that were asked for."""

    parts: list[PartView]


class NamedPart(msgspec.Struct):
    part_number: int
    etag: str


class CompleteMultipart(msgspec.Struct):
    """As completing an upload in one piece, with every part in the order of the numbers."""

    app: str
    upload_id: str
    parts: list[NamedPart] = []
    digest: str = ""
    size_bytes: int = 0
    content_digest: str | None = None
    runtime: str | None = None
    signature: str | None = None
    put_duration_ms: float | None = None
    idempotency_key: str | None = None


@post("/artifacts/multipart/init", status_code=200, tags=["artifacts"])
async def init_multipart(data: JSONBody[InitMultipart], services: Deps, caller: Caller) -> MultipartView:
    """Begin an upload in parts; asked again by the same caller, the one under way with what has arrived of it."""
    auditing.about(data.app)
    await services.identity.ownership.check_app(caller, data.app)
    announced = Announced(data.app, data.digest, data.size_bytes, data.content_digest, data.runtime)
    begun = await registry_of(services).multipart.init(announced, caller.name)
    return MultipartView(
        upload_id=begun.upload_id,
        storage_key=begun.storage_key,
        part_size_bytes=begun.part_size_bytes,
        part_count=begun.part_count,
        expires_at=to_iso_or_none(begun.expires_at),
        duplicate=begun.upload_id is None,
        parts=[ArrivedPart(part.number, part.size_bytes, part.etag) for part in begun.parts],
    )


@post("/artifacts/multipart/presign-part", status_code=200, tags=["artifacts"])
async def presign_part(data: JSONBody[PresignPart], services: Deps, caller: Caller) -> PartView | PartsView:
    """Get a URL for one part (`part_number`), or for several (`part_numbers`)."""
    auditing.about(data.app)
    await services.identity.ownership.check_app(caller, data.app)
    if (data.part_number is None) == (data.part_numbers is None):
        raise BadRequest("name part_number, or part_numbers")
    numbers = data.part_numbers if data.part_number is None else [data.part_number]
    signed = await registry_of(services).multipart.presign_parts(data.app, data.upload_id, numbers or [])
    if data.part_number is not None:
        return _part(signed[0])
    return PartsView([_part(one) for one in signed])


@post("/artifacts/multipart/complete", status_code=200, tags=["artifacts"])
async def complete_multipart(data: JSONBody[CompleteMultipart], services: Deps, caller: Caller) -> CompleteView:
    """Put the parts together, verify every byte and store the artifact."""
    auditing.about(data.app)
    await services.identity.ownership.check_app(caller, data.app)
    announced = Announced(data.app, data.digest, data.size_bytes)
    # stores send etags in the quotes of HTTP
    parts = [(part.part_number, part.etag.strip('"')) for part in data.parts]
    said = Said(data.content_digest, data.runtime, data.signature, data.idempotency_key, parts)
    done = await registry_of(services).multipart.complete(announced, data.upload_id, said, caller.name)
    observe_put(services, data.put_duration_ms)
    return complete_view(done)


def _part(signed: PartUrl) -> PartView:
    request = signed.request
    return PartView(
        request.method,
        request.url,
        dict(request.headers),
        signed.number,
        signed.size_bytes,
        to_iso(request.expires_at * 1_000_000),
        request.expires_in_secs(time.time()),
    )


HANDLERS = [init_multipart, presign_part, complete_multipart]
