"""An instance: one running copy of a release, as the runtimes and the capabilities speak of it."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Limits:
    """What one instance may use at most. `cpus` is in cores, memory in bytes."""

    memory_bytes: int = 512 * 1024 * 1024
    cpus: float = 1.0
    pids: int = 256
    tmp_bytes: int = 256 * 1024 * 1024


class Console(StrEnum):
    """How somebody is attached to an instance: not at all, to its three standard streams, or by a terminal."""

    NONE = ""
    PIPES = "pipes"
    TERMINAL = "terminal"


@dataclass(frozen=True, slots=True)
class Volume:
    """A folder of an app that outlives its instances, and where they see it."""

    name: str
    path: str


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
    process: str = "web"
    """The process type; with a `port` of 0 it is not told one."""
    volumes: tuple[Volume, ...] = ()
    console: Console = Console.NONE
    """With a console the instance waits for `Instance.open_console`, and ends when whoever attached is gone."""
    timeout_secs: float = 0.0
    """After this time the instance is ended by its own keeper; 0 for never."""


class InstancePhase(StrEnum):
    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class InstanceExit:
    """How an instance ended: an exit code, or the signal that killed it, and whether memory or its time ran out."""

    code: int | None
    signal: int | None
    out_of_memory: bool = False
    expired: bool = False

    def __str__(self) -> str:
        if self.expired:
            return "was ended because its time was over"
        if self.out_of_memory:
            return "was killed because it used more memory than its limit"
        if self.signal is not None:
            return f"was ended by signal {self.signal}"
        return f"exited with code {self.code}"


class KeptLog(NamedTuple):
    """The log of an instance with what was rotated away; `changed_at` is seconds since the epoch."""

    instance_id: str
    app: str
    bytes: int
    changed_at: float


class LogRecord(NamedTuple):
    """One line that an instance wrote. `time_ns` is nanoseconds since the epoch; `stream` is stdout, stderr, or
    aether for what is said about the log itself."""

    time_ns: int
    stream: str
    text: str
    partial: bool = False
    """True when the line was longer than the log's line limit and goes on in the next record."""
    seq: int = 0
    """The record's number among all of its instance, from 1; 0 when it is not known."""
    skipped: int = 0
    """In place of so many records, up to `seq`, that were rotated away before they were read."""
