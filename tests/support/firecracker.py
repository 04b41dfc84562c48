"""The real Firecracker and its jailer for tests, which dev.sh keeps in its cache."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from aether.model.errors import ServiceUnavailable
from aether.model.instance import InstanceExit
from aether.runtimes.firecracker.api import Call
from aether.runtimes.firecracker.cgroups import Cgroups, find_cgroups, groups
from aether.runtimes.firecracker.jail import LABEL_FLAG, Programs
from aether.runtimes.firecracker.machine import Machine
from aether.runtimes.firecracker.runtime import FirecrackerOptions, FirecrackerRuntime
from aether.runtimes.microvm import leftovers
from support.microvm import KERNEL, cache, need_guest_tools

PROGRAMS = Programs(cache() / "firecracker" / "jailer", cache() / "firecracker" / "firecracker")

FILES = {"index.js": "setInterval(() => {}, 1000)"}
KILLED = InstanceExit(None, 9)
CALLS = [
    "Put /machine-config", "Put /boot-source", "Put /drives/rootfs", "Put /drives/code",
    "Put /network-interfaces/eth0", "Put /mmds/config", "Put /mmds", "Put /actions",
]  # fmt: skip


def need_firecracker() -> None:
    """Skips, naming the component, where no monitor can be started."""
    need_guest_tools()
    for program in (PROGRAMS.jailer, PROGRAMS.firecracker):
        if not os.access(program, os.X_OK):
            pytest.skip("component: firecracker")
    if os.geteuid() != 0 or not all(os.access(name, os.R_OK | os.W_OK) for name in ("/dev/kvm", "/dev/net/tun")):
        pytest.skip("component: root, /dev/kvm and /dev/net/tun")


_boots: list[bool] = []


async def boots(runtime: FirecrackerRuntime) -> bool:
    """Whether guests boot here; found out by the first who asks, which takes seconds where they do not."""
    if not _boots:
        try:
            await runtime.check_machines()
            _boots.append(True)
        except ServiceUnavailable:
            _boots.append(False)
    return _boots[0]


def limited() -> Cgroups:
    return find_cgroups(Path("/proc/self/mounts").read_text())


def options(programs: Programs = PROGRAMS, level: str = "Error") -> FirecrackerOptions:
    return FirecrackerOptions(programs, KERNEL, cache() / "guests", level)


@asynccontextmanager
async def machines(
    data: Path, programs: Programs = PROGRAMS, level: str = "Error"
) -> AsyncIterator[FirecrackerRuntime]:
    """A runtime under `data`; when it ends, nothing of a machine of it is left on the host or in this process."""
    need_firecracker()
    before = (_held(), Path("/proc/self/mountinfo").read_text())
    runtime = FirecrackerRuntime(data, options(programs, level))
    try:
        yield runtime
    finally:
        await runtime.close()
        assert left(data) == []
        assert not any(group.exists() for group in groups(limited(), leftovers.scope(data)))
        assert (_held(), Path("/proc/self/mountinfo").read_text()) == before


def left(data: Path) -> list[str]:
    """What there is of machines of `data` on the host: processes, jails and cgroups."""
    scope = leftovers.scope(data)
    found = [f"process {pid}" for each in leftovers.running(scope, LABEL_FLAG).values() for pid, _ in each]
    found += [f"jail {folder.name}" for folder in (data / "jails").glob("*/*")]
    for group in groups(limited(), scope):
        found += [f"cgroup {item}" for item in group.glob("aether-*")]
    return found


def _held() -> list[str]:
    """Namespaces and processes that this process has descriptors of."""

    def links() -> Iterator[str]:
        for name in os.listdir("/proc/self/fd"):
            try:
                yield os.readlink(f"/proc/self/fd/{name}")
            except FileNotFoundError:  # that of the listing itself
                continue

    return sorted(link for link in links() if link.startswith(("net:", "user:", "mnt:", "anon_inode:[pidfd]")))


async def answer(machine: Machine, path: str) -> Any:
    return await machine.call(Call("GET", path))


async def running(machine: Machine) -> Machine:
    """`machine` once its guest's processors run; as far as it comes where guests do not boot."""
    states = [asyncio.create_task(event.wait()) for event in (machine.running, machine.gone)]
    try:
        async with asyncio.timeout(60):
            await asyncio.wait(states, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for state in states:
            state.cancel()
    assert machine.running.is_set(), machine.failure
    return machine


def monitor(data: Path, machine: Machine) -> int:
    """The process of a running machine's monitor."""
    found = leftovers.running(leftovers.scope(data), LABEL_FLAG)[machine.plan.jail.key]
    assert len(found) == 1
    return found[0][0]
