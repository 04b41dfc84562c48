"""Uploads in one piece: presign and complete."""

from __future__ import annotations

import time

import msgspec
from litestar import post
from litestar.params import JSONBody

from aether.api import auditing
from aether.api.artifact_views import CompleteView, complete_view, registry_of
from aether.api.services import Caller, Deps, Services
from aether.model.times import to_iso
from aether.registry.upload_rows import Said
from aether.registry.uploads import Announced


class Presign(msgspec.Struct):
    """An upload to begin. `digest` is the SHA-256 of the .tar.gz, `content_digest` that of the tar in it."""

    app: str
    digest: str = ""
    size_bytes: int = 0
    content_digest: str | None = None
    runtime: str | None = None


class MultipartSettings(msgspec.Struct):
    """From `threshold_bytes` on an upload goes in parts, of `part_size_bytes` each unless its init says otherwise."""

    threshold_bytes: int
    part_size_bytes: int


class PresignView(msgspec.Struct):
    """`method` is PUT, or NONE for a duplicate. A `url` without a host is relative to the API."""

    method: str
    url: str | None
    headers: dict[str, str]
    upload_id: str | None
    storage_key: str
    expires_at: str | None
    expires_in_secs: int | None
    duplicate: bool
    multipart: MultipartSettings


class Complete(msgspec.Struct):
    """An upload to verify. `signature` is Ed25519 over the digest's 64 characters, in 128 hex characters. Without
    `upload_id` the artifact must be stored already, and only the signature is new."""

    app: str
    upload_id: str | None = None
    digest: str = ""
    size_bytes: int = 0
    content_digest: str | None = None
    runtime: str | None = None
    signature: str | None = None
    put_duration_ms: float | None = None
    idempotency_key: str | None = None


@post("/artifacts/presign", status_code=200, tags=["artifacts"])
async def presign(data: JSONBody[Presign], services: Deps, caller: Caller) -> PresignView:
    """Get a URL to PUT an artifact to, or learn that the app already has it."""
    auditing.about(data.app)
    await services.identity.ownership.check_app(caller, data.app)
    announced = Announced(data.app, data.digest, data.size_bytes, data.content_digest, data.runtime)
    made = await registry_of(services).uploads.presign(announced, caller.name)
    settings = services.settings
    multipart = MultipartSettings(settings.multipart_threshold_bytes, settings.multipart_part_size_bytes)
    if made.request is None:
        return PresignView("NONE", None, {}, None, made.storage_key, None, None, duplicate=True, multipart=multipart)
    signed = made.request
    return PresignView(
        signed.method,
        signed.url,
        dict(signed.headers),
        made.upload_id,
        made.storage_key,
        to_iso(signed.expires_at * 1_000_000),
        signed.expires_in_secs(time.time()),
        duplicate=False,
        multipart=multipart,
    )


@post("/artifacts/complete", status_code=200, tags=["artifacts"])
async def complete(data: JSONBody[Complete], services: Deps, caller: Caller) -> CompleteView:
    """Verify every byte of an upload and store it."""
    auditing.about(data.app)
    await services.identity.ownership.check_app(caller, data.app)
    announced = Announced(data.app, data.digest, data.size_bytes)
    said = Said(data.content_digest, data.runtime, data.signature, data.idempotency_key)
    done = await registry_of(services).uploads.complete(announced, data.upload_id, said, caller.name)
    observe_put(services, data.put_duration_ms)
    return complete_view(done)


def observe_put(services: Services, put_duration_ms: float | None) -> None:
    """What the client says about its own PUT."""
    if put_duration_ms is not None and 0 <= put_duration_ms < float("inf"):
        services.metrics.put_seconds.observe(put_duration_ms / 1000)


HANDLERS = [presign, complete]
