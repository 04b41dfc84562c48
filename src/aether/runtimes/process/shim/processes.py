"""The processes of an instance as /proc shows them, and signals that never hit a reused pid."""

from __future__ import annotations

import os
import signal


def started(pid: int) -> int:
    """Start time of `pid` in clock ticks since boot (field 22 of proc(5) stat); 0 when there is none or a zombie."""
    _, start, state = _stat(pid)
    return 0 if state in "ZX" else start


def _stat(pid: int) -> tuple[int, int, str]:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            data = file.read()
    except OSError:
        return 0, 0, "X"
    fields = data[data.rindex(b")") + 2 :].split()
    return int(fields[1]), int(fields[19]), fields[0].decode()


def below(root: int) -> dict[int, int]:
    """Every living descendant of `root` with its start time, zombies and `root` itself left out."""
    children: dict[int, list[tuple[int, int, str]]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            parent, start, state = _stat(int(name))
            if start:
                children.setdefault(parent, []).append((int(name), start, state))
    found: dict[int, int] = {}
    waiting = [root]
    while waiting:
        for pid, start, state in children.get(waiting.pop(), ()):
            waiting.append(pid)
            if state not in "ZX":
                found[pid] = start
    return found


def send(pid: int, start: int, number: int) -> bool:
    """Signal the process that is `pid` and began at `start`; False when it is gone."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if started(pid) != start:
            return False
        signal.pidfd_send_signal(handle, number)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True
