"""Liveness, readiness, start-up and metrics."""

from __future__ import annotations

import asyncio

import msgspec
from litestar import Response, get

from aether.api.services import Check, Deps
from aether.model.errors import AetherError, ServiceUnavailable
from aether.observability.metrics import CONTENT_TYPE

CHECK_TIMEOUT_SECS = 2.0


class Health(msgspec.Struct, omit_defaults=True):
    """`status` is ok; `checks` names each dependency that was asked."""

    status: str
    checks: dict[str, str] | None = None


@get(["/healthz", "/health"], tags=["probes"])
async def healthz() -> Health:
    """The process answers."""
    return Health("ok")


@get("/readyz", tags=["probes"])
async def readyz(services: Deps) -> Health:
    """Every dependency answers, and the server is not stopping."""
    if services.shutdown.is_set():
        raise ServiceUnavailable("the server is stopping")
    names = list(services.checks)
    outcomes = dict(zip(names, await asyncio.gather(*(_ask(services.checks[n]) for n in names)), strict=True))
    if any(outcome != "ok" for outcome in outcomes.values()):
        raise ServiceUnavailable("a dependency cannot serve", {"checks": outcomes})
    return Health("ok", outcomes)


@get("/startupz", tags=["probes"])
async def startupz(services: Deps) -> Health:
    """Recovery after the start is done."""
    if not services.started.is_set():
        raise ServiceUnavailable("the server is starting")
    return Health("ok")


@get("/metrics", tags=["probes"], media_type=CONTENT_TYPE)
async def metrics(services: Deps) -> Response[bytes]:
    """Prometheus text format."""
    return Response(services.metrics.render(), media_type=CONTENT_TYPE)


async def _ask(check: Check) -> str:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_SECS):
            await check()
    except TimeoutError:
        return f"no answer within {CHECK_TIMEOUT_SECS:g} s"
    except AetherError as error:
        return error.message
    except OSError as error:
        return str(error)
    return "ok"


HANDLERS = [healthz, readyz, startupz, metrics]
