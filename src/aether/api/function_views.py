"""Shapes of functions in requests and answers, and functions as routes reach them."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from aether.api.services import Services
from aether.functions.records import Function, StoredCode, Version
from aether.functions.services import FunctionServices
from aether.identity.roles import Principal, Role
from aether.model.errors import ServiceUnavailable
from aether.model.function import FunctionDefinition
from aether.model.function_instance import FailedStart, FunctionState, Invocation
from aether.model.times import to_iso

MASK = "****"


class FunctionFields(msgspec.Struct, forbid_unknown_fields=True):
    """The fields that are to change; those that are not named stay. `env_vars` are changed as a whole."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    runtime: str | msgspec.UnsetType = msgspec.UNSET
    entrypoint: str | msgspec.UnsetType = msgspec.UNSET
    vcpu: int | msgspec.UnsetType = msgspec.UNSET
    memory_mb: int | msgspec.UnsetType = msgspec.UNSET
    port: int | msgspec.UnsetType = msgspec.UNSET
    env_vars: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    timeout_secs: float | msgspec.UnsetType = msgspec.UNSET
    concurrency: int | msgspec.UnsetType = msgspec.UNSET
    min_instances: int | msgspec.UnsetType = msgspec.UNSET
    max_instances: int | msgspec.UnsetType = msgspec.UNSET
    snapshot: bool | msgspec.UnsetType = msgspec.UNSET


class NewFunction(FunctionFields, forbid_unknown_fields=True):
    """It needs a name, a runtime and an entrypoint. Without a team it is the caller's own."""

    team: str | None = None


class CodeOfArtifact(msgspec.Struct, forbid_unknown_fields=True):
    """The digest of a verified artifact, the app that has it where several have it, and fields of the function that
    change with it."""

    artifact: str
    app: str | None = None
    fields: FunctionFields | None = None


class FunctionOwner(msgspec.Struct, forbid_unknown_fields=True):
    """A user or a team: an own team of the caller's, or for an admin anybody."""

    owner: str


class FunctionRollback(msgspec.Struct, forbid_unknown_fields=True):
    """None means the version before the current one."""

    version: Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)] | None = None


class FunctionCode(msgspec.Struct):
    """`digest` is the SHA-256 of the archive, `form` zip, tar.gz or artifact."""

    digest: str
    form: str
    size_bytes: int


class Definition(msgspec.Struct):
    """What the owner of a function says of it. Values of `env_vars` are **** for the role reader."""

    runtime: str
    entrypoint: str
    vcpu: int
    memory_mb: int
    port: int
    env_vars: dict[str, str]
    timeout_secs: float
    concurrency: int
    min_instances: int
    max_instances: int
    snapshot: bool


class FunctionInstance(msgspec.Struct):
    """`stage` is starting, serving, draining or leaving; `ready_ms` is from its start until it listened."""

    id: str
    version: int
    stage: str
    in_flight: int
    since: str
    ready_ms: float | None
    worker: str


class FunctionFailure(msgspec.Struct):
    """An instance that did not come up, or ended by itself; `log` is the end of what it wrote."""

    version: int
    at: str
    reason: str
    log: list[str]


class FunctionStateView(msgspec.Struct):
    """`waiting` callers wait for an instance. After `failures` in a row none is started before `retry_at`."""

    instances: list[FunctionInstance]
    waiting: int
    failures: int
    retry_at: str | None
    last_failure: FunctionFailure | None


class FunctionView(Definition, kw_only=True):
    """`status` is empty (no code yet), idle (nothing runs until somebody calls), starting, running or failing. `url`
    is where it is called, relative to the server."""

    id: str
    name: str
    owner: str
    version: int
    code: FunctionCode | None
    url: str
    status: str
    state: FunctionStateView
    created_at: str
    updated_at: str
    updated_by: str


