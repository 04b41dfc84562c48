"""Whether something listens on a port of this network namespace, by the kernel's word: nothing of it is connected to.

One socket is asked for by its address (sock_diag(7), `inet_diag_req_v2`), which costs the kernel a lookup. The tables
of /proc/net, which are for kernels without that, cost a walk over the sockets of the whole machine.
"""

from __future__ import annotations

import errno
import socket
import struct

OPEN, LOOPBACK, NOT = b"open", b"loopback", b""
"""Reachable from outside of a machine; only from within; not there."""

_BY_FAMILY, _ERROR, _DONE = 20, 2, 3
_REQUEST, _DUMP = 1, 0x300
_LISTEN = 10
_TCP = 6
_ANSWER_SECS = 2.0
# where nothing is but what listens on every address; and what loopback listens on
_ELSEWHERE = ((socket.AF_INET, "203.0.113.1"), (socket.AF_INET6, "2001:db8::1"))
_WITHIN = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_LOOPBACK_ROWS = {b"0100007F", b"00000000000000000000000001000000", b"0000000000000000FFFF00000100007F"}


class Look:
    """Looks at one port of the namespace that the process is in when this is made."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._kernel: socket.socket | None = None
        try:
            kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 4)
        except OSError:
            return
        kernel.settimeout(_ANSWER_SECS)
        if _answers(kernel):
            self._kernel = kernel
        else:
            kernel.close()

    @property
    def cheap(self) -> bool:
        return self._kernel is not None

    def now(self) -> bytes:
        """OPEN, LOOPBACK or NOT. Raises OSError."""
        kernel = self._kernel
        if kernel is None:
            return _by_tables(self._port)
        if any(_listens(kernel, family, address, self._port) for family, address in _ELSEWHERE):
            return OPEN
        if any(_listens(kernel, family, address, self._port) for family, address in _WITHIN):
            return LOOPBACK
        return NOT

    def close(self) -> None:
        if self._kernel is not None:
            self._kernel.close()


def _answers(kernel: socket.socket) -> bool:
    """Whether the kernel can be asked: an exact question has the same answer for 'no' and for 'cannot'."""
    try:
        kernel.send(_request(socket.AF_INET, bytes(16), 0, _DUMP))
        while True:
            data = kernel.recv(65536)
            while len(data) >= 16:
                size, kind = struct.unpack_from("=IH", data)
                if kind in (_ERROR, _DONE):
                    return kind == _DONE
                data = data[(size + 3) & ~3 :]
    except OSError:
        return False


def _listens(kernel: socket.socket, family: int, address: str, port: int) -> bool:
    kernel.send(_request(family, socket.inet_pton(family, address).ljust(16, b"\0"), port, 0))
    data = kernel.recv(4096)
    (kind,) = struct.unpack_from("=H", data, 4)
    if kind == _BY_FAMILY:
        return data[17] == _LISTEN
    (failure,) = struct.unpack_from("=i", data, 16)
    if failure in (-errno.ENOENT, -errno.EAFNOSUPPORT, -errno.EINVAL):
        return False
    raise OSError(-failure, "the kernel does not say who listens")


def _request(family: int, address: bytes, port: int, flags: int) -> bytes:
    where = struct.pack("!HH", port, 0) + address + bytes(16) + struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
    body = struct.pack("=BBBBI", family, _TCP, 0, 0, 1 << _LISTEN) + where
    return struct.pack("=IHHII", 16 + len(body), _BY_FAMILY, _REQUEST | flags, 0, 0) + body


def _by_tables(port: int) -> bytes:
    found = NOT
    for name in ("tcp", "tcp6"):
        try:
            with open(f"/proc/self/net/{name}", "rb") as file:
                rows = file.read().splitlines()[1:]
        except OSError:
            continue  # no IPv6
        for row in rows:
            _, local, _, state, *_ = row.split()
            address, _, number = local.rpartition(b":")
            if state == b"0A" and int(number, 16) == port:
                if address not in _LOOPBACK_ROWS:
                    return OPEN
                found = LOOPBACK
    return found
