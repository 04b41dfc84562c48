"""Functions: made, changed, given code and looked at. Calling one is the edge's, at /functions/{name}/."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, delete, get, patch, post, put
from litestar.exceptions import HTTPException
from litestar.params import FromPath, JSONBody, QueryParameter

from aether.api import auditing
from aether.api.artifact_views import registry_of
from aether.api.function_views import (
    CodeOfArtifact,
    FunctionFields,
    FunctionLogLine,
    FunctionOwner,
    FunctionRollback,
    FunctionVersionView,
    FunctionView,
    InvocationView,
    NewFunction,
    function_view,
    functions_of,
    invocation_view,
    version_view,
)
from aether.api.paging import DEFAULT_LIMIT, Cursor, Limit, Page, decode_cursor, page
from aether.api.services import Caller, Deps, Services
from aether.functions.catalogue import ArtifactCode
from aether.functions.code import MAX_CODE_BYTES
from aether.functions.records import Function
from aether.identity.ownership import visible, visible_functions
from aether.identity.roles import Principal
from aether.model.errors import BadRequest, Conflict, Forbidden, NotFound, PayloadTooLarge
from aether.model.function_instance import CodeForm
from aether.model.names import check_digest
from aether.model.times import to_iso
from aether.registry.records import Artifact

STALL_SECS = 60.0
"""A client that sends nothing for so long is cut off."""
MAX_JSON_BYTES = 256 * 1024
MAX_TAIL = 10_000
_FORMS = {
    "application/zip": CodeForm.ZIP,
    "application/x-zip-compressed": CodeForm.ZIP,
    "application/gzip": CodeForm.TAR_GZ,
    "application/x-gzip": CodeForm.TAR_GZ,
    "application/x-tar+gzip": CodeForm.TAR_GZ,
}
Search = Annotated[str, QueryParameter(name="q", max_length=40, description="Part of the name.")]
Entrypoint = Annotated[
    str | None, QueryParameter(name="entrypoint", description="Changes with the code: a field of the function.")
]
Runtime = Annotated[str | None, QueryParameter(name="runtime", description="The same.")]
Tail = Annotated[int, QueryParameter(name="tail", ge=0, le=MAX_TAIL, description="How many of the newest lines.")]


@post("/api/functions", tags=["functions"])
async def create_function(data: JSONBody[NewFunction], services: Deps, caller: Caller) -> FunctionView:
    """Make a function, which serves once it has code; 409 when the name is taken."""
    functions = functions_of(services)
    values = _given(data)
    team = values.pop("team")
    name = str(values.get("name", ""))
    auditing.about(name)
    if caller.apps is not None and name not in caller.apps:
        raise Forbidden("this token may only touch " + ", ".join(sorted(caller.apps)))
    owner = await services.identity.accounts.owner_of_new_app(caller, team)
    return await _view(services, await functions.catalogue.create(values, owner, caller.name), caller)


@get("/api/functions", tags=["functions"])
async def list_functions(
    services: Deps, caller: Caller, q: Search = "", limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None
) -> Page[FunctionView]:
    """The caller's functions by name; an admin's are all."""
    functions = functions_of(services)
    keys = decode_cursor(cursor, str)
    only = visible_functions(caller)
    rows = await functions.catalogue.list(q=q, after=keys[0] if keys else None, limit=limit, only=only)
    states = {row.id: await functions.state(row.id) for row in rows[:limit]}
    return page(rows, limit, lambda row: function_view(row, states[row.id], caller), lambda row: (row.name,))


@get("/api/functions/{function:str}", tags=["functions"])
async def show_function(function: FromPath[str], services: Deps, caller: Caller) -> FunctionView:
    """One function, by its id or name, and what runs of it."""
    return await _view(services, await functions_of(services).catalogue.get(function), caller)


@put("/api/functions/{function:str}", tags=["functions"])
async def change_function(
    function: FromPath[str], data: JSONBody[FunctionFields], services: Deps, caller: Caller
) -> FunctionView:
    """Change fields. What changes something is a new version: instances of the old one finish and are replaced."""
    changed = await functions_of(services).catalogue.update(function, _given(data), caller.name)
    return await _view(services, changed, caller)


@patch("/api/functions/{function:str}", tags=["functions"])
async def give_function_away(
    function: FromPath[str], data: JSONBody[FunctionOwner], services: Deps, caller: Caller
) -> FunctionView:
    """Give the function to another owner."""
    catalogue = functions_of(services).catalogue
    auditing.about(f"{function} to {data.owner}")
    owner = await services.identity.accounts.owner_to_be(caller, data.owner)
    return await _view(services, await catalogue.transfer(function, owner), caller)


@delete("/api/functions/{function:str}", tags=["functions"])
async def delete_function(function: FromPath[str], services: Deps) -> None:
    """End what runs of a function and delete all of it; answers when it is gone."""
    await functions_of(services).catalogue.delete(function)


@post("/api/functions/{function:str}/code", status_code=200, tags=["functions"], request_max_body_size=None)
async def put_function_code(
    request: Request[Any, Any, Any],
    function: FromPath[str],
    services: Deps,
    caller: Caller,
    entrypoint: Entrypoint = None,
    runtime: Runtime = None,
) -> FunctionView:
    """Give a function code: a zip or tar.gz archive as the body, or as JSON the digest of an artifact. The archive is
    unpacked and judged before it is taken."""
    functions = functions_of(services)
    found = await functions.catalogue.get(function)
    named = {"entrypoint": entrypoint, "runtime": runtime}
    values: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        changed = await _put_artifact(services, found, await _json(request), values, caller)
    else:
        async with (
            services.turns.one(),
            functions.codes.receiving(raw_body(request, MAX_CODE_BYTES), _FORMS.get(kind)) as received,
        ):
            changed = await functions.catalogue.put_code(found.id, received, caller.name, values=values)
    return await _view(services, changed, caller)


@get("/api/functions/{function:str}/versions", tags=["functions"])
async def list_function_versions(
    function: FromPath[str], services: Deps, caller: Caller, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None
) -> Page[FunctionVersionView]:
    """What the function was, newest first."""
    catalogue = functions_of(services).catalogue
    keys = decode_cursor(cursor, int)
    current = (await catalogue.get(function)).current.number
    # what no version can be would not fit a column
    before = None if keys is None else max(0, min(keys[0], current + 1))
    rows = await catalogue.versions(function, before=before, limit=limit)
    return page(rows, limit, lambda row: version_view(row, current, caller), lambda row: (row.number,))


@post("/api/functions/{function:str}/rollback", status_code=200, tags=["functions"])
async def roll_function_back(
    function: FromPath[str], data: JSONBody[FunctionRollback], services: Deps, caller: Caller
) -> FunctionView:
    """Make the function what it was in an earlier version, code, fields and variables: as a new version."""
    changed = await functions_of(services).catalogue.rollback(function, data.version, caller.name)
    return await _view(services, changed, caller)


@post("/api/functions/{function:str}/warm", status_code=202, tags=["functions"])
async def warm_function(function: FromPath[str], services: Deps, caller: Caller) -> FunctionView:
    """Have an instance of the current version started if there is none; answers at once. What becomes of it is in
    the function's state."""
    functions = functions_of(services)
    found = await functions.catalogue.get(function)
    if found.current.code is None:
        raise Conflict("the function has no code yet")
    await functions.running().warm(found.id)
    return await _view(services, found, caller)


