"""What listens in an instance's own network, from the kernel's tables: nothing of the instance is asked."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

_LISTEN = "0A"
_LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
"""127.0.0.1, ::1 and ::ffff:127.0.0.1 as proc(5) writes them on little-endian machines."""


class Listening(Enum):
    NOT = "not"
    LOOPBACK = "on loopback only"
    OPEN = "open"


def listening(pid: int, port: int) -> Listening:
    """How the network of process `pid` listens on TCP `port`."""
    found = Listening.NOT
    for name in ("tcp", "tcp6"):
        try:
            table = Path(f"/proc/{pid}/net/{name}").read_text()
        except OSError:
            continue  # the process is gone, or there is no IPv6
        for line in table.splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, number = local.rpartition(":")
            if state == _LISTEN and int(number, 16) == port:
                if address not in _LOOPBACK:
                    return Listening.OPEN
                found = Listening.LOOPBACK
    return found
