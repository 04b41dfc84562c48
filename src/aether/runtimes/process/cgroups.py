"""Cgroups of instances: where they can be made on this machine, their limits, their end.

Version 2 is used where its controllers are (as root, or in a delegated subtree), else the version 1 hierarchies.
Groups are made below the server's own, so that an instance never escapes a limit the server is under; on version 2,
where a group with processes may not have limited children, root makes them at the top instead.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from aether.model.instance import Limits
from aether.runtimes.process.shim.processes import send, started

_CONTROLLERS = ("memory", "cpu", "pids")
_PERIOD_USECS = 100_000
_PARENT = "aether"
_SERVER = "aether-server"


@dataclass(frozen=True, slots=True)
class Cgroups:
    """Usable parents: `v2` is one folder for all its `controllers`; `v1` maps a controller to its folder."""

    v2: Path | None = None
    controllers: frozenset[str] = frozenset()
    v1: dict[str, Path] = field(default_factory=dict[str, Path])

    def enforces(self, controller: str) -> bool:
        return controller in self.controllers or controller in self.v1

    def how(self, controller: str) -> str | None:
        if controller in self.controllers:
            return "cgroup v2"
        return "cgroup v1" if controller in self.v1 else None

    def mounts(self, instance_id: str) -> list[tuple[Path, str]]:
        """Where an instance finds its own groups, so that language runtimes size themselves by its limits."""
        found = [(parent / instance_id, f"/sys/fs/cgroup/{name}") for name, parent in self.v1.items()]
        if self.v2 is not None and self.controllers:
            found.insert(0, (self.v2 / instance_id, "/sys/fs/cgroup"))
        return found

    def left_of(self, instance_id: str) -> Group:
        """Groups that exist under the instance's name, for an instance without a record."""
        return Group(tuple({folder for folder, _ in self.mounts(instance_id) if folder.is_dir()}))

    def create(self, instance_id: str, limits: Limits) -> Group:
        """Make the groups of an instance and set its limits; 0 is no limit. Raises OSError."""
        folders: list[Path] = []
        events: Path | None = None
        try:
            if self.v2 is not None and self.controllers:
                folder = self.v2 / instance_id
                _make(folder)
                folders.append(folder)
                _limit_v2(folder, limits, self.controllers)
                if "memory" in self.controllers:
                    events = folder / "memory.events"
            for controller, parent in self.v1.items():
                folder = parent / instance_id
                _make(folder)
                if folder not in folders:
                    folders.append(folder)
                _limit_v1(folder, controller, limits)
                if controller == "memory":
                    events = folder / "memory.oom_control"
        except OSError:
            for folder in folders:
                folder.rmdir()
            raise
        return Group(tuple(folders), events)


@dataclass(frozen=True, slots=True)
class Group:
    """The cgroup folders of one instance and the file that counts its out-of-memory kills."""

    folders: tuple[Path, ...] = ()
    memory_events: Path | None = None

    def memory_kills(self) -> int:
        if self.memory_events is None or not self.memory_events.exists():
            return 0
        for line in self.memory_events.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
        return 0

    async def remove(self, deadline_secs: float = 3.0) -> None:
        """Kill what is left inside and remove the folders. Raises OSError when that fails until the deadline."""
        until = time.monotonic() + deadline_secs
        for folder in self.folders:
            while folder.is_dir():
                try:
                    for pid in (folder / "cgroup.procs").read_text().split():
                        send(int(pid), started(int(pid)), 9)
                    folder.rmdir()
                except OSError:
                    if time.monotonic() > until:
                        raise
                    await asyncio.sleep(0.005)
            if not (folder.parent / "cgroup.subtree_control").exists():
                try:
                    folder.parent.rmdir()
                except OSError:
                    continue  # other instances live in it


def detect(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Cgroups:
    """Find where groups can be made, by making one; never raises."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return Cgroups()
    v2: Path | None = None
    controllers: frozenset[str] = frozenset()
    v1: dict[str, Path] = {}
    for line in lines:
        number, names, path = line.split(":", 2)
        if number == "0":
            v2, controllers = _find_v2(root, path)
        else:
            for name in names.split(","):
                if name in _CONTROLLERS and (found := _find_v1(root / names, path) or _find_v1(root / name, path)):
                    v1[name] = found
    return Cgroups(v2, controllers, {name: path for name, path in v1.items() if name not in controllers})


def _find_v1(mount: Path, path: str) -> Path | None:
    parent = mount / path.lstrip("/") / _PARENT
    return parent if (mount / "cgroup.procs").exists() and _can_make(parent) else None


def _find_v2(root: Path, path: str) -> tuple[Path | None, frozenset[str]]:
    top = root if (root / "cgroup.controllers").exists() else root / "unified"
    for base in (top / path.lstrip("/"), top):
        try:
            wanted = set((base / "cgroup.controllers").read_text().split()).intersection(_CONTROLLERS)
        except OSError:
            continue
        if not wanted or not _can_make(base / _PARENT):
            continue
        _step_aside(base)
        _enable(base, wanted)
        _enable(base / _PARENT, wanted)
        try:
            got = frozenset((base / _PARENT / "cgroup.subtree_control").read_text().split()) & wanted
        except OSError:
            continue
        if got:
            return base / _PARENT, got
    return None, frozenset()


def _step_aside(base: Path) -> None:
    """Leave a group that was delegated to this process alone: with a process in it, it may not have children."""
    try:
        if (base / "cgroup.procs").read_text().split() == [str(os.getpid())]:
            (base / _SERVER).mkdir(exist_ok=True)
            (base / _SERVER / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        return  # not ours to arrange: the caller sees which controllers took effect


def _enable(folder: Path, controllers: set[str]) -> None:
    for name in sorted(controllers):
        try:
            (folder / "cgroup.subtree_control").write_text(f"+{name}")
        except OSError:
            continue  # a group with processes, or not ours: the caller reads back what took effect


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # the last instance beside it was removed just now, and the parent with it
        folder.mkdir(parents=True, exist_ok=True)


def _can_make(parent: Path) -> bool:
    probe = parent / f"probe-{os.getpid()}"
    try:
        probe.mkdir(parents=True)
        probe.rmdir()
    except OSError:
        return False
    return True


def _limit_v2(folder: Path, limits: Limits, controllers: frozenset[str]) -> None:
    if "memory" in controllers and limits.memory_bytes:
        (folder / "memory.max").write_text(str(limits.memory_bytes))
        if (folder / "memory.swap.max").exists():
            (folder / "memory.swap.max").write_text("0")
    if "cpu" in controllers and limits.cpus:
        (folder / "cpu.max").write_text(f"{_quota(limits.cpus)} {_PERIOD_USECS}")
    if "pids" in controllers and limits.pids:
        (folder / "pids.max").write_text(str(limits.pids))


def _limit_v1(folder: Path, controller: str, limits: Limits) -> None:
    if controller == "memory" and limits.memory_bytes:
        (folder / "memory.limit_in_bytes").write_text(str(limits.memory_bytes))
        if (folder / "memory.memsw.limit_in_bytes").exists():
            (folder / "memory.memsw.limit_in_bytes").write_text(str(limits.memory_bytes))
    if controller == "cpu" and limits.cpus:
        (folder / "cpu.cfs_period_us").write_text(str(_PERIOD_USECS))
        (folder / "cpu.cfs_quota_us").write_text(str(_quota(limits.cpus)))
    if controller == "pids" and limits.pids:
        (folder / "pids.max").write_text(str(limits.pids))


def _quota(cpus: float) -> int:
    return max(1_000, int(cpus * _PERIOD_USECS))
