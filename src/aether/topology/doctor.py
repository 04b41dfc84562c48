"""What `aether up` would find on this machine: looked at without starting or changing anything of a server."""

from __future__ import annotations

import asyncio
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

from aether.runtimes.process.report import SandboxReport
from aether.runtimes.process.runtime import ProcessRuntime, RuntimeOptions
from aether.settings import Settings
from aether.topology.node import find_node_major

_FEW_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """`status` is ok, warn or fail; `message` says what was found and, unless ok, what to do."""

    name: str
    status: str
    message: str


def doctor(settings: Settings) -> list[Check]:
    """All findings, the effective settings last with their secrets masked. Blocks for up to some seconds."""
    checks = [_sandbox(asyncio.run(_probe(settings))), _data(settings.data_dir), _node(), _python()]
    return [*checks, *(Check(name, "ok", value) for name, value in settings.masked().items())]


async def _probe(settings: Settings) -> SandboxReport:
    with tempfile.TemporaryDirectory(prefix="aether-doctor-") as scratch:
        runtime = ProcessRuntime(Path(scratch), RuntimeOptions(sandbox=settings.sandbox))
        try:
            return await runtime.probe()
        finally:
            await runtime.close()


def _sandbox(report: SandboxReport) -> Check:
    if not report.usable:
        return Check("sandbox", "fail", f"{report.reason}; {report.remedy}")
    status = "warn" if report.reason or "not enforced" in " ".join(report.limits.values()) else "ok"
    return Check("sandbox", status, "; ".join(report.lines()))


def _data(folder: Path) -> Check:
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        return Check("data directory", "fail", f"{folder} cannot be made or written to; set AETHER_DATA_DIR")
    usage = os.statvfs(existing)
    free = usage.f_bavail * usage.f_frsize
    shown = f"{folder} ({'exists' if folder.exists() else 'will be made'}, {free / 2**30:.1f} GiB free)"
    return Check("data directory", "ok" if free >= _FEW_BYTES else "warn", shown)


def _node() -> Check:
    major = find_node_major()
    if major is None:
        return Check("node", "warn", "Node.js was not found; Node.js apps cannot run here: install it")
    return Check("node", "ok", f"Node.js {major}")


def _python() -> Check:
    return Check("python", "ok", f"Python {platform.python_version()}")
