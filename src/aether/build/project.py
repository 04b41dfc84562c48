"""The nouns of a build: what a project is, what was asked for, what came out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aether.artifact.pack import Packed
from aether.artifact.tree import Entry

if TYPE_CHECKING:
    from aether.build.node_project import NodeProject
    from aether.build.python import PythonProject

OnLine = Callable[[str], None]
"""Receives one line of a tool's output, without its newline."""

Progress = Callable[[int, int], None]
"""Receives entries done and entries in all."""


@dataclass(frozen=True, slots=True)
class Target:
    """The platform an artifact is made for, in Node's words."""

    os: str = "linux"
    cpu: str = "x64"  # x64 | arm64
    libc: str = "glibc"  # glibc | musl


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for on the command line and what the server said it offers."""

    app: str | None = None
    runtime: str | None = None
    start: str | None = None
    cache: bool = True
    ignore_scripts: bool = False
    offered_runtimes: tuple[str, ...] = ()
    """Runtimes of the server, e.g. ("node20", "node22"); empty when unknown."""
    target: Target | None = None
    """None: Linux on this machine's CPU."""
    timeout_s: float = 1800.0
    """Limit for each install or build command."""
    env: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Excluded:
    """A path that is not packed, relative to the project, and the reason as a short phrase."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Project:
    """What `detect` found."""

    root: Path
    kind: str  # node | python | static | binary
    app: str
    runtime: str  # node20 | python3.11 | static | binary
    start: str
    env: Mapping[str, str]
    health_path: str | None
    processes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """Process types besides web in the words of the API."""
    release_command: Mapping[str, Any] | None = None
    strategy: str | None = None
    volumes: tuple[Mapping[str, str], ...] = ()
    """Names and paths of the folders that outlive instances."""
    rollout: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """How traffic moves to a new release, in the words of the API; what is absent is the server's to choose."""
    function: Mapping[str, Any] | None = None
    """Of a function: its fields besides name and variables, in the words of the API."""
    notes: tuple[str, ...] = ()
    """Decisions the user should see, one sentence each."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a deploy would do, before anything runs."""

    project: Project
    options: Options
    steps: tuple[str, ...]
    """Commands that would run, e.g. "npm ci --omit=dev"; the cache may spare some."""
    entries: tuple[Entry, ...]
    """The project's own files that would be packed (installed dependencies and built output come on top)."""
    excluded: tuple[Excluded, ...]
    detect_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """Installed and built: everything that goes into the archive."""

    plan: Plan
    entries: tuple[Entry, ...]
    excluded: tuple[Excluded, ...]
    cached: bool
    """True when no package manager had to run."""
    described: "NodeProject | PythonProject | None" = None
    """What the project's own files say of its dependencies."""


@dataclass(frozen=True, slots=True)
class Made:
    """A finished artifact with the real times of its phases (milliseconds)."""

    plan: Plan
    prepared: Prepared
    packed: Packed
    timings_ms: Mapping[str, float]  # detect, install, pack
