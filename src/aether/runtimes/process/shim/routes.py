"""Networks that an instance may not reach, kept as unreachable routes inside its network namespace.

Its outgoing connections are made for it by a program in the machine's own namespace (slirp4netns), for which every
address of the machine is local: unrefused, an app would reach all that listens there. The machine's addresses are
followed as they come and go, on a socket that is opened before the namespace is entered and stays with the machine.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct

_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 24, 25, 26
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _ACK, _DUMP, _CREATE = 0x1, 0x4, 0x300, 0x400
_MAIN, _LOCAL = 254, 255
_TYPE_LOCAL, _TYPE_UNREACHABLE = 2, 7
_STATIC = 4
_IPV4_ROUTES = 0x40  # RTMGRP_IPV4_ROUTE
_SOL_NETLINK, _STRICT_CHECK = 270, 12
_WAIT_SECS = 2.0
_ROUTE = struct.Struct("=BBBBBBBBI")
_HEADER = struct.Struct("=IHHII")
_OWN = (socket.inet_aton("127.0.0.0"), 8)
"""Loopback is the instance's own."""

Network = tuple[bytes, int]
"""A network address of four bytes and the length of its prefix."""


def parse(text: bytes) -> Network:
    """`10.0.0.0/8` as a network."""
    address, _, bits = text.decode().partition("/")
    return socket.inet_aton(address), int(bits)


def within(inner: Network, outer: Network) -> bool:
    shift = 32 - outer[1]
    return inner[1] >= outer[1] and _number(inner) >> shift == _number(outer) >> shift


def _number(network: Network) -> int:
    return int.from_bytes(network[0], "big")


class Machine:
    """The machine's own addresses. Make it before the namespace is left."""

    def __init__(self) -> None:
        self._asker = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self._asker.bind((0, 0))
        self._asker.settimeout(_WAIT_SECS)
        try:
            self._asker.setsockopt(_SOL_NETLINK, _STRICT_CHECK, 1)  # the kernel sends only what was asked for
        except OSError:
            pass  # before Linux 4.20 it sends every route, and the ones that matter are picked out below
        self.changes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        self.changes.bind((0, _IPV4_ROUTES))

    def networks(self) -> set[Network]:
        """What the machine takes for itself. Raises OSError."""
        ask = _ROUTE.pack(socket.AF_INET, 0, 0, 0, _LOCAL, 0, 0, _TYPE_LOCAL, 0)
        self._asker.send(_HEADER.pack(16 + len(ask), _RTM_GETROUTE, _REQUEST | _DUMP, 1, 0) + ask)
        found: set[Network] = set()
        while True:
            for kind, body in _messages(self._asker.recv(1 << 16)):
                if kind == _NLMSG_DONE:
                    return found
                if kind == _NLMSG_ERROR:
                    number = -struct.unpack_from("=i", body)[0]
                    raise OSError(number, os.strerror(number))
                if (network := _local(kind, body)) and not within(network, _OWN):
                    found.add(network)

    def changed(self) -> bool:
        """Read the news; whether an address of the machine came or went."""
        relevant = False
        while True:
            try:
                data = self.changes.recv(1 << 16)
            except BlockingIOError:
                return relevant
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                relevant = True  # news were lost: look for oneself
                continue
            relevant = relevant or any(_local(kind, body) for kind, body in _messages(data))


def _messages(data: bytes) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    place = 0
    while place + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, place)
        if length < 16:
            break
        found.append((kind, data[place + 16 : place + length]))
        place += (length + 3) & ~3
    return found


def _local(kind: int, body: bytes) -> Network | None:
    """The destination when `body` is a route to this machine itself."""
    if kind not in (_RTM_NEWROUTE, _RTM_DELROUTE):
        return None
    family, bits, _, _, _, _, _, route_type, _ = _ROUTE.unpack_from(body)
    if family != socket.AF_INET or route_type != _TYPE_LOCAL:
        return None
    place = _ROUTE.size
    while place + 4 <= len(body):
        length, attribute = struct.unpack_from("=HH", body, place)
        if attribute == 1 and length == 8:  # RTA_DST
            return body[place + 4 : place + 8], bits
        place += max(4, (length + 3) & ~3)
    return None


class Refusals:
    """The unreachable routes of the namespace this process is in."""

    def __init__(self, always: list[Network], allowed: list[Network]) -> None:
        self._allowed = allowed
        self._fixed = set(always)
        self._held: set[Network] = set()
        self._link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self._link.settimeout(_WAIT_SECS)

    def update(self, machine: set[Network]) -> None:
        """Refuse the fixed networks and those of `machine`, and no others. Raises OSError at the first that fails."""
        wanted = self._fixed | {own for own in machine if not any(within(own, net) for net in self._allowed)}
        for network in sorted(wanted - self._held):
            self._change(_RTM_NEWROUTE, _CREATE, network, errno.EEXIST)
            self._held.add(network)
        for network in sorted(self._held - wanted):
            self._change(_RTM_DELROUTE, 0, network, errno.ESRCH)
            self._held.discard(network)

    def _change(self, kind: int, flags: int, network: Network, harmless: int) -> None:
        address, bits = network
        route = _ROUTE.pack(socket.AF_INET, bits, 0, 0, _MAIN, _STATIC, 0, _TYPE_UNREACHABLE, 0)
        destination = struct.pack("=HH4s", 8, 1, address)
        length = 16 + len(route) + len(destination)
        self._link.sendto(_HEADER.pack(length, kind, _REQUEST | _ACK | flags, 1, 0) + route + destination, (0, 0))
        number = -struct.unpack_from("=i", self._link.recv(4096), 16)[0]
        if number not in (0, harmless):
            raise OSError(number, os.strerror(number))


class Follower:
    """Keeps refusals true while the machine's addresses change."""

    def __init__(self, machine: Machine, refusals: Refusals) -> None:
        self._machine = machine
        self._refusals = refusals

    def begin(self) -> None:
        """Raises OSError when the routes cannot be set."""
        self._refusals.update(self._machine.networks())

    def register(self, poll: select.epoll) -> int:
        poll.register(self._machine.changes.fileno(), select.EPOLLIN)
        return self._machine.changes.fileno()

    def news(self) -> None:
        """Something happened to the machine's routes. Raises OSError."""
        if self._machine.changed():
            self._refusals.update(self._machine.networks())
