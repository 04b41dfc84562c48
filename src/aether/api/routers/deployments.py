"""Deployments: begin, repeat, cancel, look at, and follow as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

import msgspec
from litestar import Response, get, patch, post
from litestar.params import FromPath, HeaderParameter, JSONBody, QueryParameter
from litestar.response import Stream

from aether.api import auditing
from aether.api.paging import DEFAULT_LIMIT, Cursor, Limit, Page, decode_cursor, page
from aether.api.services import Caller, Deps, IdempotencyKey
from aether.api.streams import until_shutdown
from aether.api.views import Deployment, apps_of, deployment_view
from aether.apps.deployments import DEFAULT_COMMAND, Author, DeployRequest
from aether.apps.ledger import Event
from aether.apps.records import DeploymentRow, Health
from aether.apps.services import AppServices
from aether.identity.ownership import visible
from aether.model.deployment import DeploymentStatus
from aether.model.errors import BadRequest
from aether.model.instance import Volume
from aether.model.processes import Cron, ProcessTypes, ReleaseCommand, Worker
from aether.model.times import to_iso
from aether.observability import tracing
from aether.rollout.gates import Shift

_USUAL = Shift()
_KEEP_ALIVE = b": keep-alive\n\n"
AppFilter = Annotated[str | None, QueryParameter(name="app", description="Only this app's.")]
StatusFilter = Annotated[DeploymentStatus | None, QueryParameter(name="status", description="Only in this state.")]
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


class ProcessType(msgspec.Struct, forbid_unknown_fields=True):
    """A worker, or with a `schedule` (five cron fields) a cron process. `settle_secs` is for workers: how long one
    must stay up to be ready. The rest is for cron processes: `timeout_secs` bounds a run, `missed` is `once` (times
    while the server was down are made up for by one run) or `skip`."""

    command: str
    schedule: str | None = None
    timezone: str | None = None
    timeout_secs: float | None = None
    missed: str | None = None
    settle_secs: float | None = None


class ReleaseCommandSpec(msgspec.Struct, forbid_unknown_fields=True):
    """Runs once per deployment before any instance of the new release starts; its failure fails the deployment."""

    command: str
    timeout_secs: float = ReleaseCommand("").timeout_secs


class VolumeSpec(msgspec.Struct, forbid_unknown_fields=True):
    """A folder of the app's own that outlives its instances, shown to them at `path`."""

    name: str
    path: str


class NewDeployment(msgspec.Struct, forbid_unknown_fields=True):
    """`strategy` is rolling, recreate, canary or bluegreen; `timeout_secs` bounds the time until the new release is
    healthy."""

    app: str
    digest: str
    runtime: str | None = None
    command: str | None = None
    env: dict[str, str] = {}
    health: HealthCheck | None = None
    processes: dict[str, ProcessType] = {}
    release_command: ReleaseCommandSpec | None = None
    volumes: list[VolumeSpec] = []
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
        processes=_process_types(data.processes, data.release_command),
        volumes=tuple(Volume(volume.name, volume.path) for volume in data.volumes),
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
async def deployment_events(
    deployment_id: FromPath[str], services: Deps, caller: Caller, last_event_id: LastEventId = 0
) -> Stream:
    """Server-sent events: `phase` for each change, `end` with the settled deployment. Resumes by Last-Event-ID."""
    apps = apps_of(services)
    row = await apps.deployments.get(deployment_id)
    items = until_shutdown(
        apps.deployments.follow(deployment_id, last_event_id),
        services.shutdown,
        barred=services.identity.until_barred(caller, row.app),
        silence_secs=services.settings.stream_heartbeat_secs,
    )
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return Stream(_messages(items, apps), media_type="text/event-stream", headers=headers)


def _process_types(given: dict[str, ProcessType], release: ReleaseCommandSpec | None) -> ProcessTypes:
    """Raises BadRequest for a setting of the other kind; bounds are checked with the request."""
    workers: dict[str, Worker] = {}
    crons: dict[str, Cron] = {}
    for name, one in given.items():
        worker = {"settle_secs": one.settle_secs}
        cron = {"timezone": one.timezone, "timeout_secs": one.timeout_secs, "missed": one.missed}
        for field, value in (cron if one.schedule is None else worker).items():
            if value is not None:
                kind = "worker: it has no schedule" if one.schedule is None else "cron process: it has a schedule"
                raise BadRequest(
                    f"processes.{name[:40]}.{field} is not for a {kind}", {"field": f"processes.{name[:40]}.{field}"}
                )
        if one.schedule is None:
            workers[name] = Worker(one.command, **_given(worker))
        else:
            crons[name] = Cron(one.command, one.schedule, **_given(cron))
    command = None if release is None else ReleaseCommand(release.command, release.timeout_secs)
    return ProcessTypes(workers, crons, command)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


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