class FunctionVersionView(Definition, kw_only=True):
    """What a function was from one change to the next; `rollback_of` is the version that it repeats."""

    version: int
    current: bool
    code: FunctionCode | None
    rollback_of: int | None
    created_by: str
    created_at: str


class InvocationView(msgspec.Struct):
    """A finished call. `status` is what the caller got, 499 when it left before an answer began; `start` says whether
    an instance was there (warm) or was started for it (cold, restored); `instance` is empty when there was none."""

    id: str
    version: int
    instance: str
    started_at: str
    duration_ms: float
    method: str
    path: str
    status: int
    start: str


class FunctionLogLine(msgspec.Struct, omit_defaults=True):
    """A line that an instance wrote, without its newline."""

    time: str
    stream: str
    line: str
    instance: str
    seq: int
    partial: bool = False
    skipped: int = 0


def functions_of(services: Services) -> FunctionServices:
    """Raises ServiceUnavailable on a server that knows no functions."""
    if services.functions is None:
        raise ServiceUnavailable("functions are not run by this server")
    return services.functions


def function_view(function: Function, state: FunctionState, caller: Principal) -> FunctionView:
    version = function.current
    return FunctionView(
        **_definition(version.definition, caller),
        id=function.id,
        name=function.name,
        owner=function.owner,
        version=version.number,
        code=_code(version.code),
        url=f"/functions/{function.name}/",
        status=status_of(function, state),
        state=_state(state),
        created_at=to_iso(function.created_at),
        updated_at=to_iso(function.updated_at),
        updated_by=version.created_by,
    )


def version_view(version: Version, current: int, caller: Principal) -> FunctionVersionView:
    return FunctionVersionView(
        **_definition(version.definition, caller),
        version=version.number,
        current=version.number == current,
        code=_code(version.code),
        rollback_of=version.rollback_of,
        created_by=version.created_by,
        created_at=to_iso(version.created_at),
    )


def invocation_view(one: Invocation) -> InvocationView:
    return InvocationView(
        one.id, one.version, one.instance_id, _moment(one.started_at), one.duration_ms, one.method, one.path,
        one.status, one.start.value,
    )  # fmt: skip


def status_of(function: Function, state: FunctionState) -> str:
    """What a user should know first about a function."""
    if function.current.code is None:
        return "empty"
    stages = {instance.stage for instance in state.instances}
    if "serving" in stages:
        return "running"
    if state.failures:
        return "failing"
    return "starting" if "starting" in stages else "idle"


def _definition(definition: FunctionDefinition, caller: Principal) -> dict[str, Any]:
    reveal = caller.role >= Role.DEPLOYER
    return {
        "runtime": definition.runtime,
        "entrypoint": definition.entrypoint,
        "vcpu": definition.vcpu,
        "memory_mb": definition.memory_mb,
        "port": definition.port,
        "env_vars": {name: value if reveal else MASK for name, value in definition.env_vars.items()},
        "timeout_secs": definition.timeout_secs,
        "concurrency": definition.concurrency,
        "min_instances": definition.min_instances,
        "max_instances": definition.max_instances,
        "snapshot": definition.snapshot,
    }


def _code(code: StoredCode | None) -> FunctionCode | None:
    return None if code is None else FunctionCode(code.digest, code.form.value, code.size_bytes)


def _state(state: FunctionState) -> FunctionStateView:
    instances = [
        FunctionInstance(
            one.id, one.version, one.stage, one.in_flight, _moment(one.since), one.ready_ms, one.worker
        )
        for one in state.instances
    ]  # fmt: skip
    retry_at = None if state.retry_at is None else _moment(state.retry_at)
    return FunctionStateView(instances, state.waiting, state.failures, retry_at, _failure(state.last_failure))


def _failure(failed: FailedStart | None) -> FunctionFailure | None:
    if failed is None:
        return None
    return FunctionFailure(failed.version, _moment(failed.at), failed.reason, list(failed.log))


def _moment(secs: float) -> str:
    return to_iso(round(secs * 1_000_000))
