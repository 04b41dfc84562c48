"""Artifacts that are stored: listed, looked at, downloaded, pinned. How they come in is in `uploads`, `multipart` and
`legacy`; what lies beside them in `documents`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import Response, delete, get, head, put
from litestar.params import FromPath, QueryParameter
from litestar.response import Redirect

from aether.api import auditing
from aether.api.artifact_views import ArtifactView, artifact_view, registry_of
from aether.api.paging import DEFAULT_LIMIT, Cursor, Limit, Page, decode_cursor, page
from aether.api.services import Caller, Deps
from aether.identity.ownership import visible
from aether.model.times import from_iso, to_iso
from aether.registry.events import Event
from aether.registry.records import Filter

AppName = Annotated[str | None, QueryParameter(name="app", description="Only this app's.")]
RuntimeName = Annotated[
    str | None, QueryParameter(name="runtime", max_length=64, description="Only of this runtime.")
]
Verified = Annotated[bool | None, QueryParameter(name="verified", description="Only those that are, or are not.")]
DigestPrefix = Annotated[
    str, QueryParameter(name="digest", max_length=64, description="How the digest begins, in lower-case hex.")
]
Since = Annotated[str | None, QueryParameter(name="since", description="ISO-8601: stored then or later.")]
Before = Annotated[str | None, QueryParameter(name="before", description="ISO-8601: stored earlier.")]


class ArtifactEventView(msgspec.Struct):
    """A step in the life of an artifact."""

    id: int
    app: str
    digest: str
    event: str
    actor: str
    detail: str
    timestamp: str


@get("/artifacts", tags=["artifacts"])
async def list_artifacts(
    services: Deps,
    caller: Caller,
    app: AppName = None,
    runtime: RuntimeName = None,
    verified: Verified = None,
    digest: DigestPrefix = "",
    since: Since = None,
    before: Before = None,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> Page[ArtifactView]:
    """Stored artifacts of the caller's apps, newest first."""
    after = decode_cursor(cursor, int, str)
    if app is not None:
        await services.identity.ownership.check_app(caller, app)
    wanted = Filter(
        runtime=runtime,
        verified=verified,
        digest_prefix=digest,
        since=None if since is None else from_iso(since),
        before=None if before is None else from_iso(before),
        only=None if caller.sees_everything else visible(caller),
    )
    rows = await registry_of(services).list(app, wanted, limit + 1, None if after is None else (after[0], after[1]))
    return page(rows, limit, artifact_view, lambda row: (row.created_at, row.id))


@head("/artifacts/{digest:str}", tags=["artifacts"])
async def exists(digest: FromPath[str], services: Deps, caller: Caller, app: AppName = None) -> Response[None]:
    """200 when the artifact is stored; its size in X-Aether-Size-Bytes."""
    found = await registry_of(services).find(digest, app, visible(caller))
    return Response(None, headers={"X-Aether-Size-Bytes": str(found.size_bytes), "ETag": f'"{found.digest}"'})


@get("/artifacts/{digest:str}/meta", tags=["artifacts"])
async def meta(digest: FromPath[str], services: Deps, caller: Caller, app: AppName = None) -> ArtifactView:
    """What is known of an artifact."""
    return artifact_view(await registry_of(services).find(digest, app, visible(caller)))


@get("/artifacts/{digest:str}/download", status_code=307, tags=["artifacts"])
async def download(digest: FromPath[str], services: Deps, caller: Caller, app: AppName = None) -> Redirect:
    """Redirect to a fresh signed URL; this path itself never expires."""
    signed = await registry_of(services).download(digest, app, visible(caller))
    return Redirect(signed.url, status_code=307, headers={"Cache-Control": "no-store"})


@get("/artifacts/{digest:str}/events", tags=["artifacts"])
async def artifact_events(
    digest: FromPath[str],
    services: Deps,
    caller: Caller,
    app: AppName = None,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> Page[ArtifactEventView]:
    """What happened to an artifact, newest first; also before it was stored and after it was deleted."""
    after = decode_cursor(cursor, int)
    if app is not None:
        await services.identity.ownership.check_app(caller, app)
    before = None if after is None else after[0]
    rows = await registry_of(services).events(digest, app, before, limit + 1, visible(caller))
    return page(rows, limit, _event, lambda row: (row.id,))


@put("/artifacts/{digest:str}/pin", status_code=200, tags=["artifacts"])
async def pin(digest: FromPath[str], services: Deps, caller: Caller, app: AppName = None) -> ArtifactView:
    """Keep an artifact whatever its age. `app` is needed where several apps have it."""
    auditing.about(digest)
    registry = registry_of(services)
    return artifact_view(await registry.pin(digest, app, pinned=True, actor=caller.name, only=visible(caller)))


@delete("/artifacts/{digest:str}/pin", status_code=200, tags=["artifacts"])
async def unpin(digest: FromPath[str], services: Deps, caller: Caller, app: AppName = None) -> ArtifactView:
    """Let retention take the artifact away again when nobody needs it."""
    auditing.about(digest)
    registry = registry_of(services)
    return artifact_view(await registry.pin(digest, app, pinned=False, actor=caller.name, only=visible(caller)))


def _event(row: Event) -> ArtifactEventView:
    return ArtifactEventView(
        row.id, row.app, row.digest, row.event, row.actor, row.detail, to_iso(row.timestamp)
    )  # fmt: skip


HANDLERS = [list_artifacts, exists, meta, download, artifact_events, pin, unpin]
