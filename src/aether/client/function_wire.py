"""Shapes of functions in the API's JSON, for type checkers only: nothing imports this module at run time."""

from typing import NotRequired, TypedDict


class FunctionCode(TypedDict):
    digest: str
    form: str
    size_bytes: int


class FunctionInstance(TypedDict):
    id: str
    version: int
    stage: str
    in_flight: int
    since: str
    ready_ms: float | None
    worker: str


class FunctionFailure(TypedDict):
    version: int
    at: str
    reason: str
    log: list[str]


class FunctionState(TypedDict):
    instances: list[FunctionInstance]
    waiting: int
    failures: int
    retry_at: str | None
    last_failure: FunctionFailure | None


class Definition(TypedDict):
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


class Function(Definition):
    id: str
    name: str
    owner: str
    version: int
    code: FunctionCode | None
    url: str
    status: str
    state: FunctionState
    created_at: str
    updated_at: str
    updated_by: str


class FunctionVersion(Definition):
    version: int
    current: bool
    code: FunctionCode | None
    rollback_of: int | None
    created_by: str
    created_at: str


class Invocation(TypedDict):
    id: str
    version: int
    instance: str
    started_at: str
    duration_ms: float
    method: str
    path: str
    status: int
    start: str


class FunctionLogLine(TypedDict):
    time: str
    stream: str
    line: str
    instance: str
    seq: int
    partial: NotRequired[bool]
    skipped: NotRequired[int]


class Runtime(TypedDict):
    name: str
    shipped: bool
    digest: str | None
    size_bytes: int | None
    init: list[str] | None
    created_by: str | None
    created_at: str | None
