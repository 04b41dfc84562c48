"""One typed tree of settings, read once from the environment.

Every field is one `AETHER_<NAME>` variable; the table below is the only place that knows their names,
types and defaults. `aether doctor` prints the effective values with secrets masked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from aether.model.addresses import without_passwords
from aether.model.errors import ConfigError

_Number = TypeVar("_Number", int, float)
LONGEST_HEARTBEAT_SECS = 20
SMALLEST_PART_BYTES = 5 * 1024**2
ROLES = ("admin", "deployer", "reader")


@dataclass(frozen=True, slots=True)
class StaticToken:
    """One entry of AETHER_API_TOKENS: a bearer token, its role and the name that audit lines carry."""

    token: str = field(repr=False)
    role: str
    name: str


@dataclass(frozen=True, slots=True)
class Settings:
    """Effective settings. Sizes are bytes, durations seconds, 0 switches a limit off."""

    data_dir: Path
    api_tokens: tuple[StaticToken, ...] = field(default=(), metadata={"secret": True})
    auth_required: bool = True
    base_domain: str = "localhost"
    api_hosts: tuple[str, ...] = ()
    cors_allowed_origins: tuple[str, ...] = ()
    max_artifact_size_bytes: int = 2 * 1024**3
    max_concurrent_uploads: int = 32
    max_concurrent_control: int = 64
    api_body_timeout_secs: float = 30.0
    """Until the body of a change has come in whole."""
    database_url: str = field(default="", repr=False, metadata={"address": True})
    """postgresql://USER:PASSWORD@HOST/NAME; empty: a SQLite file in the data directory."""
    storage_mode: str = "filesystem"
    """filesystem (the data directory) or s3."""
    artifact_bucket: str = "artifacts"
    s3_endpoint_url: str = ""
    """Where the S3 store is; empty: AWS, in the region that its own variables name."""
    s3_base_url: str = ""
    """What signed URLs begin with, where clients reach the store (or this server, for a directory) elsewhere."""
    s3_sse: str = ""
    """AES256 or aws:kms: encryption that is asked for with every object; empty: the bucket's own."""
    s3_sse_kms_key: str = ""
    presign_expire_secs: int = 900
    require_presign: bool = False
    """Refuse uploads through the server (POST /artifacts)."""
    max_artifacts_per_app: int = 0
    max_total_bytes_per_app: int = 0
    verify_remote_size: bool = True
    """Ask the store for the size of an upload before reading it."""
    verify_remote_digest: bool = True
    """Ask the store for the checksum it keeps of an upload, where it keeps one, before reading it."""
    verify_remote_hash: bool = False
    """Read an artifact again where it lies for good, up to `remote_hash_max_bytes`."""
    remote_hash_max_bytes: int = 8_000_000
    multipart_threshold_bytes: int = 32 * 1024**2
    """From this size on clients upload in parts."""
    multipart_part_size_bytes: int = 8 * 1024**2
    require_signature: bool = False
    enforce_sbom: bool = False
    require_provenance: bool = False
    pending_ttl_secs: int = 86_400
    pending_gc_interval_secs: int = 300
    lease_secs: float = 15.0
    retention_interval_secs: float = 3600.0
    retention_grace_secs: float = 3600.0
    """How long what nobody needs any more can still be needed again before it goes."""
    retain_latest_per_app: int = 20
    deployment_failed_ttl_secs: float = 30 * 86_400.0
    audit_ttl_secs: float = 365 * 86_400.0
    function_invocation_ttl_secs: float = 7 * 86_400.0
    drain_timeout_secs: float = 30.0
    stop_grace_secs: float = 10.0
    app_memory_bytes: int = 512 * 1024**2
    app_cpus: float = 1.0
    app_pids: int = 256
    app_tmp_bytes: int = 256 * 1024**2
    app_log_bytes: int = 10 * 1024**2
    app_open_files: int = 65_536
    app_egress: str = "all"
    """all, public (no private ranges) or none: where apps may connect to; never this machine's own addresses."""
    app_egress_allow: tuple[str, ...] = ()
    """IPv4 addresses and networks that apps may reach all the same."""
    stream_heartbeat_secs: float = 15.0
    """A sign of life on streams that have nothing to say; clients give up after 30 s and more without one."""
    edge_max_body_bytes: int = 0
    edge_upstream_timeout_secs: float = 60.0
    edge_idle_timeout_secs: float = 75.0
    edge_header_timeout_secs: float = 10.0
    tls: bool = False
    """Speak TLS with certificates of a local authority."""
    tls_cert: str = ""
    tls_key: str = ""
    http_port: int = 0
    """Plain HTTP beside TLS, which sends everything on to HTTPS; 0: none."""
    acme_email: str = ""
    """Get certificates for custom hosts from an ACME authority, in an account with this address."""
    acme_directory: str = "https://acme-v02.api.letsencrypt.org/directory"
    acme_ca_file: str = ""
    """Trusted for the authority's own address, where that is a private one."""
    public_port: int = 0
    """The port that clients see where something in front of the server maps it; 0: the one listened on."""
    access_log: str = "file"
    """file (logs/access.log of the data directory), stdout, or off."""
    access_log_bytes: int = 100 * 1024**2
    """Size at which the file is put aside; five older ones are kept."""
    access_log_query: bool = False
    """Keep what follows the ? of a path."""
    dns_server: str = ""
    """Resolver (address[:port]) that is asked for the proofs of custom hosts; empty: the machine's own."""
    host_proof_port: int = 80
    """Where the HTTP proof of a custom host is looked for."""
    host_proof_private: tuple[str, ...] = ()
    """Hosts, or domains with a dot before them, that may be proven at private addresses."""
    sandbox: str = "auto"
    """auto, bubblewrap, or none (a plain child; refused unless the edge listens on loopback)."""
    function_runtime: str = "auto"
    """firecracker or qemu (a virtual machine each), process (a sandbox each), auto (qemu if it can be had here, else
    process), or off."""
    function_kernel_root: Path = Path("/")
    """Where the guest's kernel is: the folder that holds boot/ and lib/modules/."""
    function_parallel_starts: int = 0
    """Instances that start at the same time; 0: as many as the machine has processors."""
    function_start_secs: float = 60.0
    """An instance that does not listen by then has failed."""
    function_wait_secs: float = 60.0
    """How long a call waits for an instance with room."""
    function_max_waiting: int = 2000
    """Calls of one function that wait at the same time; more are refused."""
    function_target: float = 3.0
    """Calls that one instance should have at a time."""
    function_idle_secs: float = 30.0
    """After so long without a call an instance goes, while another remains."""
    function_last_idle_secs: float = 300.0
    """After so long the last one goes, too."""
    disable_background: bool = False
    secrets_key: str = field(default="", repr=False, metadata={"secret": True})
    """Keys in base64, the newest first, separated by commas."""
    secrets_key_file: Path | None = None

    def masked(self) -> dict[str, str]:
        """Every effective value as text, secrets replaced by `****`."""
        shown: dict[str, str] = {}
        for entry in fields(self):
            value: Any = getattr(self, entry.name)
            if entry.metadata.get("address"):
                value = without_passwords(value)
            shown[f"AETHER_{entry.name.upper()}"] = "****" if entry.metadata.get("secret") and value else _show(value)
        return shown


