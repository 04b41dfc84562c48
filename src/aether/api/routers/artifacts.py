"""Artifacts: presign, complete, and reading what is stored."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import Response, get, head, post
from litestar.params import FromPath, JSONBody, QueryParameter
from litestar.response import Redirect

from aether.api import auditing
from aether.api.paging import DEFAULT_LIMIT, Cursor, Limit, Page, decode_cursor, page
from aether.api.services import Caller, Deps, Services
from aether.identity.ownership import visible
from aether.model.errors import ServiceUnavailable
from aether.model.times import to_iso
from aether.registry.records import Artifact
from aether.registry.service import Registry

AppName = Annotated[str | None, QueryParameter(name="app", description="Only this app's.")]


class Presign(msgspec.Struct):
    """An upload to begin. `digest` is the SHA-256 of the .tar.gz, `content_digest` that of the tar in it."""

    app: str
    digest: str = ""
    size_bytes: int = 0
    content_digest: str | None = None
    runtime: str | None = None


class PresignView(msgspec.Struct):
    """`method` is PUT, or NONE for a duplicate. A `url` without a host is relative to the API."""

    method: str
    url: str | None
    headers: dict[str, str]
    upload_id: str | None
    storage_key: str
    expires_at: str | None
    duplicate: bool


class Complete(msgspec.Struct):
    """An upload to verify."""

    app: str
    upload_id: str
    digest: str = ""
    size_bytes: int = 0
    content_digest: str | None = None
    runtime: str | None = None
    put_duration_ms: float | None = None
    idempotency_key: str | None = None


class CompleteView(msgspec.Struct):
    artifact_url: str
    digest: str
    duplicate: bool
    app_linked: bool
    verified: bool
    size_bytes: int


class ArtifactView(msgspec.Struct):
    id: str
    app: str
    digest: str
    content_digest: str | None
    runtime: str | None
    size_bytes: int
    verified: bool
    created_at: str
    storage_key: str


@post("/artifacts/presign", status_code=200, tags=["artifacts"])
async def presign(data: JSONBody[Presign], services: Deps, caller: Caller) -> PresignView:
    """Get a URL to PUT an artifact to, or learn that the app already has it."""
    auditing.about(data.app)
    await services.identity.ownership.check_app(caller, data.app)
    made = await _registry(services).presign(
        data.app,
        data.digest,
        data.size_bytes,
        content_digest=data.content_digest,
        runtime=data.runtime,
        created_by=caller.name,
    )
    if made.request is None:
        return PresignView("NONE", None, {}, None, made.storage_key, None, duplicate=True)
    signed = made.request
    expires_at = to_iso(signed.expires_at * 1_000_000)
    return PresignView(
        signed.method, signed.url, dict(signed.headers), made.upload_id, made.storage_key, expires_at, duplicate=False
    )


@post("/artifacts/complete", status_code=200, tags=["artifacts"])
async def complete(data: JSONBody[Complete], services: Deps, caller: Caller) -> CompleteView:
    """Verify every byte of an upload and store it."""
    auditing.about(data.app)
    await services.identity.ownership.check_app(caller, data.app)
    done = await _registry(services).complete(
        data.app,
        data.digest,
        data.upload_id,
        data.size_bytes,
        content_digest=data.content_digest,
        runtime=data.runtime,
        idempotency_key=data.idempotency_key,
    )
    if data.put_duration_ms is not None and data.put_duration_ms >= 0:
        services.metrics.put_seconds.observe(data.put_duration_ms / 1000)
    stored = done.artifact
    return CompleteView(
        artifact_url=f"/artifacts/{stored.digest}/download",
        digest=stored.digest,
        duplicate=done.duplicate,
        app_linked=True,
        verified=stored.verified,
        size_bytes=stored.size_bytes,
    )


@get("/artifacts", tags=["artifacts"])
async def list_artifacts(
    services: Deps, caller: Caller, app: AppName = None, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None
) -> Page[ArtifactView]:
    """Stored artifacts of the caller's apps, newest first."""
    after = decode_cursor(cursor, int, str)
    if app is not None:
        await services.identity.ownership.check_app(caller, app)
    before = None if after is None else (after[0], after[1])
    rows = await _registry(services).list(app, limit + 1, before, visible(caller))
    return page(rows, limit, _view, lambda row: (row.created_at, row.id))


@head("/artifacts/{digest:str}", tags=["artifacts"])
async def exists(digest: FromPath[str], services: Deps, caller: Caller, app: AppName = None) -> Response[None]:
    """200 when the artifact is stored; its size in X-Aether-Size-Bytes."""
    found = await _registry(services).find(digest, app, visible(caller))
    return Response(None, headers={"X-Aether-Size-Bytes": str(found.size_bytes), "ETag": f'"{found.digest}"'})


@get("/artifacts/{digest:str}/meta", tags=["artifacts"])
async def meta(digest: FromPath[str], services: Deps, caller: Caller, app: AppName = None) -> ArtifactView:
    """What is known of an artifact."""
    return _view(await _registry(services).find(digest, app, visible(caller)))


@get("/artifacts/{digest:str}/download", status_code=307, tags=["artifacts"])
async def download(digest: FromPath[str], services: Deps, caller: Caller, app: AppName = None) -> Redirect:
    """Redirect to a fresh signed URL; this path itself never expires."""
    signed = await _registry(services).download(digest, app, visible(caller))
    return Redirect(signed.url, status_code=307, headers={"Cache-Control": "no-store"})


def _registry(services: Services) -> Registry:
    if services.registry is None:
        raise ServiceUnavailable("this server keeps no artifacts")
    return services.registry


def _view(row: Artifact) -> ArtifactView:
    return ArtifactView(
        row.id,
        row.app,
        row.digest,
        row.content_digest,
        row.runtime,
        row.size_bytes,
        row.verified,
        to_iso(row.created_at),
        row.storage_key,
    )


HANDLERS = [presign, complete, list_artifacts, exists, meta, download]
