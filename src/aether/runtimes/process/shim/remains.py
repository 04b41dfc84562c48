"""What an instance leaves when it ends: cgroups to empty, the count of memory kills, and the word on its end."""

from __future__ import annotations

import errno
import os
import signal
import time

from .processes import send, started

_STATE_BYTES = 512
"""The state file is padded to this size, so that a full disk cannot keep the end from being recorded."""


def memory_kills(events: bytes) -> int:
    """How many processes the kernel killed for memory, from a cgroup's `memory.events` or `memory.oom_control`."""
    try:
        with open(events, "rb") as file:
            for line in file.read().splitlines():
                if line.startswith(b"oom_kill "):
                    return int(line.split()[1])
    except OSError:
        return 0  # no such cgroup: nothing was counted
    return 0


def empty_cgroups(folders: list[bytes], limit_secs: float) -> list[str]:
    """Kill what is left in the cgroups and remove them; returns what could not be done in time."""
    until = time.monotonic() + limit_secs
    problems: list[str] = []
    for folder in folders:
        while os.path.isdir(folder):
            try:
                with open(os.path.join(folder, b"cgroup.procs"), "rb") as file:
                    left = [int(pid) for pid in file.read().split()]
                for pid in left:
                    send(pid, started(pid), signal.SIGKILL)
                os.rmdir(folder)
            except OSError as error:
                if time.monotonic() > until:
                    problems.append(f"a cgroup could not be removed: {error}")
                    break
                time.sleep(0.002)
    return problems


def write_state(path: str, phase: str, roles: dict[str, tuple[int, int]], more: str) -> None:
    """Record `phase` and the pids with start times of `roles`; `more` is further JSON members. Raises OSError."""
    members = [f'"phase": "{phase}"', *(f'"{role}": [{pid}, {start}]' for role, (pid, start) in roles.items())]
    text = "{" + ", ".join([*members, more] if more else members) + "}"
    data = text.ljust(_STATE_BYTES).encode() + b"\n"
    part = path + ".part"
    try:
        with open(part, "wb", buffering=0) as file:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.replace(part, path)
    except OSError:
        # No space for a second file: the first one has room for exactly this.
        with open(path, "r+b", buffering=0) as file:
            file.write(data)