def default_data_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """`${XDG_DATA_HOME:-~/.local/share}/aether`."""
    base = environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return Path(base) / "aether"


def load(environ: Mapping[str, str] = os.environ, **overrides: Any) -> Settings:
    """Read settings from `environ`; keyword overrides (from flags) win. Raises ConfigError naming the variable."""
    values: dict[str, Any] = {}
    for entry in fields(Settings):
        name = f"AETHER_{entry.name.upper()}"
        if entry.name == "api_tokens" or name not in environ:
            continue
        values[entry.name] = _parse(name, environ[name], str(entry.type))
    values["api_tokens"] = _static_tokens(environ)
    if environ.get("DATABASE_URL") and "database_url" not in values:
        values["database_url"] = environ["DATABASE_URL"]
    values.setdefault("data_dir", default_data_dir(environ))
    values.update({k: v for k, v in overrides.items() if v is not None})
    if not 0 < values.get("stream_heartbeat_secs", 15.0) <= LONGEST_HEARTBEAT_SECS:
        raise ConfigError(
            f"AETHER_STREAM_HEARTBEAT_SECS must be above 0 and at most {LONGEST_HEARTBEAT_SECS}: clients take a "
            "longer silence for a broken connection"
        )
    if values.get("sandbox", "auto") not in ("auto", "bubblewrap", "none"):
        raise ConfigError("AETHER_SANDBOX must be auto, bubblewrap or none")
    if values.get("multipart_part_size_bytes", SMALLEST_PART_BYTES) < SMALLEST_PART_BYTES:
        raise ConfigError(
            f"AETHER_MULTIPART_PART_SIZE_BYTES must be at least {SMALLEST_PART_BYTES}: object stores take no smaller "
            "parts"
        )
    if values.get("function_runtime", "auto") not in ("auto", "firecracker", "qemu", "process", "off"):
        raise ConfigError("AETHER_FUNCTION_RUNTIME must be auto, firecracker, qemu, process or off")
    _check_origins(values.get("cors_allowed_origins", ()))
    _check_storage(values)
    if values.get("access_log", "file") not in ("file", "stdout", "off"):
        raise ConfigError("AETHER_ACCESS_LOG must be file, stdout or off")
    return Settings(**values)


