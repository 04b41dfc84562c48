"""POST /artifacts with the artifact as its body: deprecated, for clients that know no signed URLs.

The body is passed on as it comes and never held; the layer around the routes lets it through (`aether.api.shell`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from litestar import Request, post
from litestar.exceptions import HTTPException
from litestar.params import HeaderParameter, QueryParameter

from aether.api import auditing
from aether.api.artifact_views import CompleteView, complete_view, registry_of
from aether.api.services import Caller, Deps, IdempotencyKey
from aether.model.errors import BadRequest, PayloadTooLarge
from aether.registry.upload_rows import Said
from aether.registry.uploads import Announced

STALL_SECS = 60.0
"""A client that sends nothing for so long is cut off."""

Digest = Annotated[str, HeaderParameter(name="X-Aether-Artifact-Digest", description="SHA-256 of the body.")]
Signature = Annotated[str | None, HeaderParameter(name="X-Aether-Signature", description="As in complete.")]
AppHeader = Annotated[str | None, HeaderParameter(name="X-Aether-App", description="Or ?app=.")]
RuntimeHeader = Annotated[str | None, HeaderParameter(name="X-Aether-Runtime")]
AppQuery = Annotated[str | None, QueryParameter(name="app", description="Or X-Aether-App.")]


@post("/artifacts", status_code=200, tags=["artifacts"], deprecated=True, request_max_body_size=None)
async def upload(
    request: Request[Any, Any, Any],
    services: Deps,
    caller: Caller,
    digest: Digest = "",
    signature: Signature = None,
    app_header: AppHeader = None,
    runtime: RuntimeHeader = None,
    app: AppQuery = None,
    idempotency_key: IdempotencyKey = None,
) -> CompleteView:
    """Deprecated: presign, PUT and complete instead. Takes the artifact as the body, verifies and stores it."""
    services.metrics.legacy_uploads.inc()
    registry = registry_of(services)
    registry.legacy.refuse_if_presign_is_required()
    name = app if app is not None else app_header
    if not name:
        raise BadRequest("name the app, with X-Aether-App or ?app=")
    if app_header is not None and app_header != name:
        raise BadRequest("X-Aether-App and ?app= name two apps")
    auditing.about(name)
    await services.identity.ownership.check_app(caller, name)
    announced = Announced(name, digest, _length(request), runtime=runtime)
    registry.uploads.check(announced)
    said = Said(signature=signature, idempotency_key=idempotency_key)
    async with services.turns.one():
        done = await registry.legacy.receive(announced, _body(request, announced.size_bytes), said, caller.name)
    return complete_view(done)


def _length(request: Request[Any, Any, Any]) -> int:
    text = request.headers.get("content-length", "")
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise BadRequest("an upload needs a Content-Length")
    return int(text)


async def _body(request: Request[Any, Any, Any], size: int) -> AsyncGenerator[bytes]:
    """The body in the pieces in which it comes. Raises BadRequest when it breaks off, PayloadTooLarge."""
    blocks = request.stream()
    left = size
    while True:
        try:
            async with asyncio.timeout(STALL_SECS):
                block = await anext(blocks, None)
        except TimeoutError:
            raise BadRequest(f"nothing arrived for {STALL_SECS:g} s; the upload was given up") from None
        except HTTPException:
            raise BadRequest("the upload broke off; nothing was kept") from None
        if block is None:
            break
        left -= len(block)
        if left < 0:
            raise PayloadTooLarge(f"{size} bytes were announced, more arrived")
        if block:
            yield block
    if left:
        raise BadRequest(f"{size} bytes were announced, {size - left} arrived; nothing was kept")


HANDLERS = [upload]
