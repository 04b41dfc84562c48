"""Reading what the developer wrote: aether.toml, package.json, pyproject.toml, Procfile. Errors name the line."""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from aether.model.errors import BadRequest, ConfigError, LocalIOError
from aether.model.instance import Volume
from aether.model.volumes import check_volumes

Table = Mapping[str, Any]

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KNOWN = frozenset(
    {"app", "kind", "start", "runtime", "health", "env", "rollout", "processes", "release", "volumes", "function"}
)
_NOT_OF_FUNCTIONS = ("start", "health", "rollout", "processes", "release", "volumes")
_ROLLOUT_NUMBERS = ("step_secs", "bake_secs", "min_requests", "max_error_rate", "max_latency_ratio")
STRATEGIES = ("rolling", "recreate", "canary", "bluegreen")


@dataclass(frozen=True, slots=True)
class AetherToml:
    """The project file; everything in it is optional."""

    app: str | None = None
    start: str | None = None
    runtime: str | None = None
    health_path: str | None = None
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    strategy: str | None = None
    rollout: Mapping[str, Any] = field(default_factory=dict[str, Any])
    processes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The `[processes]` table as it is written; `aether.build.processes` makes sense of it."""
    release: Mapping[str, Any] = field(default_factory=dict[str, Any])
    volumes: tuple[Mapping[str, str], ...] = ()
    function: Mapping[str, Any] | None = None
    """The `[function]` table as it is written, when `kind` is function; see `aether.build.functions`."""
    notes: tuple[str, ...] = ()


def read_text(path: Path) -> str | None:
    """The text of a file, None if there is no such file. Raises ConfigError unless it is UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise LocalIOError(f"cannot read {path}: {error.strerror}") from error


def read_json(path: Path) -> Table | None:
    """The object in a JSON file, None if there is no such file. Raises ConfigError naming file and line."""
    text = read_text(path)
    if text is None:
        return None
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path.name}, line {error.lineno}, column {error.colno}: {error.msg}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name}, line 1: an object {{...}} is expected")
    return cast(Table, value)


def read_toml(path: Path) -> Table | None:
    """The table in a TOML file, None if there is no such file. Raises ConfigError naming file and line."""
    text = read_text(path)
    if text is None:
        return None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, _, place = str(error).partition(" (at ")
        where = place.rstrip(")") or "line 1"
        if where == "end of document":
            where = f"line {text.count(chr(10)) + 1}"
        raise ConfigError(f"{path.name}, {where}: {message}") from error


def text_of(table: Table, key: str, path: str) -> str | None:
    """A string of `table`, None if absent or empty. Raises ConfigError for anything else."""
    value: object = table.get(key)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ConfigError(f"{path}: '{key}' must be a string")
    return value


def table_of(table: Table, key: str, path: str) -> Table:
    """A table of `table`, empty if absent. Raises ConfigError for anything else."""
    value: object = table.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: '{key}' must be a table of keys and values")
    return cast(Table, value)