def _check_storage(values: dict[str, Any]) -> None:
    mode = values.get("storage_mode", "filesystem")
    if mode == "mock":
        mode = values["storage_mode"] = "filesystem"
    if mode not in ("filesystem", "s3"):
        raise ConfigError("AETHER_STORAGE_MODE must be filesystem or s3")
    for name in ("s3_endpoint_url", "s3_base_url"):
        url = values.get(name, "")
        scheme, _, rest = url.partition("://")
        if url and (scheme not in ("http", "https") or not rest or set(rest) & set("?# @")):
            raise ConfigError(f"AETHER_{name.upper()}: '{url}' is not a URL like https://s3.example.com")
    if values.get("s3_sse", "") not in ("", "AES256", "aws:kms"):
        raise ConfigError("AETHER_S3_SSE must be AES256 or aws:kms")
    if values.get("s3_sse_kms_key") and values.get("s3_sse") != "aws:kms":
        raise ConfigError("AETHER_S3_SSE_KMS_KEY is used with AETHER_S3_SSE=aws:kms only")
    if mode == "s3" and not values.get("artifact_bucket", "artifacts"):
        raise ConfigError("AETHER_ARTIFACT_BUCKET must name the bucket")


def _check_origins(origins: tuple[str, ...]) -> None:
    """What no browser sends as an origin would silently allow nobody."""
    for origin in origins:
        scheme, _, rest = origin.partition("://")
        if origin != "*" and (scheme not in ("http", "https") or not rest or set(rest) & set("/?#@ *")):
            raise ConfigError(
                f"AETHER_CORS_ALLOWED_ORIGINS: '{origin}' is not an origin like https://console.example.com"
                " (scheme, host and port, nothing after them), nor *"
            )
        if origin != origin.lower():
            raise ConfigError(f"AETHER_CORS_ALLOWED_ORIGINS: '{origin}' must be lower case, as browsers send it")


def _parse(name: str, text: str, kind: str) -> Any:
    try:
        if kind == "bool":
            return text.strip().lower() in ("true", "1")
        if kind == "int":
            return _at_least_zero(int(text))
        if kind == "float":
            return _at_least_zero(float(text))
    except ValueError:
        raise ConfigError(f"{name} must be a number of zero or more, not '{text}'") from None
    if kind.startswith("Path"):
        return Path(text).expanduser()
    if kind.startswith("tuple"):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


def _at_least_zero(value: _Number) -> _Number:
    if value < 0:
        raise ValueError
    return value


def _static_tokens(environ: Mapping[str, str]) -> tuple[StaticToken, ...]:
    found: list[StaticToken] = []
    for entry in environ.get("AETHER_API_TOKENS", "").split(","):
        if not entry.strip():
            continue
        parts = entry.strip().split(":")
        if len(parts) != 3 or parts[1] not in ROLES or not parts[0] or not parts[2]:
            raise ConfigError(
                "AETHER_API_TOKENS must be token:role:name[,token:role:name...] with role admin, deployer or reader"
            )
        found.append(StaticToken(parts[0], parts[1], parts[2]))
    if single := environ.get("AETHER_API_TOKEN", "").strip():
        found.append(StaticToken(single, "admin", "api-token"))
    return tuple(found)


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(str(item) for item in cast("tuple[object, ...]", value))
    return str(value)
