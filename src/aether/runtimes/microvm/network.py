"""The network of one machine: a namespace of its own that holds a TAP and loopback, and nothing that leads anywhere.

Every machine has the same addresses inside. From it one can reach the two listeners that are made here, the metadata
service and the line to /init, and no host, no other machine and no private range: there is no route, no bridge and no
forwarding that would have to be forbidden. Inward, the host opens sockets inside of the namespace: requests need no
hop through a bridge and no translation of addresses.

The namespace has no name and no process: it is gone when the last descriptor of it is, also after kill -9.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from struct import pack
from typing import TypeVar

from aether.model.errors import ServiceUnavailable

GUEST_ADDRESS, HOST_ADDRESS, METADATA_ADDRESS = "172.16.0.2", "172.16.0.1", "169.254.169.254"
GUEST_MAC, HOST_MAC = "06:00:ac:10:00:02", "06:00:ac:10:00:01"
METADATA_PORT, CONTROL_PORT = 80, 81
TAP = "tap0"

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x400454CA, 0x2, 0x1000, 0x4000
_TUNSETPERSIST, _TUNSETOWNER, _TUNSETGROUP = 0x400454CB, 0x400454CC, 0x400454CE
_SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFFLAGS, _SIOCSIFHWADDR, _SIOCSARP = 0x8916, 0x891C, 0x8914, 0x8924, 0x8955
_IFF_UP, _ARPHRD_ETHER, _ATF_COM, _ATF_PERM = 0x1, 1, 0x2, 0x4
Made = TypeVar("Made")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Network:
    """Descriptors of a machine's network; `tap` goes to the monitor, or is -1 when the monitor opens it by its name.
    Close it when the machine is gone."""

    namespace: int
    tap: int
    metadata: socket.socket | None
    """None when the monitor serves metadata itself."""
    control: socket.socket

    def close(self) -> None:
        self.close_tap()
        if self.metadata is not None:
            self.metadata.close()
        self.control.close()
        if self.namespace >= 0:
            os.close(self.namespace)
            self.namespace = -1

    def close_tap(self) -> None:
        """Once the monitor has it, it must end with the monitor."""
        if self.tap >= 0:
            os.close(self.tap)
            self.tap = -1

    async def connect(self, port: int) -> socket.socket:
        """A connected, non-blocking socket to the guest. Raises OSError."""
        if self.namespace < 0:
            raise ConnectionRefusedError("the machine's network is gone")
        made = inside(self.namespace, _new_socket)
        try:
            await asyncio.get_running_loop().sock_connect(made, (GUEST_ADDRESS, port))
        except BaseException:
            made.close()
            raise
        return made


def make_network(owner: int | None = None) -> Network:
    """A new network. Blocks for some milliseconds. Raises ServiceUnavailable without the right to make one.

    With `owner`, the TAP stays for a monitor that runs as that user and group and opens it by its name, and there is
    no metadata service."""
    made: list[Network | BaseException] = []

    def make() -> None:
        # in a thread of its own: the thread stays in the namespace until it ends
        try:
            made.append(_make(owner))
        except BaseException as error:  # noqa: BLE001 (raised by the caller's thread)
            made.append(error)

    thread = threading.Thread(target=make, name="aether-network")
    thread.start()
    thread.join()
    found = made[0]
    if isinstance(found, PermissionError | FileNotFoundError):
        raise ServiceUnavailable(
            f"microVMs cannot have a network here ({found}): they need root and /dev/net/tun"
        ) from found
    if isinstance(found, BaseException):
        raise found
    return found


def inside(namespace: int, make: Callable[[], Made]) -> Made:
    """What `make` makes in `namespace`, a socket or a process; it stays there. Raises OSError.

    `make` runs in this thread, blocks it, and must not await.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(namespace)
        try:
            return make()
        finally:
            try:
                _enter(home)
            except OSError:
                os.abort()  # a server that goes on in a guest's network would serve the guest's
    finally:
        os.close(home)


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET) != 0:
        _fail()


def _make(owner: int | None) -> Network:
    if _libc.unshare(_CLONE_NEWNET) != 0:
        _fail()
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    sockets: list[socket.socket] = []
    try:
        fcntl.ioctl(tap, _TUNSETIFF, pack("16sH22x", TAP.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
            _request(handle, _SIOCSIFHWADDR, TAP, pack("H14s", _ARPHRD_ETHER, _mac(HOST_MAC)))
            _address(handle, "lo", "127.0.0.1", "255.0.0.0")
            if owner is None:
                _address(handle, "lo:1", METADATA_ADDRESS, "255.255.255.255")
            _address(handle, TAP, HOST_ADDRESS, "255.255.255.0")
            fcntl.ioctl(
                handle,
                _SIOCSARP,
                _internet(GUEST_ADDRESS)
                + pack("H14s", _ARPHRD_ETHER, _mac(GUEST_MAC))
                + pack("i", _ATF_COM | _ATF_PERM)
                + bytes(16)
                + TAP.encode().ljust(16, b"\0"),
            )
        listening = [(HOST_ADDRESS, CONTROL_PORT)]
        if owner is None:
            listening.append((METADATA_ADDRESS, METADATA_PORT))
        for address, port in listening:
            sockets.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            sockets[-1].setblocking(False)
            sockets[-1].bind((address, port))
            sockets[-1].listen(8)
        if owner is not None:
            fcntl.ioctl(tap, _TUNSETOWNER, owner)
            fcntl.ioctl(tap, _TUNSETGROUP, owner)
            fcntl.ioctl(tap, _TUNSETPERSIST, 1)
            os.close(tap)
            tap = -1
        namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except BaseException:
        if tap >= 0:
            os.close(tap)
        for item in sockets:
            item.close()
        raise
    return Network(namespace, tap, sockets[1] if owner is None else None, sockets[0])


def _new_socket() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _address(handle: socket.socket, name: str, address: str, mask: str) -> None:
    _request(handle, _SIOCSIFADDR, name, _internet(address))
    _request(handle, _SIOCSIFNETMASK, name, _internet(mask))
    _request(handle, _SIOCSIFFLAGS, name, pack("H", _IFF_UP))


def _request(handle: socket.socket, number: int, name: str, value: bytes) -> None:
    fcntl.ioctl(handle, number, name.encode().ljust(16, b"\0") + value.ljust(24, b"\0"))


def _internet(address: str) -> bytes:
    return pack("H2x", socket.AF_INET) + socket.inet_aton(address) + bytes(8)


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", "")).ljust(14, b"\0")


def _fail() -> None:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code))
