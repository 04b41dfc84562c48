"""A function runtime of each kind, for tests that hold for all of them: how to make one and what is seen of it.

A kind that is added to `KINDS` is tested by the whole contract suite.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import pytest

from aether.functions.ports import FunctionRuntime
from aether.model.function_instance import Code, FunctionSpec
from aether.runtimes.code import CodeStore
from aether.runtimes.firecracker.jail import LABEL_FLAG
from aether.runtimes.firecracker.runtime import FirecrackerRuntime
from aether.runtimes.microvm import leftovers
from aether.runtimes.microvm.images import ImageStore
from aether.runtimes.microvm.qemu import QemuRuntime
from aether.runtimes.process.functions import ProcessFunctions
from aether.runtimes.process.trees import TreeStore
from support import firecracker, microvm
from support.runtimes import processes_mentioning


class Kind(Protocol):
    machine: bool
    """Whether functions run in a virtual machine with our /init in it."""
    store: type[CodeStore[Any]]
    """What keeps the code."""

    async def need(self, data: Path) -> None:
        """Skips, naming the component, where no instance can be started."""
        ...

    def make(self, data: Path) -> FunctionRuntime: ...

    def running(self, data: Path) -> list[str]:
        """Ids of the instances that have a process."""
        ...

    def left(self, data: Path) -> list[str]:
        """Everything there is of instances but their logs: processes, groups, folders, sockets."""
        ...

    def inside(self, who: Mapping[str, Any]) -> None:
        """Asserts what a function sees that is so with this kind only; `who` is what function.js says of itself."""
        ...

    def private(self, data: Path) -> None:
        """Asserts that other users of the machine can read nothing of `data`."""
        ...


class Qemu:
    machine = True
    store: type[CodeStore[Any]] = ImageStore

    async def need(self, data: Path) -> None:
        microvm.need_machines()

    def make(self, data: Path) -> FunctionRuntime:
        return QemuRuntime(data, microvm.options())

    def running(self, data: Path) -> list[str]:
        found = leftovers.running(leftovers.scope(data))
        assert all(len(processes) == 1 for processes in found.values())
        return sorted(found)

    def left(self, data: Path) -> list[str]:
        return self.running(data)

    def inside(self, who: Mapping[str, Any]) -> None:
        assert who["env"]["PATH"] == "/usr/bin"
        assert (who["uid"], who["groups"], who["processes"]) == (1000, [1000], 1)
        kinds = {mount[1]: mount[2] for mount in who["mounts"]}
        assert (kinds["/"], kinds["/app"]) == ("squashfs", "squashfs")

    def private(self, data: Path) -> None:
        for item in [*data.rglob("*"), data]:
            assert item.stat().st_mode & 0o077 == 0, item


class RestoredQemu(Qemu):
    """Machines that go on from a snapshot; snapshots are made once per machine and kept in the cache of dev.sh."""

    async def need(self, data: Path) -> None:
        microvm.need_machines()
        runtime = self.make(data)
        for language, memory_mb in (("node", 128), ("python", 128), ("python", 512)):
            assert await runtime.make_snapshot(language, 1, memory_mb)
        await runtime.close()

    def make(self, data: Path) -> QemuRuntime:
        return QemuRuntime(
            data, replace(microvm.options(snapshots=True), snapshots_dir=microvm.cache() / "snapshots")
        )

    def inside(self, who: Mapping[str, Any]) -> None:
        super().inside(who)
        assert abs(who["now"] / 1000 - time.time()) < 60


class Firecracker(Qemu):
    async def need(self, data: Path) -> None:
        firecracker.need_firecracker()
        runtime = FirecrackerRuntime(data, firecracker.options())
        try:
            if not await firecracker.boots(runtime):
                pytest.skip("unsupported: firecracker: booting its guest on this processor")
        finally:
            await runtime.close()

    def make(self, data: Path) -> FunctionRuntime:
        return FirecrackerRuntime(data, firecracker.options())

    def running(self, data: Path) -> list[str]:
        found = leftovers.running(leftovers.scope(data), LABEL_FLAG)
        folders = {folder.name.rpartition("-")[2]: folder for folder in (data / "jails").glob("*/*")}
        return sorted((folders[key] / "instance").read_text() for key in found)

    def left(self, data: Path) -> list[str]:
        return firecracker.left(data)

    def private(self, data: Path) -> None:
        for item in [*data.rglob("*"), data]:
            assert "root" in item.relative_to(data).parts or item.stat().st_mode & 0o077 == 0, item


class Process:
    machine = False
    store: type[CodeStore[Any]] = TreeStore

    async def need(self, data: Path) -> None:
        runtime = ProcessFunctions(data)
        found = await runtime.sandbox()
        await runtime.close()
        if not found.usable:
            pytest.skip(f"component: process sandbox ({found.reason})")

    def make(self, data: Path) -> FunctionRuntime:
        return ProcessFunctions(data)

    def running(self, data: Path) -> list[str]:
        places = [os.readlink(f"/proc/{pid}/cwd") for pid in processes_mentioning(f"{data}/instances/")]
        return sorted({place.rpartition("/")[2] for place in places})

    def left(self, data: Path) -> list[str]:
        """Processes by their command lines, places and mounts: namespaces live as long as one of those."""
        found = [f"process {pid}" for pid in processes_mentioning(str(data)) if not _is_nursery(pid, data)]
        shown = f"{data.parent.name}/{data.name}/code/"
        for name in os.listdir("/proc"):
            try:
                if name.isdigit() and shown in Path(f"/proc/{name}/mountinfo").read_text():
                    found.append(f"sandboxed process {name}")
            except OSError:
                continue  # it has just ended, or is a zombie
        mark = f"-{token(data)}"
        found += [folder for folder, _, _ in os.walk("/sys/fs/cgroup") if folder.endswith(mark)]
        return found + [str(item) for item in (data / "instances").glob("*")]

    def inside(self, who: Mapping[str, Any]) -> None:
        # the first process, which reaps, and its helper that has a user of its own are shown beside the function
        assert who["processes"] <= 3

    def private(self, data: Path) -> None:
        # sandboxes read the code as users of their own, so its files are readable; nobody else gets that far
        assert data.stat().st_mode & 0o077 == 0


def _is_nursery(pid: int, data: Path) -> bool:
    """Whether it is what forks keepers, which is the runtime's and no instance's."""
    try:
        return os.readlink(f"/proc/{pid}/cwd") == str(data)
    except OSError:
        return False


KINDS: dict[str, Kind] = {
    "qemu": Qemu(), "qemu-restored": RestoredQemu(), "firecracker": Firecracker(), "process": Process(),
}  # fmt: skip


def token(data: Path) -> str:
    return sha256(os.fsencode(data)).hexdigest()[:8]


class Bench:
    """A runtime under `data`, and specs whose ids no other test on this machine has."""

    def __init__(self, kind: Kind, data: Path, runtime: FunctionRuntime) -> None:
        self.kind, self.data, self.runtime = kind, data, runtime

    def id(self, name: str) -> str:
        return f"{name}-{token(self.data)}"

    def spec(self, code: Code, name: str = "i1", **more: Any) -> FunctionSpec:
        return microvm.spec(code, self.id(name), **more)

    def running(self) -> list[str]:
        return self.kind.running(self.data)

    def left(self) -> list[str]:
        return self.kind.left(self.data)

    def codes(self) -> list[str]:
        """What was made of code, by its names."""
        found = [path for folder in ("code", "images") for path in (self.data / folder).glob("*")]
        return sorted(path.name for path in found if path.suffix in ("", ".sqfs"))


@asynccontextmanager
async def bench(name: str, data: Path) -> AsyncIterator[Bench]:
    """When it ends, no instance of it is left."""
    kind = KINDS[name]
    await kind.need(data)
    runtime = kind.make(data)
    made = Bench(kind, data, runtime)
    try:
        yield made
    finally:
        await runtime.close()
        assert made.left() == []
