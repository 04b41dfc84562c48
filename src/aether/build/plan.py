"""The facade the CLI calls: plan (nothing runs), prepare (install and build), make (all of it, timed)."""

from pathlib import Path

from aether.build.project import Made, OnLine, Options, Plan, Prepared, Progress


def plan(root: Path, options: Options) -> Plan:
    """Detect the project and list what would be packed and what not; runs no tool. Raises ConfigError."""
    raise NotImplementedError


def prepare(plan: Plan, *, on_line: OnLine | None = None) -> Prepared:
    """Install dependencies and build. Raises BuildFailed, ConfigError, LocalIOError."""
    raise NotImplementedError


def make(
    plan: Plan,
    out_dir: Path,
    *,
    level: int = 2,
    on_line: OnLine | None = None,
    progress: Progress | None = None,
) -> Made:
    """`prepare`, then pack into `out_dir`."""
    raise NotImplementedError
