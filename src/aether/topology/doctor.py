"""What `aether up` would find on this machine: looked at without starting or changing anything of a server."""

from __future__ import annotations

import asyncio
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

from aether.model.addresses import without_passwords
from aether.model.errors import AetherError
from aether.runtimes.process.report import SandboxReport
from aether.runtimes.process.runtime import ProcessRuntime
from aether.settings import Settings
from aether.topology.databases import found_in
from aether.topology.disk_use import disk_use, told
from aether.topology.functions import lacks_for_machines
from aether.topology.isolation import runtime_options
from aether.topology.node import find_node_major
from aether.topology.objects import look

_FEW_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """`status` is ok, warn or fail; `message` says what was found and, unless ok, what to do."""

    name: str
    status: str
    message: str


def doctor(settings: Settings) -> list[Check]:
    """All findings, the effective settings last with their secrets masked. Blocks for up to some seconds."""
    checks = [_sandbox(asyncio.run(_probe(settings))), _data(settings.data_dir)]
    if settings.data_dir.exists():
        checks.append(Check("disk use", "ok", told(disk_use(settings.data_dir))))
    checks += [_database(settings), _objects(settings), _functions(settings), _node(), _python()]
    return [*checks, *(Check(name, "ok", value) for name, value in settings.masked().items())]


async def _probe(settings: Settings) -> SandboxReport:
    with tempfile.TemporaryDirectory(prefix="aether-doctor-") as scratch:
        runtime = ProcessRuntime(Path(scratch), runtime_options(settings))
        try:
            return await runtime.probe()
        finally:
            await runtime.close()


def _sandbox(report: SandboxReport) -> Check:
    if not report.usable:
        return Check("sandbox", "fail", f"{report.reason}; {report.remedy}")
    status = "warn" if report.reason or "not enforced" in " ".join(report.limits.values()) else "ok"
    return Check("sandbox", status, "; ".join(report.lines()))


def _database(settings: Settings) -> Check:
    """What `aether server` would find; `aether up` has a database of its own whatever DATABASE_URL says."""
    if not settings.database_url:
        return Check("database", "ok", f"SQLite in {settings.data_dir / 'aether.db'}")
    shown = without_passwords(settings.database_url)
    try:
        return Check("database", "ok", f"{asyncio.run(found_in(settings))} at {shown}")
    except AetherError as error:
        return Check("database", "fail", f"{shown}: {error.message}")


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


def _objects(settings: Settings) -> Check:
    status, found = look(settings)
    return Check("object store", status, found)


def _functions(settings: Settings) -> Check:
    lacks = lacks_for_machines(settings)
    wanted = settings.function_runtime
    if wanted == "off":
        return Check("functions", "ok", "not run (AETHER_FUNCTION_RUNTIME=off)")
    if wanted == "process":
        return Check("functions", "ok", "in a sandbox each (AETHER_FUNCTION_RUNTIME=process)")
    if wanted in ("auto", "qemu"):
        if not lacks:
            return Check("functions", "ok", "in a virtual machine each (QEMU)")
        if wanted == "auto":
            return Check("functions", "warn", f"in a sandbox each; virtual machines want {lacks}")
        return Check("functions", "fail", f"AETHER_FUNCTION_RUNTIME=qemu, and this machine lacks {lacks}")
    return Check("functions", "ok", f"by {wanted}")


def _node() -> Check:
    major = find_node_major()
    if major is None:
        return Check("node", "warn", "Node.js was not found; Node.js apps cannot run here: install it")
    return Check("node", "ok", f"Node.js {major}")


def _python() -> Check:
    return Check("python", "ok", f"Python {platform.python_version()}")
