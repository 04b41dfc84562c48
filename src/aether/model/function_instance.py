"""What functions are run from, as the runtimes and the capabilities speak of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from aether.model.instance import InstanceExit


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


class FunctionPhase(StrEnum):
    STARTING = "starting"
    READY = "ready"
    EXITED = "exited"


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
