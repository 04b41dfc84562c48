"""Users for monitors, one each, who own nothing and are nobody else's on this machine."""

from __future__ import annotations

import socket
from contextlib import suppress

from aether.model.errors import ServiceUnavailable

FIRST_UID = 270_000
"""Those of QEMU's monitors end below."""
MAX_USERS = 10_000


class Users:
    """Takes users against other servers on this machine too: a taken one is the name of a socket, which the kernel
    gives up when its holder dies, and which has no file."""

    def __init__(self) -> None:
        self._taken: dict[int, socket.socket] = {}

    def take(self) -> int:
        """A user that nobody has. Raises ServiceUnavailable when there is none."""
        for user in range(FIRST_UID, FIRST_UID + MAX_USERS):
            if user in self._taken:
                continue
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                claim.bind(f"\0aether-user-{user}")
            except OSError:
                claim.close()
                continue
            self._taken[user] = claim
            return user
        raise ServiceUnavailable(f"{MAX_USERS} machines run here already")

    def release(self, user: int) -> None:
        with suppress(KeyError):
            self._taken.pop(user).close()

    def close(self) -> None:
        while self._taken:
            self._taken.popitem()[1].close()
