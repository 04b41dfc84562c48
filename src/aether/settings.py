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

from aether.model.errors import ConfigError

_Number = TypeVar("_Number", int, float)
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
    max_artifact_size_bytes: int = 2 * 1024**3
    max_concurrent_uploads: int = 32
    max_concurrent_control: int = 64
    presign_expire_secs: int = 900
    pending_ttl_secs: int = 86_400
    pending_gc_interval_secs: int = 300
    drain_timeout_secs: float = 30.0
    stop_grace_secs: float = 10.0
    app_memory_bytes: int = 512 * 1024**2
    app_cpus: float = 1.0
    app_pids: int = 256
    app_tmp_bytes: int = 256 * 1024**2
    app_log_bytes: int = 10 * 1024**2
    edge_max_body_bytes: int = 0
    edge_upstream_timeout_secs: float = 60.0
    edge_idle_timeout_secs: float = 75.0
    edge_header_timeout_secs: float = 10.0
    sandbox: str = "auto"
    """auto, bubblewrap, or none (a plain child; refused unless the edge listens on loopback)."""
    disable_background: bool = False

    def masked(self) -> dict[str, str]:
        """Every effective value as text, secrets replaced by `****`."""
        shown: dict[str, str] = {}
        for entry in fields(self):
            value: Any = getattr(self, entry.name)
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
    values.setdefault("data_dir", default_data_dir(environ))
    values.update({k: v for k, v in overrides.items() if v is not None})
    if values.get("sandbox", "auto") not in ("auto", "bubblewrap", "none"):
        raise ConfigError("AETHER_SANDBOX must be auto, bubblewrap or none")
    return Settings(**values)


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
    if kind == "Path":
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
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(str(item) for item in cast("tuple[object, ...]", value))
    return str(value)