def read_aether_toml(root: Path) -> AetherToml:
    """The project's aether.toml, empty if there is none."""
    name = "aether.toml"
    table = read_toml(root / name)
    if table is None:
        return AetherToml()
    kind = text_of(table, "kind", name)
    if kind not in (None, "app", "function"):
        raise ConfigError(f'{name}: kind \'{kind}\' is not known; this version deploys "app" and "function"')
    health = table_of(table, "health", name)
    health_path = text_of(health, "path", f"{name} [health]")
    if health_path is not None and not health_path.startswith("/"):
        raise ConfigError(f"{name} [health]: 'path' must start with '/'")
    env: dict[str, str] = {}
    for key, value in table_of(table, "env", name).items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ConfigError(f"{name} [env]: '{key}' must be a string")
        if not _VARIABLE.fullmatch(key):
            raise ConfigError(
                f"{name} [env]: '{key}' cannot name a variable: "
                "use letters, digits and '_', not starting with a digit"
            )
        env[key] = str(value)
    strategy, rollout = _rollout(table_of(table, "rollout", name), f"{name} [rollout]")
    moving = table_of(table, "rollout", name)
    idle = [key for key in _NOT_OF_FUNCTIONS if key in table] if kind == "function" else []
    if "function" in table and kind != "function":
        raise ConfigError(f'{name}: [function] needs kind = "function"')
    unknown = sorted(
        {key for key in table if key not in _KNOWN}
        | {f"health.{key}" for key in health if key != "path"}
        | {f"rollout.{key}" for key in moving if key not in ("strategy", "steps", *_ROLLOUT_NUMBERS)}
    )
    return AetherToml(
        app=text_of(table, "app", name),
        start=text_of(table, "start", name),
        runtime=text_of(table, "runtime", name),
        health_path=health_path,
        env=env,
        strategy=strategy,
        rollout=rollout,
        processes=table_of(table, "processes", name),
        volumes=_volumes(table.get("volumes"), f"{name} [[volumes]]"),
        release=table_of(table, "release", name),
        function=table_of(table, "function", name) if kind == "function" else None,
        notes=(
            *(f"{name}: '{key}' is not known and has no effect" for key in unknown),
            *(f"{name}: '{key}' has no effect on a function" for key in idle),
        ),
    )


def _volumes(value: object, where: str) -> tuple[Mapping[str, str], ...]:
    """The `[[volumes]]` of the file, each a name and a path."""
    if value is None:
        return ()
    tables = cast("list[object]", value) if isinstance(value, list) else [None]
    found: list[Volume] = []
    for item in tables:
        if not isinstance(item, dict):
            raise ConfigError(f'{where}: write [[volumes]] with a name and a path, as in path = "/data"')
        table = cast(Table, item)
        if "size" in table:
            raise ConfigError(f"{where}: 'size' cannot be enforced for a folder, so it is not accepted")
        if unknown := sorted(table.keys() - {"name", "path"}):
            raise ConfigError(f"{where}: '{unknown[0]}' is not known; a volume has a name and a path")
        name, path = text_of(table, "name", where), text_of(table, "path", where)
        if name is None or path is None:
            raise ConfigError(f"{where}: a volume needs a name and a path")
        found.append(Volume(name, path))
    try:
        check_volumes(found)
    except BadRequest as error:
        raise ConfigError(f"{where}: {error.message}") from error
    return tuple({"name": volume.name, "path": volume.path} for volume in found)


def _rollout(table: Table, where: str) -> tuple[str | None, dict[str, Any]]:
    """Strategy and rules of a `[rollout]` table; whether the numbers make sense is the server's to say."""
    strategy = text_of(table, "strategy", where)
    if strategy is not None and strategy not in STRATEGIES:
        raise ConfigError(f"{where}: 'strategy' is one of {', '.join(STRATEGIES)}, not '{strategy}'")
    rules: dict[str, Any] = {}
    for key in _ROLLOUT_NUMBERS:
        value: object = table.get(key)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{where}: '{key}' must be a number")
            rules[key] = value
    steps: object = table.get("steps")
    if steps is not None:
        found = cast("list[object]", steps) if isinstance(steps, list) else []
        if not found or not all(isinstance(step, int) and not isinstance(step, bool) for step in found):
            raise ConfigError(f"{where}: 'steps' must be a list of percentages, as in [5, 25, 100]")
        rules["steps"] = found
    return strategy, rules


def read_procfile(root: Path) -> dict[str, str]:
    """Process types and commands of the project's Procfile, empty if there is none."""
    text = read_text(root / "Procfile")
    found: dict[str, str] = {}
    for number, line in enumerate((text or "").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, colon, command = line.partition(":")
        if not colon or not name.strip() or not command.strip():
            raise ConfigError(f"Procfile, line {number}: 'name: command' is expected")
        if name.strip() in found:
            raise ConfigError(f"Procfile, line {number}: '{name.strip()}' is there twice")
        found[name.strip()] = command.strip()
    return found
