"""The process types of a project: what Procfile and aether.toml say together, in the words of the API.

aether.toml comes first. Bounds and schedules are checked here as the server checks them, so that a slip shows before
anything is built; whether a time zone is known is the server's to say.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from aether.build.config import AetherToml, Table, text_of
from aether.model.errors import BadRequest, ConfigError
from aether.model.processes import (
    RELEASE,
    WEB,
    Cron,
    ProcessTypes,
    ReleaseCommand,
    Worker,
    check_process_types,
)

_TOML = "aether.toml"
_WORKER_NUMBERS = ("settle_secs",)
_CRON_NUMBERS = ("timeout_secs",)
_CRON_TEXTS = ("timezone", "missed")


@dataclass(frozen=True, slots=True)
class Found:
    """`web` is the start command when it is given as a process type."""

    web: str | None = None
    processes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    release_command: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def find_processes(config: AetherToml, procfile: Mapping[str, str]) -> Found:
    """Raises ConfigError naming file and process type."""
    notes: list[str] = []
    processes: dict[str, dict[str, Any]] = {}
    for name, command in procfile.items():
        if name not in (WEB, RELEASE):
            processes[name] = {"command": command}
    web = procfile.get(WEB)
    for name, written in config.processes.items():
        one = _process(name, written, notes)
        if name == WEB:
            if "schedule" in one:
                raise ConfigError(f"{_TOML} [processes.{name}]: web cannot have a schedule")
            web = one["command"]
            continue
        if name in processes and processes[name] != one:
            notes.append(f"{_TOML} says how '{name}' runs; the Procfile's line has no effect")
        processes[name] = one
    release: dict[str, Any] | None = {"command": procfile[RELEASE]} if RELEASE in procfile else None
    if config.release:
        if release is not None and "command" in config.release:
            notes.append(f"{_TOML} says what the release command is; the Procfile's line has no effect")
        release = _release(config.release, release or {}, notes)
    _check(processes, release)
    return Found(web, processes, release, tuple(notes))


def _process(name: str, written: object, notes: list[str]) -> dict[str, Any]:
    where = f"{_TOML} [processes.{name}]"
    if isinstance(written, str):
        table: Table = {"command": written}
    elif isinstance(written, dict):
        table = cast(Table, written)
    else:
        raise ConfigError(f"{_TOML} [processes]: '{name}' must be a command, or a table with a command")
    found: dict[str, Any] = {"command": _command(table, where)}
    schedule = text_of(table, "schedule", where)
    if schedule is not None:
        found["schedule"] = schedule
    texts = _CRON_TEXTS if schedule is not None else ()
    numbers = _CRON_NUMBERS if schedule is not None else _WORKER_NUMBERS
    for key in texts:
        if (text := text_of(table, key, where)) is not None:
            found[key] = text
    _numbers(table, numbers, where, found)
    known = ("command", "schedule", *texts, *numbers)
    for key in table:
        if key in known:
            continue
        if key in (*_CRON_TEXTS, *_CRON_NUMBERS):
            raise ConfigError(f"{where}: '{key}' is for cron processes, and this one has no schedule")
        if key in _WORKER_NUMBERS:
            raise ConfigError(f"{where}: '{key}' is for workers, and this one has a schedule")
        notes.append(f"{_TOML}: 'processes.{name}.{key}' is not known and has no effect")
    return found


def _release(table: Table, before: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    where = f"{_TOML} [release]"
    found: dict[str, Any] = dict(before)
    if "command" in table or not before:
        found["command"] = _command(table, where)
    _numbers(table, ("timeout_secs",), where, found)
    for key in table:
        if key not in ("command", "timeout_secs"):
            notes.append(f"{_TOML}: 'release.{key}' is not known and has no effect")
    return found


def _command(table: Table, where: str) -> str:
    command = text_of(table, "command", where)
    if command is None:
        raise ConfigError(f"{where}: 'command' is missing")
    return command


def _numbers(table: Table, keys: tuple[str, ...], where: str, found: dict[str, Any]) -> None:
    for key in keys:
        value: object = table.get(key)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{where}: '{key}' must be a number")
            found[key] = value


def _check(processes: Mapping[str, Mapping[str, Any]], release: Mapping[str, Any] | None) -> None:
    workers = {name: Worker(**one) for name, one in processes.items() if "schedule" not in one}
    # the zones of this machine say nothing about those of the server
    crons = {name: replace(Cron(**one), timezone="UTC") for name, one in processes.items() if "schedule" in one}
    try:
        check_process_types(ProcessTypes(workers, crons, ReleaseCommand(**release) if release else None))
    except BadRequest as error:
        raise ConfigError(error.message) from error
