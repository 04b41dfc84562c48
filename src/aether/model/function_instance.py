"""What functions are run from, as the runtimes and the capabilities speak of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from aether.model.instance import InstanceExit, LogRecord


class CodeForm(StrEnum):
    """How code arrives. An artifact was packed by `aether` and verified: links that stay inside of it are kept."""

    ZIP = "zip"
    TAR_GZ = "tar.gz"
    ARTIFACT = "artifact"


@dataclass(frozen=True, slots=True)
class Code:
    """An archive on this machine; `digest` is the SHA-256 of its bytes in lower-case hex."""

    archive: Path
    form: CodeForm
    digest: str


@dataclass(frozen=True, slots=True)
class RuntimeImage:
    """A registered language runtime on this machine. The file is named by its digest and never changed."""

    rootfs: Path
    """A squashfs image."""
    command: tuple[str, ...]
    """What is put before the entrypoint of a function."""


class RegisteredRuntimes(Protocol):
    """Language runtimes beside those that are shipped."""

    async def has(self, name: str) -> bool:
        """Raises ServiceUnavailable."""
        ...

    async def fetch(self, name: str) -> RuntimeImage:
        """Downloaded once however many ask, and verified. Raises NotFound, DigestMismatch, ServiceUnavailable."""
        ...


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """Everything a runtime needs to start one instance of a function."""

    instance_id: str
    function: str
    runtime: str
    """The registered name of the language runtime."""
    code: Code
    entrypoint: str
    """What the language runtime is given to run, relative to the code's root."""
    env: dict[str, str] = field(default_factory=dict[str, str])
    port: int = 3000
    """Where the function listens; told to it as PORT. Every instance has a network of its own."""
    vcpus: int = 1
    memory_mb: int = 128
    ready_secs: float = 60.0
    """An instance that does not listen within this time has failed."""
    snapshot: bool = False
    """Whether it may go on from a snapshot of itself: one of a machine that was started the same way and has
    answered nothing. No two instances go on from the same one."""


class FunctionPhase(StrEnum):
    STARTING = "starting"
    READY = "ready"
    EXITED = "exited"


class StartKind(StrEnum):
    """How the instance of an invocation came to be: for the invocation itself (cold, or restored from a snapshot), or
    before it."""

    WARM = "warm"
    COLD = "cold"
    RESTORED = "restored"


@dataclass(frozen=True, slots=True)
class FunctionStatus:
    """An instance as its runtime knows it; `ready_ms` is from the call of `start` until it listened."""

    instance_id: str
    function: str
    phase: FunctionPhase
    ready_ms: float | None = None
    exit: InstanceExit | None = None
    reason: str = ""
    """Why it ended, where a code or signal does not say it."""
    start: StartKind = StartKind.COLD
    """How it came to be: COLD or RESTORED."""


@dataclass(frozen=True, slots=True)
class Invocation:
    """One finished invocation. `started_at` is a UNIX time in seconds."""

    id: str
    function_id: str
    version: int
    instance_id: str
    """Empty when there was none for it."""
    started_at: float
    duration_ms: float
    method: str
    path: str
    """Without the query, cut at 200 characters."""
    status: int
    """What the caller got; 499 when it left before an answer began."""
    start: StartKind


@dataclass(frozen=True, slots=True)
class InstanceState:
    """One instance as it is shown: `stage` is starting, serving, draining or leaving."""

    id: str
    version: int
    stage: str
    in_flight: int
    since: float
    """UNIX time at which it was asked for."""
    ready_ms: float | None
    """From the start until it listened."""
    worker: str = ""


@dataclass(frozen=True, slots=True)
class FailedStart:
    """The last start that failed, or instance that ended by itself before it had run well."""

    version: int
    at: float
    reason: str
    log: tuple[str, ...]
    """The end of the instance's log."""


@dataclass(frozen=True, slots=True)
class FunctionState:
    """What there is of a function now."""

    instances: tuple[InstanceState, ...] = ()
    waiting: int = 0
    """Callers that wait for an instance."""
    failures: int = 0
    """Failed instances in a row; none is started before `retry_at`."""
    retry_at: float | None = None
    last_failure: FailedStart | None = None


@dataclass(frozen=True, slots=True)
class FunctionLogRecord:
    """A line of an instance's log."""

    instance_id: str
    record: LogRecord
