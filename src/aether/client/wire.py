"""Shapes of the API's JSON, for type checkers only: nothing imports this module at run time.

Times are ISO-8601 UTC with microseconds and `Z`; sizes are bytes.
"""

from typing import Generic, Literal, NotRequired, TypedDict, TypeVar

Item = TypeVar("Item")
AppStatus = Literal["running", "starting", "degraded", "stopped", "failed", "empty"]


class Page(TypedDict, Generic[Item]):
    items: list[Item]
    next_cursor: str | None


class Device(TypedDict):
    user_code: str
    client: str
    address: str
    created_at: str
    expires_at: str
    status: str
    device_code: NotRequired[str]


class AuditEntry(TypedDict):
    id: str
    time: str
    actor: str
    actor_kind: str
    action: str
    target: str
    outcome: str
    status: int
    address: str
    request_id: str
    trace_id: str


class ChoreResult(TypedDict):
    chore: str
    deleted: int
    bytes: int
    error: str | None


class Collected(TypedDict):
    dry_run: bool
    items: list[ChoreResult]


class ReleaseRef(TypedDict):
    version: int
    digest: str
    deployment_id: str
    created_at: str


class InstanceCount(TypedDict):
    desired: int
    ready: int


class CronRun(TypedDict):
    scheduled_at: str
    status: Literal["running", "succeeded", "failed", "timed_out", "skipped"]
    message: str
    exit_code: int | None
    started_at: str | None
    ended_at: str | None


class Process(TypedDict):
    name: str
    kind: Literal["web", "worker", "cron"]
    command: str
    desired: int
    ready: int
    schedule: str | None
    timezone: str | None
    next_run: str | None
    last_run: CronRun | None


class App(TypedDict):
    id: str
    name: str
    owner: str
    created_at: str
    url: str
    status: AppStatus
    release: ReleaseRef | None
    instances: InstanceCount
    processes: list[Process]


class Run(TypedDict):
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


class Volume(TypedDict):
    name: str
    path: str | None
    used_bytes: int | None
    in_use: bool


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


class ProcessType(TypedDict):
    """What a release has besides web; the other kind's fields are left out."""

    kind: Literal["worker", "cron"]
    command: str
    schedule: NotRequired[str]
    timezone: NotRequired[str]
    timeout_secs: NotRequired[float]
    missed: NotRequired[str]
    settle_secs: NotRequired[float]


class ReleaseCommand(TypedDict):
    command: str
    timeout_secs: float


class RolloutStep(TypedDict):
    number: int
    of: int
    percent: int


class Deployment(TypedDict):
    id: str
    app: str
    digest: str
    content_digest: str | None
    runtime: str
    command: str
    processes: dict[str, ProcessType]
    release_command: ReleaseCommand | None
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
    step: RolloutStep | None


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
    secrets: list[str]


class ConfigChange(Config):
    changed: list[str]
    deployment_id: str | None


class VariableChange(TypedDict):
    name: str
    change: Literal["added", "removed", "changed"]
    secret: bool


class LogLine(TypedDict):
    time: str
    stream: str
    line: str
    app: str
    release: int
    deployment_id: str
    digest: str
    process: str
    instance: str
    seq: int
    partial: NotRequired[bool]
    skipped: NotRequired[int]


class HostProof(TypedDict):
    txt_name: str
    url: str
    value: str


class HostCertificate(TypedDict):
    source: Literal["given", "acme"]
    issuer: str | None
    fingerprint: str | None
    not_before: str | None
    not_after: str | None
    problem: str | None


class Host(TypedDict):
    host: str
    app: str
    status: Literal["pending", "verified"]
    verified_by: str | None
    verified_at: str | None
    checked_at: str | None
    problem: str | None
    proof: HostProof | None
    redirect_to: str | None
    allow_http: bool
    hsts_secs: int
    certificate: HostCertificate | None
    created_by: str
    created_at: str


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


class MultipartRules(TypedDict):
    threshold_bytes: int
    part_size_bytes: int


class Presigned(TypedDict):
    method: Literal["PUT", "NONE"]
    url: str | None
    headers: dict[str, str]
    upload_id: str | None
    storage_key: str
    expires_at: str | None
    expires_in_secs: NotRequired[int | None]
    duplicate: bool
    multipart: NotRequired[MultipartRules]


class ArrivedPart(TypedDict):
    part_number: int
    size_bytes: int
    etag: str


class MultipartBegun(TypedDict):
    upload_id: str | None
    storage_key: str
    part_size_bytes: int
    part_count: int
    expires_at: str | None
    duplicate: bool
    parts: list[ArrivedPart]


class PartUrl(TypedDict):
    method: str
    url: str
    headers: dict[str, str]
    part_number: int
    size_bytes: int
    expires_at: str
    expires_in_secs: NotRequired[int]


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
    signature: NotRequired[str | None]
    manifest_digest: NotRequired[str | None]
    sbom_digest: NotRequired[str | None]
    provenance_digest: NotRequired[str | None]


class PublicKey(TypedDict):
    id: str
    app_id: str
    key_id: NotRequired[str]
    public_key_hex: str
    active: bool
    created_at: str
    created_by: NotRequired[str]
    deactivated_at: NotRequired[str | None]
