"""Logs of an app: newline-delimited JSON over HTTP, or the same objects over a WebSocket."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from litestar import WebSocket, get, websocket
from litestar.exceptions import WebSocketDisconnect
from litestar.params import FromPath, QueryParameter
from litestar.response import Stream

from aether.api.log_lines import LineEncoder
from aether.api.services import Caller, Deps, Services
from aether.api.streams import until_shutdown
from aether.api.views import apps_of
from aether.apps.log_merge import LogLine
from aether.identity.roles import Principal
from aether.model.errors import BadRequest
from aether.model.times import from_iso

DEFAULT_TAIL = 100
_AGO = re.compile(r"(\d{1,9})([smhd]?)")
_UNIT_SECS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_AFTER = re.compile(r"[0-9A-Za-z._-]{1,100}:\d{1,18}")
_ALL = 1_000_000_000
Tail = Annotated[int, QueryParameter(name="tail", ge=0, description="How many of the newest lines.")]
Since = Annotated[
    str | None,
    QueryParameter(
        name="since",
        description="An ISO-8601 time, how long ago (30, 30s, 10m, 2h, 1d), or `deployment`: since the active "
        "release began.",
    ),
]
After = Annotated[
    str | None,
    QueryParameter(
        name="after",
        description="To go on after a break: `<instance>:<seq>` of the last line seen of each instance, with commas.",
    ),
]
Follow = Annotated[bool, QueryParameter(name="follow", description="Go on with new lines as they come.")]

ProcessFilter = Annotated[
    str | None, QueryParameter(name="process", max_length=40, description="Only this process type's lines.")
]


@get("/apps/{app:str}/logs", tags=["logs"], media_type="application/x-ndjson")
async def app_logs(
    app: FromPath[str],
    services: Deps,
    caller: Caller,
    tail: Tail = DEFAULT_TAIL,
    since: Since = None,
    after: After = None,
    follow: Follow = False,
    process: ProcessFilter = None,
) -> Stream:
    """One JSON object per line; an empty line at every heartbeat while following in silence."""
    batches = await _batches(services, caller, app, tail, since, after, follow, process)
    encode = LineEncoder(app)

    async def body() -> AsyncGenerator[bytes]:
        async with aclosing(batches):
            async for batch in batches:
                yield b"".join([encode(line) for line in batch]) if batch else b"\n"

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return Stream(body(), media_type="application/x-ndjson", headers=headers)


@websocket("/apps/{app:str}/logs")
async def app_logs_websocket(
    socket: WebSocket[Any, Any, Any],
    app: FromPath[str],
    services: Deps,
    caller: Caller,
    tail: Tail = DEFAULT_TAIL,
    since: Since = None,
    after: After = None,
    follow: Follow = True,
    process: ProcessFilter = None,
) -> None:
    """The same objects as text messages."""
    batches = await _batches(services, caller, app, tail, since, after, follow, process)
    encode = LineEncoder(app)
    async with aclosing(batches):
        await socket.accept()
        try:
            async for batch in batches:
                for line in batch or ():
                    await socket.send_text(encode(line)[:-1].decode())
                if not batch:
                    await socket.send_text("")
            await socket.close()
        except WebSocketDisconnect:
            return


async def _batches(
    services: Services,
    caller: Principal,
    app: str,
    tail: int,
    since: str | None,
    after: str | None,
    follow: bool,
    process: str | None,
) -> AsyncGenerator[list[LogLine] | None]:
    apps = apps_of(services)
    await apps.catalogue.get(app)
    if since == "deployment":
        since_ns = await apps.logs.release_began_us(app) * 1000
    else:
        since_ns = 0 if since is None else since_to_ns(since, time.time_ns())
    found = apps.logs.read(
        app,
        tail=None if tail >= _ALL else tail,
        since_ns=since_ns,
        after=None if after is None else positions(after),
        follow=follow,
        process=process,
    )
    # one that is not followed ends by itself, and cut short it would look whole
    shutdown = services.shutdown if follow else asyncio.Event()
    return until_shutdown(found, shutdown, barred=services.identity.until_barred(caller, app))


def positions(text: str) -> dict[str, int]:
    """`instance:seq,...` as a mapping. Raises BadRequest."""
    found: dict[str, int] = {}
    for part in text.split(","):
        if not _AFTER.fullmatch(part):
            raise BadRequest(f"after: '{part[:120]}' is not <instance>:<seq>")
        instance, _, seq = part.rpartition(":")
        found[instance] = int(seq)
    return found


def since_to_ns(text: str, now_ns: int) -> int:
    """Nanoseconds since the epoch of an ISO-8601 time or of a moment so long before `now_ns`. Raises BadRequest."""
    if match := _AGO.fullmatch(text):
        return max(0, now_ns - int(match[1]) * _UNIT_SECS[match[2]] * 1_000_000_000)
    try:
        return max(0, from_iso(text) * 1000)
    except BadRequest:
        raise BadRequest(
            f"since: '{text[:40]}' is neither an ISO-8601 time, nor like 30s, 10m, 2h or 1d, nor 'deployment'"
        ) from None


HANDLERS = [app_logs, app_logs_websocket]
