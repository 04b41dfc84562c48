"""Deployments: begin, repeat, cancel, look at, and follow as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

import msgspec
from litestar import Response, get, patch, post
from litestar.params import FromPath, HeaderParameter, JSONBody, QueryParameter
from litestar.response import Stream

from aether.api import auditing
from aether.api.paging import DEFAULT_LIMIT, Cursor, Limit, Page, decode_cursor, page
from aether.api.services import Caller, Deps
from aether.api.streams import until_shutdown
from aether.api.views import Deployment, apps_of, deployment_view
from aether.apps.deployments import DEFAULT_COMMAND, Author, DeployRequest
from aether.apps.ledger import Event
from aether.apps.records import DeploymentRow, Health
from aether.apps.services import AppServices
from aether.identity.ownership import visible
from aether.model.deployment import DeploymentStatus
from aether.model.errors import BadRequest
from aether.model.times import to_iso
from aether.observability import tracing
from aether.rollout.gates import Shift

KEEP_ALIVE_SECS = 15.0
_USUAL = Shift()
_KEEP_ALIVE = b": keep-alive\n\n"
AppFilter = Annotated[str | None, QueryParameter(name="app", description="Only this app's.")]
StatusFilter = Annotated[DeploymentStatus | None, QueryParameter(name="status", description="Only in this state.")]
IdempotencyKey = Annotated[str | None, HeaderParameter(name="Idempotency-Key", max_length=200)]
LastEventId = Annotated[int, HeaderParameter(name="Last-Event-ID", ge=0)]


class HealthCheck(msgspec.Struct, forbid_unknown_fields=True):
    """Without a path, or with "/", any answer below 500 is healthy; another path must answer 200 to 399.
    `port` is what the app is told as PORT."""

    path: str | None = None
    port: int | None = None


class RolloutRules(msgspec.Struct, forbid_unknown_fields=True):
    """How canary and bluegreen move traffic. `steps` are percentages rising to 100; a step ends after `min_requests`
    good answers or `step_secs`; bluegreen can switch back for `bake_secs`. The error rate is a fraction, the latency
    a multiple of the old release's mean."""

    steps: tuple[int, ...] = _USUAL.steps
    step_secs: float = _USUAL.step_secs
    bake_secs: float = _USUAL.bake_secs
    min_requests: int = _USUAL.min_requests
    max_error_rate: float = _USUAL.max_error_rate
    max_latency_ratio: float = _USUAL.max_latency_ratio

    def shift(self) -> Shift:
        return Shift(
            self.steps, self.step_secs, self.bake_secs, self.min_requests, self.max_error_rate, self.max_latency_ratio
        )


class NewDeployment(msgspec.Struct, forbid_unknown_fields=True):
    """`strategy` is rolling, recreate, canary or bluegreen; `timeout_secs` bounds the time until the new release is
    healthy."""

    app: str
    digest: str
    runtime: str | None = None
    command: str | None = None
    env: dict[str, str] = {}
    health: HealthCheck | None = None
    strategy: str = "rolling"
    timeout_secs: float = 120.0
    rollout: RolloutRules | None = None
    description: Annotated[str, msgspec.Meta(max_length=300)] | None = None


class DeploymentChange(msgspec.Struct, forbid_unknown_fields=True):
    """The only change is a cancellation."""

    status: str


class DeploymentEvent(msgspec.Struct):
    id: int
    deployment_id: str
    phase: str
    message: str
    timestamp: str


@post("/deployments", tags=["deployments"])
async def create_deployment(
    data: JSONBody[NewDeployment], services: Deps, caller: Caller, idempotency_key: IdempotencyKey = None
) -> Response[Deployment]:
    """Deploy an uploaded artifact. 200 instead of 201 for a repeat of the newest deployment or of the key."""
    apps = apps_of(services)
    auditing.about(data.app)
    await services.identity.ownership.check_app(caller, data.app)
    path = data.health.path if data.health and data.health.path != "/" else None
    request = DeployRequest(
        app=data.app,
        digest=data.digest,
        runtime=data.runtime,
        command=data.command or DEFAULT_COMMAND,
        env=data.env,
        health=Health(path, data.health.port if data.health else None),
        strategy=data.strategy,
        timeout_secs=data.timeout_secs,
        rollout=data.rollout.shift() if data.rollout else Shift(),
        description=data.description or "",
    )
    author = Author(caller.name, tracing.trace_id.get())
    row, new = await apps.deployments.create(request, author, idempotency_key)
    return Response(deployment_view(row, apps), status_code=201 if new else 200)


@get("/deployments", tags=["deployments"])
async def list_deployments(
    services: Deps,
    caller: Caller,
    app: AppFilter = None,
    status: StatusFilter = None,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> Page[Deployment]:
    """Deployments of the caller's apps, newest first."""
    apps = apps_of(services)
    before = decode_cursor(cursor, int, str)
    if app is not None:
        await services.identity.ownership.check_app(caller, app)
    rows = await apps.deployments.list(app=app, status=status, before=before, limit=limit, only=visible(caller))
    return page(rows, limit, lambda row: deployment_view(row, apps), lambda row: (row.created_at, row.id))


@get("/deployments/{deployment_id:str}", tags=["deployments"])
async def show_deployment(deployment_id: FromPath[str], services: Deps) -> Deployment:
    """One deployment."""
    apps = apps_of(services)
    return deployment_view(await apps.deployments.get(deployment_id), apps)


@patch("/deployments/{deployment_id:str}", tags=["deployments"])
async def change_deployment(
    deployment_id: FromPath[str], data: JSONBody[DeploymentChange], services: Deps, caller: Caller
) -> Deployment:
    """Cancel a deployment under way; the release before it goes on serving. 409 when it is settled."""
    if data.status != DeploymentStatus.CANCELLED:
        raise BadRequest("status can only be set to 'cancelled'", {"field": "status"})
    apps = apps_of(services)
    row = await apps.deployments.cancel(deployment_id, Author(caller.name, tracing.trace_id.get()))
    return deployment_view(row, apps)


@get("/deployments/{deployment_id:str}/events", tags=["deployments"], media_type="text/event-stream")
async def deployment_events(deployment_id: FromPath[str], services: Deps, last_event_id: LastEventId = 0) -> Stream:
    """Server-sent events: `phase` for each change, `end` with the settled deployment. Resumes by Last-Event-ID."""
    apps = apps_of(services)
    await apps.deployments.get(deployment_id)
    items = until_shutdown(
        apps.deployments.follow(deployment_id, last_event_id), services.shutdown, silence_secs=KEEP_ALIVE_SECS
    )
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return Stream(_messages(items, apps), media_type="text/event-stream", headers=headers)


async def _messages(items: AsyncGenerator[Event | DeploymentRow | None], apps: AppServices) -> AsyncGenerator[bytes]:
    async with aclosing(items):
        async for item in items:
            if item is None:
                yield _KEEP_ALIVE
            elif isinstance(item, Event):
                shown = DeploymentEvent(item.id, item.deployment_id, item.phase, item.message, to_iso(item.timestamp))
                yield b"id: %d\nevent: phase\ndata: %s\n\n" % (item.id, msgspec.json.encode(shown))
            else:
                yield b"event: end\ndata: %s\n\n" % msgspec.json.encode(deployment_view(item, apps))


HANDLERS = [create_deployment, list_deployments, show_deployment, change_deployment, deployment_events]