@get("/api/functions/{function:str}/invocations", tags=["functions"])
async def list_invocations(
    function: FromPath[str], services: Deps, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None
) -> Page[InvocationView]:
    """The function's finished calls, newest first; they are written down within a few seconds."""
    functions = functions_of(services)
    before = decode_cursor(cursor, int, str)
    found = await functions.catalogue.get(function)
    rows = await functions.invocations.list(
        found.id, before=None if before is None else (before[0], before[1]), limit=limit
    )
    return page(rows, limit, invocation_view, lambda row: (round(row.started_at * 1_000_000), row.id))


@get("/api/functions/{function:str}/logs", tags=["functions"], media_type="application/x-ndjson")
async def function_logs(function: FromPath[str], services: Deps, tail: Tail = 100) -> Response[bytes]:
    """The last lines of the function's instances, those that ended lately included: one JSON object per line."""
    functions = functions_of(services)
    found = await functions.catalogue.get(function)
    lines: list[bytes] = []
    if functions.control is not None:
        for one in await functions.control.log(found.id, tail):
            record = one.record
            line = FunctionLogLine(
                to_iso(record.time_ns // 1000), record.stream, record.text, one.instance_id, record.seq,
                record.partial, record.skipped,
            )  # fmt: skip
            lines.append(msgspec.json.encode(line) + b"\n")
    return Response(b"".join(lines), media_type="application/x-ndjson", headers={"Cache-Control": "no-cache"})


async def _view(services: Services, function: Function, caller: Principal) -> FunctionView:
    return function_view(function, await functions_of(services).state(function.id), caller)


def _given(data: FunctionFields) -> dict[str, Any]:
    """The fields that were named."""
    values = {name: getattr(data, name) for name in data.__struct_fields__}
    return {name: value for name, value in values.items() if value is not msgspec.UNSET}


async def _put_artifact(
    services: Services, found: Function, asked: CodeOfArtifact, values: dict[str, Any], caller: Principal
) -> Function:
    artifact = await _artifact(services, found, asked, caller)
    code = ArtifactCode(artifact.id, artifact.digest, artifact.storage_key)
    values |= {} if asked.fields is None else _given(asked.fields)
    return await functions_of(services).catalogue.put_artifact(found.id, code, caller.name, values)


async def _artifact(services: Services, found: Function, asked: CodeOfArtifact, caller: Principal) -> Artifact:
    """The artifact that is meant: of the app that is named, else of the one that is called as the function is, else
    of any of the caller's."""
    digest = check_digest(asked.artifact)
    registry = registry_of(services)
    if asked.app is not None:
        return await registry.find(digest, asked.app, visible(caller))
    try:
        return await registry.find(digest, found.name, visible(caller))
    except NotFound:
        return await registry.find(digest, None, visible(caller))


async def _json(request: Request[Any, Any, Any]) -> CodeOfArtifact:
    parts = [block async for block in raw_body(request, MAX_JSON_BYTES)]
    try:
        return msgspec.json.decode(b"".join(parts), type=CodeOfArtifact)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the request does not fit: {error}") from None


async def raw_body(request: Request[Any, Any, Any], most: int) -> AsyncGenerator[bytes]:
    """The body in the pieces in which it comes. Raises BadRequest when it breaks off, PayloadTooLarge."""
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:18]) > most:
        raise PayloadTooLarge(f"the body has more than {most} bytes")
    blocks = request.stream()
    left = most
    while True:
        try:
            async with asyncio.timeout(STALL_SECS):
                block = await anext(blocks, None)
        except TimeoutError:
            raise BadRequest(f"nothing arrived for {STALL_SECS:g} s; the upload was given up") from None
        except HTTPException:
            raise BadRequest("the upload broke off; nothing was kept") from None
        if block is None:
            return
        left -= len(block)
        if left < 0:
            raise PayloadTooLarge(f"the body has more than {most} bytes")
        if block:
            yield block


HANDLERS = [
    create_function, list_functions, show_function, change_function, give_function_away,
    delete_function,
    put_function_code, list_function_versions, roll_function_back, warm_function, list_invocations, function_logs,
]  # fmt: skip
