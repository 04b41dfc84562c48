"""Language runtimes of functions: those that are shipped, and root file systems that admins register."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Request, delete, get, post
from litestar.params import FromPath, QueryParameter

from aether.api import auditing
from aether.api.function_views import functions_of
from aether.api.routers.functions import raw_body
from aether.api.services import Caller, Deps
from aether.functions.runtimes import MAX_IMAGE_BYTES, SHIPPED, Runtime
from aether.model.times import to_iso

Name = Annotated[str, QueryParameter(name="name", description="1 to 40 of a-z, 0-9, '.', '_' and '-'.")]
Init = Annotated[
    list[str],
    QueryParameter(
        name="init", description="A word of the command that is put before the entrypoint; given once for each word."
    ),
]


class FunctionRuntimeView(msgspec.Struct):
    """Of one that is shipped only the name is known here."""

    name: str
    shipped: bool
    digest: str | None = None
    size_bytes: int | None = None
    init: list[str] | None = None
    created_by: str | None = None
    created_at: str | None = None


class FunctionRuntimes(msgspec.Struct):
    items: list[FunctionRuntimeView]


@get("/api/functions/runtimes", tags=["functions"])
async def list_runtimes(services: Deps) -> FunctionRuntimes:
    """The language runtimes that functions can be run with here, shipped ones first."""
    registered = await functions_of(services).runtimes.list()
    shipped = [FunctionRuntimeView(name, shipped=True) for name in SHIPPED]
    return FunctionRuntimes([*shipped, *map(_view, registered)])


@post("/api/functions/runtimes", tags=["functions"], request_max_body_size=None)
async def add_runtime(
    request: Request[Any, Any, Any], services: Deps, caller: Caller, name: Name, init: Init
) -> FunctionRuntimeView:
    """Register a runtime: the body is a squashfs image that becomes the read-only root file system of its virtual
    machines. 409 when the name is taken."""
    runtimes = functions_of(services).runtimes
    auditing.about(name)
    await runtimes.check_new(name, init)
    async with services.turns.one(), runtimes.arriving(raw_body(request, MAX_IMAGE_BYTES)) as arrived:
        return _view(await runtimes.add(name, init, arrived, caller.name))


@delete("/api/functions/runtimes/{name:str}", tags=["functions"])
async def remove_runtime(name: FromPath[str], services: Deps) -> None:
    """Remove a registered runtime; 409 while a version of a function names it."""
    auditing.about(name)
    await functions_of(services).runtimes.remove(name)


def _view(one: Runtime) -> FunctionRuntimeView:
    return FunctionRuntimeView(
        one.name, False, one.digest, one.size_bytes, list(one.init), one.created_by, to_iso(one.created_at)
    )


HANDLERS = [list_runtimes, add_runtime, remove_runtime]
