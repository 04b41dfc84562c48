"""Shapes of the API's JSON, for type checkers only: nothing imports this module at run time.

Times are ISO-8601 UTC with microseconds and `Z`; sizes are bytes.
"""

from typing import Generic, Literal, NotRequired, TypedDict, TypeVar

Item = TypeVar("Item")
AppStatus = Literal["running", "starting", "degraded", "stopped", "failed", "empty"]


class Page(TypedDict, Generic[Item]):
    items: list[Item]
    next_cursor: str | None


class ReleaseRef(TypedDict):
    version: int
    digest: str
    deployment_id: str
    created_at: str


class InstanceCount(TypedDict):
    desired: int
    ready: int


class App(TypedDict):
    id: str
    name: str
    owner: str
    created_at: str
    url: str
    status: AppStatus
    release: ReleaseRef | None
    instances: InstanceCount


class Release(TypedDict):
    version: int
    deployment_id: str
    digest: str
    content_digest: str | None
    runtime: str
    status: str
    description: str | None
    config_version: int
    created_by: str
    created_at: str
    rollback_of: str | None


class DeploymentError(TypedDict):
    code: str
    message: str
    log_tail: list[str]


class Deployment(TypedDict):
    id: str
    app: str
    digest: str
    content_digest: str | None
    runtime: str
    command: str
    status: str
    strategy: str
    longest_secs: float
    release: int | None
    description: str | None
    rollback_of: str | None
    config_version: int
    created_by: str
    created_at: str
    rollout_started_at: str | None
    rollout_completed_at: str | None
    url: str
    trace_id: str
    error: DeploymentError | None


class DeploymentEvent(TypedDict):
    id: int
    deployment_id: str
    phase: str
    message: str
    timestamp: str


class Health(TypedDict):
    path: str
    port: int | None


class Config(TypedDict):
    version: int
    env: dict[str, str]


class ConfigChange(Config):
    deployment_id: str | None


class LogLine(TypedDict):
    time: str
    stream: str
    line: str
    app: str
    release: int
    deployment_id: str
    digest: str
    instance: str


class Login(TypedDict):
    token: str
    name: str
    role: str
    expires_at: str
    refresh_token: str | None
    refresh_expires_at: str | None


class User(TypedDict):
    id: str
    name: str
    email: str | None
    auth_provider: str
    role: str
    disabled: bool
    has_password: bool
    teams: list[str]
    created_at: str


class Team(TypedDict):
    name: str
    members: list[str]
    created_at: str


class MachineToken(TypedDict):
    """`token` is there in the answer that made it."""

    id: str
    name: str
    user: str
    role: str
    apps: list[str] | None
    created_by: str
    created_at: str
    expires_at: str
    token: NotRequired[str]


class Identity(TypedDict):
    name: str
    role: str
    kind: str
    expires_at: str | None


class Presigned(TypedDict):
    method: Literal["PUT", "NONE"]
    url: str | None
    headers: dict[str, str]
    upload_id: str | None
    storage_key: str
    expires_at: str | None
    duplicate: bool


class Completed(TypedDict):
    artifact_url: str
    digest: str
    duplicate: bool
    app_linked: bool
    verified: bool
    size_bytes: int


class ArtifactMeta(TypedDict):
    id: str
    app: str
    digest: str
    content_digest: str | None
    runtime: str | None
    size_bytes: int
    verified: bool
    created_at: str
    storage_key: str
