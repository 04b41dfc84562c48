"""The limits around a machine's monitor: what its jailer is told to set, and the groups it leaves behind."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aether.model.errors import ServiceUnavailable
from aether.runtimes.microvm.leftovers import kill
from aether.runtimes.process.shim.processes import started

MONITOR_MB = 64
"""Memory of a machine beside the guest's: the monitor, its pages of kernel memory and what it reads of images."""
MONITOR_THREADS = 16
"""Beside one for each processor."""
_CONTROLLERS = ("cpu", "memory", "pids")
_PERIOD_US = 100_000
_GONE_SECS, _RETRY_SECS = 2.0, 0.005


@dataclass(frozen=True, slots=True)
class Cgroups:
    """`version` is 1 where each controller has a hierarchy, 2 where they share one; `roots` are where these lie."""

    version: int
    roots: tuple[Path, ...]


def find_cgroups(mounts: str) -> Cgroups:
    """What the text of /proc/mounts says. Raises ServiceUnavailable when the limits cannot be set."""
    old: dict[str, Path] = {}
    new: Path | None = None
    for line in mounts.splitlines():
        _, place, kind, options, *_ = line.split(" ")
        if kind == "cgroup2" and new is None:
            new = Path(place)
        elif kind == "cgroup":
            for name in set(options.split(",")).intersection(_CONTROLLERS):
                old.setdefault(name, Path(place))
    if len(old) == len(_CONTROLLERS):
        return Cgroups(1, tuple(sorted(set(old.values()))))
    if new is not None and not old:
        return Cgroups(2, (new,))
    missing = ", ".join(name for name in _CONTROLLERS if name not in old)
    raise ServiceUnavailable(f"machines cannot be limited here: there is no cgroup controller for {missing}")


def limits(version: int, memory_mb: int, vcpus: int) -> list[str]:
    """FILE=VALUE for a machine whose guest has `memory_mb` and `vcpus`."""
    memory = (memory_mb + MONITOR_MB) << 20
    processes = f"pids.max={vcpus + MONITOR_THREADS}"
    if version == 1:
        return [f"memory.limit_in_bytes={memory}", f"cpu.cfs_quota_us={vcpus * _PERIOD_US}", processes]
    return [f"memory.max={memory}", f"cpu.max={vcpus * _PERIOD_US} {_PERIOD_US}", processes]


def groups(cgroups: Cgroups, parent: str, name: str = "") -> list[Path]:
    """Where the groups of the machine `name` are, or those of all machines of `parent`."""
    return [root / parent / name for root in cgroups.roots]


def holds(cgroups: Cgroups, parent: str, name: str, pid: int) -> bool:
    """Whether the process `pid` is in the groups of the machine `name`."""
    return all(pid in _members(group) for group in groups(cgroups, parent, name))


def end(cgroups: Cgroups, parent: str, name: str) -> None:
    """End what runs in the groups of a machine, and return when it is gone. Blocks."""
    for group in groups(cgroups, parent, name):
        for pid in _members(group):
            start = started(pid)
            if start and pid in _members(group):
                kill(pid, start)


def _members(group: Path) -> list[int]:
    try:
        return [int(line) for line in (group / "cgroup.procs").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def remove(cgroups: Cgroups, parent: str, name: str) -> None:
    """Remove the groups of a machine whose processes are gone. Blocks. Raises OSError."""
    until = time.monotonic() + _GONE_SECS
    for group in groups(cgroups, parent, name):
        while True:
            try:
                os.rmdir(group)
            except FileNotFoundError:
                break
            except OSError:
                # the last process has ended, but the kernel may still be about to take it off its books
                if time.monotonic() > until:
                    raise
                time.sleep(_RETRY_SECS)
            else:
                break


def remove_parent(cgroups: Cgroups, parent: str) -> None:
    """Remove the groups above those of machines, unless there are some. Blocks."""
    for group in groups(cgroups, parent):
        with suppress(OSError):
            os.rmdir(group)
