"""One-off runs of an app, and the volumes of an app."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import msgspec
from litestar import WebSocket, delete, get, post, websocket
from litestar.exceptions import WebSocketDisconnect
from litestar.params import FromPath, JSONBody

from aether.api.paging import DEFAULT_LIMIT, Cursor, Limit, Page, decode_cursor, page
from aether.api.relay import Relay
from aether.api.services import Caller, Deps
from aether.api.views import apps_of
from aether.apps.deployments import Author
from aether.apps.runs import CALLER_GONE, DEFAULT_TIMEOUT_SECS, RunRequest, RunRow
from aether.identity.roles import Role
from aether.model.instance import Console
from aether.model.times import to_iso, to_iso_or_none
from aether.observability import tracing

MASK = "****"


class NewRun(msgspec.Struct, forbid_unknown_fields=True):
    """`command` is run by `/bin/sh -c`. With `console` "pipes" or "terminal" the run waits to be attached to and ends
    with its caller; without, it is detached. `release` is a number, the active release if absent."""

    command: str
    env: dict[str, str] = {}
    console: Console = Console.NONE
    timeout_secs: float = DEFAULT_TIMEOUT_SECS
    release: Annotated[int, msgspec.Meta(ge=1)] | None = None


class Run(msgspec.Struct):
    """`status` is running or ended. `command` is masked for readers."""

    id: str
    app: str
    release: int | None
    deployment_id: str
    command: str
    console: str
    status: str
    timeout_secs: float
    created_by: str
    created_at: str
    ended_at: str | None
    exit_code: int | None
    signal: int | None
    reason: str | None


class Volume(msgspec.Struct):
    """`used_bytes` is null when counting takes too long; `releases` need it and keep it from being deleted."""

    name: str
    path: str | None
    used_bytes: int | None
    in_use: bool


class Volumes(msgspec.Struct):
    items: list[Volume]


@post("/apps/{app:str}/runs", tags=["runs"])
async def start_run(app: FromPath[str], data: JSONBody[NewRun], services: Deps, caller: Caller) -> Run:
    """Run a command in a new sandbox of a release of the app."""
    request = RunRequest(data.command, data.env, data.console, data.timeout_secs, data.release)
    author = Author(caller.name, tracing.trace_id.get())
    return _view(await apps_of(services).runs.start(app, request, author), caller.role)


@get("/apps/{app:str}/runs", tags=["runs"])
async def list_runs(
    app: FromPath[str], services: Deps, caller: Caller, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None
) -> Page[Run]:
    """The app's runs, newest first: those under way and the last that ended."""
    rows = await apps_of(services).runs.list(app, before=decode_cursor(cursor, int, str), limit=limit)
    return page(rows, limit, lambda row: _view(row, caller.role), lambda row: (row.created_at, row.id))


@get("/apps/{app:str}/runs/{run_id:str}", tags=["runs"])
async def show_run(app: FromPath[str], run_id: FromPath[str], services: Deps, caller: Caller) -> Run:
    """One run."""
    return _view(await apps_of(services).runs.get(app, run_id), caller.role)


@post("/apps/{app:str}/runs/{run_id:str}/stop", status_code=200, tags=["runs"])
async def stop_run(app: FromPath[str], run_id: FromPath[str], services: Deps, caller: Caller) -> Run:
    """End a run; answers when it has ended. 409 when it had before."""
    author = Author(caller.name, tracing.trace_id.get())
    return _view(await apps_of(services).runs.stop(app, run_id, author), caller.role)


@websocket("/apps/{app:str}/runs/{run_id:str}/attach")
async def attach_to_run(
    socket: WebSocket[Any, Any, Any], app: FromPath[str], run_id: FromPath[str], services: Deps, caller: Caller
) -> None:
    """Join the caller to the streams of a run that was started with a console; see `aether.api.relay`."""
    session = await apps_of(services).runs.attach(app, run_id)
    finished = False
    try:
        await socket.accept()
        barred = services.identity.until_barred(caller, app)
        if finished := await Relay(socket, session, services.shutdown, barred).serve():
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the client has mostly left by itself
                await socket.close()
    finally:
        session.close(None if finished else CALLER_GONE)


@get("/apps/{app:str}/volumes", tags=["volumes"])
async def list_volumes(app: FromPath[str], services: Deps) -> Volumes:
    """The app's volumes with what they take on the disk."""
    found = await apps_of(services).volumes.list(app)
    return Volumes([Volume(item.name, item.path, item.used_bytes, item.in_use) for item in found])


@delete("/apps/{app:str}/volumes/{volume:str}", tags=["volumes"])
async def delete_volume(app: FromPath[str], volume: FromPath[str], services: Deps) -> None:
    """Delete a volume and what is in it. 409 while a release that runs, or a run, needs it."""
    await apps_of(services).volumes.delete(app, volume)


def _view(row: RunRow, role: Role) -> Run:
    return Run(
        id=row.id,
        app=row.app,
        release=row.release,
        deployment_id=row.deployment_id,
        command=row.command if role >= Role.DEPLOYER else MASK,
        console=row.console.value,
        status="running" if row.ended_at is None else "ended",
        timeout_secs=row.timeout_secs,
        created_by=row.created_by,
        created_at=to_iso(row.created_at),
        ended_at=to_iso_or_none(row.ended_at),
        exit_code=row.exit_code,
        signal=row.signal,
        reason=row.reason,
    )


HANDLERS = [start_run, list_runs, show_run, stop_run, attach_to_run, list_volumes, delete_volume]
