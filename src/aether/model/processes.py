"""Process types of a release: what runs beside `web`, on what schedule, and the command that runs before it.

Only their shape and their bounds; when a schedule is due is in `aether.model.schedule`, how they run is the apps'.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from aether.model.errors import BadRequest
from aether.model.schedule import Schedule

WEB = "web"
"""The process type that the edge sends requests to; every release has it."""
RELEASE = "release"
"""What the release command is called in logs and records."""
RESERVED = frozenset({WEB, RELEASE, "run"})
MAX_TYPES = 20
MAX_COMMAND_CHARS = 4000
MAX_SETTLE_SECS = 60.0
MAX_RELEASE_SECS = 3600.0
MAX_RUN_SECS = 86_400.0
MISSED = ("once", "skip")
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,29}")


@dataclass(frozen=True, slots=True)
class Worker:
    """Runs as long as its release: no PORT, no route. It is ready once it has stayed up for `settle_secs`."""

    command: str
    settle_secs: float = 2.0


@dataclass(frozen=True, slots=True)
class Cron:
    """Runs to its end at times of a schedule. `missed` says what becomes of times while no server looked: the newest
    of them is made up for `once`, or all are left out (`skip`)."""

    command: str
    schedule: str
    timezone: str = "UTC"
    timeout_secs: float = 3600.0
    missed: str = "once"


@dataclass(frozen=True, slots=True)
class ReleaseCommand:
    """Runs to its end once per deployment, before anything else of the release starts."""

    command: str
    timeout_secs: float = 300.0


@dataclass(frozen=True, slots=True)
class ProcessTypes:
    """All that a release has besides web."""

    workers: Mapping[str, Worker] = field(default_factory=dict[str, Worker])
    crons: Mapping[str, Cron] = field(default_factory=dict[str, Cron])
    release: ReleaseCommand | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> ProcessTypes:
        values: dict[str, Any] = json.loads(text)
        release = values.get("release")
        return ProcessTypes(
            {name: Worker(**worker) for name, worker in values.get("workers", {}).items()},
            {name: Cron(**cron) for name, cron in values.get("crons", {}).items()},
            ReleaseCommand(**release) if release else None,
        )

    def kind_of(self, name: str) -> str | None:
        """web, worker or cron; None for a process type that the release does not have."""
        if name == WEB:
            return WEB
        return "worker" if name in self.workers else "cron" if name in self.crons else None

    @property
    def names(self) -> list[str]:
        """web first, then workers, then crons, each by name."""
        return [WEB, *sorted(self.workers), *sorted(self.crons)]


def is_process_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def check_process_types(types: ProcessTypes) -> None:
    """Raise BadRequest naming the field that is wrong."""
    if len(types.workers) + len(types.crons) > MAX_TYPES:
        raise BadRequest(f"a release has at most {MAX_TYPES} process types besides web", {"field": "processes"})
    if both := sorted(set(types.workers) & set(types.crons)):
        raise BadRequest(f"process type '{both[0]}' is both a worker and a cron process", {"field": "processes"})
    for name in (*types.workers, *types.crons):
        if not is_process_name(name):
            raise BadRequest(
                f"'{name[:40]}' cannot name a process type: use 1 to 30 of a-z, 0-9, '-' and '_', "
                "starting with a letter",
                {"field": "processes"},
            )
        if name in RESERVED:
            raise BadRequest(f"'{name}' cannot name a process type: Aether uses it itself", {"field": "processes"})
    for name, worker in types.workers.items():
        check_command(worker.command, f"processes.{name}.command")
        _check_secs(worker.settle_secs, 0, MAX_SETTLE_SECS, f"processes.{name}.settle_secs")
    for name, cron in types.crons.items():
        check_command(cron.command, f"processes.{name}.command")
        _check_secs(cron.timeout_secs, 1, MAX_RUN_SECS, f"processes.{name}.timeout_secs")
        if cron.missed not in MISSED:
            raise BadRequest(f"processes.{name}.missed is 'once' or 'skip'", {"field": f"processes.{name}.missed"})
        try:
            Schedule(cron.schedule, cron.timezone)
        except BadRequest as error:
            raise BadRequest(f"processes.{name}: {error.message}", {"field": f"processes.{name}.schedule"}) from None
    if types.release is not None:
        check_command(types.release.command, "release_command.command")
        _check_secs(types.release.timeout_secs, 1, MAX_RELEASE_SECS, "release_command.timeout_secs")


def check_command(command: str, where: str) -> None:
    """Raise BadRequest unless a shell can be given `command`."""
    if not command.strip() or len(command) > MAX_COMMAND_CHARS or "\0" in command:
        raise BadRequest(f"{where} must be 1 to {MAX_COMMAND_CHARS} characters without a NUL byte", {"field": where})


def _check_secs(value: float, low: float, high: float, where: str) -> None:
    if not low <= value <= high:
        raise BadRequest(f"{where} must be {low:g} to {high:g}", {"field": where})
