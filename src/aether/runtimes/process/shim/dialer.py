"""Makes TCP connections inside an instance's network namespace and hands them out as descriptors.

It is a process of its own because joining a user namespace cannot be undone. On its control socket it receives
clients; a client sends 4-byte request numbers, each answered by the number, an errno in two bytes (0: connected)
and the connected socket. It ends when the keeper closes the control socket. Being where the instance's routes are, it
also keeps those that refuse networks (see `routes`), and says when the instance listens where that is asked for.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import time

from .listening import LOOPBACK, OPEN, Look
from .routes import Follower

CONNECT_SECS = 5.0
_NS_GET_USERNS = 0xB701
_MAX_UNDER_WAY = 512
_LOOK_SECS, _LOOK_LATER_SECS, _LATER_SECS = 0.003, 0.02, 2.0
"""The kernel tells nobody that a port is listened on, so it is asked; less often when it takes long."""
_LOOK_DEARLY_SECS = 0.1
_UNSURE = {errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENETDOWN}
"""The loopback device is not up yet, or there is no IPv6: nobody listens as far as the caller is concerned."""


def owner_of(namespace: int) -> int:
    """Descriptor of the user namespace that owns the namespace behind descriptor `namespace` (ioctl_ns(2))."""
    return fcntl.ioctl(namespace, _NS_GET_USERNS)


def enter(pid: int, *, user_namespace: bool) -> None:
    """Move this process into the network namespace of `pid`. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    handles = [owner_of(network), network] if user_namespace else [network]
    for handle in handles:
        if libc.setns(handle, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        os.close(handle)


def await_loopback(limit_secs: float = 10.0) -> None:
    """Return once this network namespace's loopback device is up. Raises TimeoutError."""
    name = struct.pack("16sh14x", b"lo", 0)
    until = time.monotonic() + limit_secs
    with (
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker,
    ):
        link.bind((0, 1))  # RTMGRP_LINK: subscribe before looking
        while not struct.unpack_from("16sh", fcntl.ioctl(asker, 0x8913, name))[1] & 1:  # SIOCGIFFLAGS, IFF_UP
            link.settimeout(max(0.001, until - time.monotonic()))
            link.recv(65536)


class Attempt:
    """One connection being made for `client` under request `number`."""

    def __init__(self, client: socket.socket, number: bytes) -> None:
        self.client = client
        self.number = number
        self.deadline = time.monotonic() + CONNECT_SECS
        self.targets = [(socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1")]
        self.sock: socket.socket | None = None


class Dialer:
    def __init__(
        self, control: socket.socket, port: int, follower: Follower | None, *, tell_listening: bool = False
    ) -> None:
        self._control = control
        self._port = port
        self._poll = select.epoll()
        self._follower = follower
        self._news = follower.register(self._poll) if follower is not None else -1
        self._clients: dict[int, socket.socket] = {}
        self._attempts: dict[int, Attempt] = {}
        self._look = Look(port) if tell_listening else None
        self._look_later = time.monotonic() + _LATER_SECS
        self._told = b""
        self._poll.register(control.fileno(), select.EPOLLIN)

    def serve(self) -> None:
        while True:
            for fd, _ in self._poll.poll(self._timeout()):
                if fd == self._control.fileno():
                    if not self._accept():
                        return
                elif fd in self._attempts:
                    self._settle(fd)
                elif fd == self._news and self._follower is not None:
                    self._hear(self._follower)
                elif fd in self._clients:
                    self._requests(self._clients[fd])
            if self._look is not None:
                self._tell_listening(self._look)
            now = time.monotonic()
            for fd, attempt in list(self._attempts.items()):
                if attempt.deadline < now:
                    self._forget(fd)
                    self._answer(attempt, errno.ETIMEDOUT)

    def _timeout(self) -> float:
        if self._look is None:
            return 1.0 if self._attempts else -1
        if not self._look.cheap:
            return _LOOK_DEARLY_SECS
        return _LOOK_SECS if time.monotonic() < self._look_later else _LOOK_LATER_SECS

    def _tell_listening(self, look: Look) -> None:
        found = look.now()
        if found in (OPEN, LOOPBACK) and found != self._told:
            self._told = found
            self._control.send(b"listening " + found)
        if found == OPEN:
            look.close()
            self._look = None

    def _accept(self) -> bool:
        message, fds, _, _ = socket.recv_fds(self._control, 16, 4)
        for fd in fds:
            client = socket.socket(fileno=fd)
            client.setblocking(False)
            self._clients[fd] = client
            self._poll.register(fd, select.EPOLLIN)
        return bool(message)

    def _hear(self, follower: Follower) -> None:
        try:
            follower.news()
        except OSError as error:  # the next news try again; connections to the instance matter more than this process
            os.write(2, f"aether: the machine's new addresses could not be refused: {error}\n".encode())

    def _requests(self, client: socket.socket) -> None:
        while len(self._attempts) < _MAX_UNDER_WAY:
            try:
                number = client.recv(16)
            except BlockingIOError:
                return
            except OSError:
                number = b""
            if not number:
                del self._clients[client.fileno()]
                client.close()
                return
            self._next(Attempt(client, number), errno.ECONNREFUSED)

    def _next(self, attempt: Attempt, failure: int) -> None:
        while attempt.targets:
            family, host = attempt.targets.pop()
            try:
                sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            except OSError as error:
                failure = error.errno or errno.EIO
                continue
            number = sock.connect_ex((host, self._port))
            attempt.sock = sock
            if number == 0:
                self._answer(attempt, 0)
                return
            if number == errno.EINPROGRESS:
                number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if number == 0:
                    self._attempts[sock.fileno()] = attempt
                    self._poll.register(sock.fileno(), select.EPOLLOUT)
                    return
            sock.close()
            attempt.sock = None
            failure = number
        self._answer(attempt, errno.ECONNREFUSED if failure in _UNSURE else failure)

    def _settle(self, fd: int) -> None:
        attempt = self._attempts[fd]
        sock = attempt.sock
        assert sock is not None
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number == 0:
            self._poll.unregister(fd)
            del self._attempts[fd]
            self._answer(attempt, 0)
        else:
            self._forget(fd)
            self._next(attempt, number)

    def _forget(self, fd: int) -> None:
        attempt = self._attempts.pop(fd)
        self._poll.unregister(fd)
        if attempt.sock is not None:
            attempt.sock.close()
            attempt.sock = None

    def _answer(self, attempt: Attempt, number: int) -> None:
        message = attempt.number + struct.pack("=H", number)
        try:
            if attempt.sock is not None:
                socket.send_fds(attempt.client, [message], [attempt.sock.fileno()])
            else:
                attempt.client.send(message)
        except OSError:
            pass  # the asker went away or reads nothing; its own deadline tells it
        finally:
            if attempt.sock is not None:
                attempt.sock.close()
