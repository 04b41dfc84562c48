"""What is on disk about one instance: its folder, what it was started from, whether it lives, how it ended.

An instance lives exactly as long as its keeper holds the lock in its folder; pids are used only together with start
times. Variables are not written: they may be secrets.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from aether.model.instance import Console, InstanceExit, InstanceSpec, Limits, Volume
from aether.runtimes.process.cgroups import Group
from aether.runtimes.process.shim.keeper import LOCK, SOCKET, STATE
from aether.runtimes.process.shim.processes import send, started

_SPEC = "spec.json"
_LOST = InstanceExit(code=None, signal=int(signal.SIGKILL))


@dataclass(frozen=True, slots=True)
class Record:
    """One instance as recorded before its start. `port` is where it is dialled; `spec.env` is empty once reread."""

    spec: InstanceSpec
    kind: str
    port: int
    group: Group

    def write(self, folder: Path) -> None:
        """Make `folder/spec.json`, whole or not at all."""
        plain = asdict(replace(self.spec, env={}))
        plain["root"] = os.fspath(self.spec.root)
        document = {
            "spec": plain,
            "kind": self.kind,
            "port": self.port,
            "cgroups": [os.fspath(path) for path in self.group.folders],
            "memory_events": None if self.group.memory_events is None else os.fspath(self.group.memory_events),
        }
        _write(folder / _SPEC, document)

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """The record in `folder`; None when there is none."""
        document = _read(folder / _SPEC)
        if document is None:
            return None
        plain: dict[str, Any] = dict(document["spec"])
        plain["root"] = Path(plain["root"])
        plain["limits"] = Limits(**plain["limits"])
        plain["volumes"] = tuple(Volume(**volume) for volume in plain.get("volumes", ()))
        plain["console"] = Console(plain.get("console", ""))
        events = document["memory_events"]
        return cls(
            spec=InstanceSpec(**plain),
            kind=str(document["kind"]),
            port=int(document["port"]),
            group=Group(tuple(Path(item) for item in document["cgroups"]), Path(events) if events else None),
        )


def take_lock(folder: Path) -> int | None:
    """Descriptor of the instance's lock, or None while its keeper lives."""
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def alive(folder: Path) -> bool:
    """Whether a keeper vouches for the instance."""
    fd = take_lock(folder)
    if fd is not None:
        os.close(fd)
    return fd is None


def keeper_of(folder: Path) -> tuple[int, int]:
    """Pid and start time of the keeper as it recorded them; zeros when it did not get that far."""
    state = _read(folder / STATE)
    return (0, 0) if state is None else (int(state["keeper"][0]), int(state["keeper"][1]))


def init_of(folder: Path) -> int:
    """Pid of the first process inside the sandbox as the keeper recorded it; 0 when it did not get that far."""
    state = _read(folder / STATE)
    return 0 if state is None else int(state.get("init", [0, 0])[0])


def was_started(folder: Path) -> bool:
    """Whether a keeper ever got as far as starting the instance."""
    return (folder / STATE).exists()


def recorded_exit(folder: Path) -> InstanceExit | None:
    """How the instance ended by its keeper's word."""
    state = _read(folder / STATE)
    if state is None or state["phase"] != "exited":
        return None
    # a keeper that an earlier version started says nothing of its time
    expired = bool(state.get("expired", False))
    return InstanceExit(state["code"], state["signal"], bool(state["out_of_memory"]), expired)


async def settle(folder: Path, group: Group, told: InstanceExit | None) -> InstanceExit:
    """The end of an instance whose keeper has left, once it is gone entirely.

    `told` is what the keeper said last. What a killed keeper left behind is ended and recorded here; of an instance
    that another server has removed nothing is left to end.
    """
    until = time.monotonic() + 5.0
    try:
        while (lock := take_lock(folder)) is None and time.monotonic() < until:
            await asyncio.sleep(0.002)  # the kernel is still closing the dead keeper's descriptors
    except FileNotFoundError:
        return told or _LOST
    try:
        if (found := told or recorded_exit(folder)) is not None:
            return found
        state = _read(folder / STATE) or {}
        for role in ("main", "init"):
            pid, start = cast("list[int]", state.get(role, [0, 0]))
            while pid and started(pid) == start and send(pid, start, signal.SIGKILL) and time.monotonic() < until:
                await asyncio.sleep(0.002)
        ended = replace(_LOST, out_of_memory=group.memory_kills() > 0)
        await group.remove()
        if lock is not None:
            (folder / SOCKET).unlink(missing_ok=True)
            _write(folder / STATE, {"keeper": [0, 0], "phase": "exited", **asdict(ended)})
        return ended
    finally:
        if lock is not None:
            os.close(lock)


def _write(path: Path, document: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(document))
    part.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
