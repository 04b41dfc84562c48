"""What a killed server left running, found by the label that every monitor carries in its command line."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Collection
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

from aether.runtimes.process.shim.processes import send, started

_GONE_SECS = 5.0


def scope(folder: Path) -> str:
    """What the machines of one data folder have in common, and those of no other."""
    return f"aether-{sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]}"


def label(of: str, instance_id: str) -> str:
    return f"{of}-{instance_id}"


def running(of: str, label_flag: bytes = b"-name") -> dict[str, list[tuple[int, int]]]:
    """The processes of machines of the scope `of`: (pid, start time) by what follows the scope in their label."""
    prefix = os.fsencode(f"{of}-")
    found: dict[str, list[tuple[int, int]]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        start = started(int(name))
        for flag, word in pairwise(words):
            if flag == label_flag and word.startswith(prefix) and start:
                found.setdefault(os.fsdecode(word[len(prefix) :]), []).append((int(name), start))
    return found


def end(of: str, spare: Collection[str]) -> list[str]:
    """End the machines of the scope `of` that are not in `spare`; returns their ids. Blocks."""
    found = {name: processes for name, processes in running(of).items() if name not in spare}
    for processes in found.values():
        for pid, start in processes:
            kill(pid, start)
    return sorted(found)


def kill(pid: int, start: int) -> None:
    """End the process that is `pid` and began at `start`, if it still is there; returns when it is gone. Blocks."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if send(pid, start, signal.SIGKILL):
            select.select([handle], [], [], _GONE_SECS)
    finally:
        os.close(handle)
