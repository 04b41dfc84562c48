"""An instance: one running copy of a release, as the runtimes and the capabilities speak of it."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Limits:
    """What one instance may use at most. `cpus` is in cores, memory in bytes."""

    memory_bytes: int = 512 * 1024 * 1024
    cpus: float = 1.0
    pids: int = 256
    tmp_bytes: int = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """Everything a runtime needs to start an instance; it is recorded before the start."""

    instance_id: str
    app: str
    deployment_id: str
    release: int
    digest: str
    root: Path
    """Folder with the unpacked artifact; the instance sees it read-only at /app."""
    command: str
    """Run by `/bin/sh -c` in /app."""
    port: int
    """Told to the instance as PORT; unique only inside its own network view."""
    env: dict[str, str] = field(default_factory=dict[str, str])
    limits: Limits = Limits()


class InstancePhase(StrEnum):
    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class InstanceExit:
    """How an instance ended: an exit code, or the signal that killed it, and whether memory ran out."""

    code: int | None
    signal: int | None
    out_of_memory: bool = False

    def __str__(self) -> str:
        if self.out_of_memory:
            return "was killed because it used more memory than its limit"
        if self.signal is not None:
            return f"was ended by signal {self.signal}"
        return f"exited with code {self.code}"


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One line that an instance wrote. `time_ns` is nanoseconds since the epoch; `stream` is stdout or stderr."""

    time_ns: int
    stream: str
    text: str
    partial: bool = False
    """True when the line was longer than the log's line limit and goes on in the next record."""
