"""Logs of an app: newline-delimited JSON over HTTP, or the same objects over a WebSocket."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

import msgspec
from litestar import WebSocket, get, websocket
from litestar.exceptions import WebSocketDisconnect
from litestar.params import FromPath, QueryParameter
from litestar.response import Stream

from aether.api.services import Deps, Services
from aether.api.streams import until_shutdown
from aether.api.views import apps_of
from aether.apps.logs import LogLine
from aether.model.errors import BadRequest
from aether.model.times import from_iso, to_iso

DEFAULT_TAIL = 100
_AGO = re.compile(r"(\d{1,9})([smhd]?)")
_UNIT_SECS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
Tail = Annotated[int, QueryParameter(name="tail", ge=0, description="How many of the newest lines.")]
Since = Annotated[
    str | None, QueryParameter(name="since", description="An ISO-8601 time, or how long ago: 30, 30s, 10m, 2h, 1d.")
]
Follow = Annotated[bool, QueryParameter(name="follow", description="Go on with new lines as they come.")]


class LogLineView(msgspec.Struct):
    """One line of one instance. `release` is null while its rollout is under way."""

    time: str
    stream: str
    line: str
    app: str
    release: int | None
    deployment_id: str
    digest: str
    instance: str


@get("/apps/{app:str}/logs", tags=["logs"], media_type="application/x-ndjson")
async def app_logs(
    app: FromPath[str], services: Deps, tail: Tail = DEFAULT_TAIL, since: Since = None, follow: Follow = False
) -> Stream:
    """One JSON object per line; an empty line every 15 s while following in silence."""
    lines = await _lines(services, app, tail, since, follow)

    async def body() -> AsyncGenerator[bytes]:
        async with aclosing(lines):
            async for line in lines:
                yield b"\n" if line is None else msgspec.json.encode(_view(line)) + b"\n"

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return Stream(body(), media_type="application/x-ndjson", headers=headers)


@websocket("/apps/{app:str}/logs")
async def app_logs_websocket(
    socket: WebSocket[Any, Any, Any],
    app: FromPath[str],
    services: Deps,
    tail: Tail = DEFAULT_TAIL,
    since: Since = None,
    follow: Follow = True,
) -> None:
    """The same objects as text messages."""
    lines = await _lines(services, app, tail, since, follow)
    async with aclosing(lines):
        await socket.accept()
        try:
            async for line in lines:
                await socket.send_text("" if line is None else msgspec.json.encode(_view(line)).decode())
            await socket.close()
        except WebSocketDisconnect:
            return


async def _lines(
    services: Services, app: str, tail: int, since: str | None, follow: bool
) -> AsyncGenerator[LogLine | None]:
    apps = apps_of(services)
    await apps.catalogue.get(app)
    since_ns = 0 if since is None else since_to_ns(since, time.time_ns())
    found = apps.logs.read(app, tail=tail, since_ns=since_ns, follow=follow)
    return until_shutdown(found, services.shutdown)


def since_to_ns(text: str, now_ns: int) -> int:
    """Nanoseconds since the epoch of an ISO-8601 time or of a moment so long before `now_ns`. Raises BadRequest."""
    if match := _AGO.fullmatch(text):
        return max(0, now_ns - int(match[1]) * _UNIT_SECS[match[2]] * 1_000_000_000)
    try:
        return max(0, from_iso(text) * 1000)
    except BadRequest:
        raise BadRequest(f"since: '{text[:40]}' is neither an ISO-8601 time nor like 30s, 10m, 2h or 1d") from None


def _view(line: LogLine) -> LogLineView:
    record, source = line.record, line.source
    return LogLineView(
        time=to_iso(record.time_ns // 1000),
        stream=record.stream,
        line=record.text,
        app=line.app,
        release=source.release,
        deployment_id=source.deployment_id,
        digest=source.digest,
        instance=source.instance_id,
    )


HANDLERS = [app_logs, app_logs_websocket]
