"""A started instance as the server holds it: two connections to its keeper, one for events, one for dialling."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from aether.model.instance import InstanceExit, InstanceSpec
from aether.runtimes.process.console import Attached, attach
from aether.runtimes.process.record import Record, init_of, keeper_of, settle
from aether.runtimes.process.shim.keeper import SOCKET
from aether.runtimes.process.shim.plan import NONE
from aether.runtimes.process.shim.processes import send

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_DIAL_SECS = 7.0
_DIALS_UNDER_WAY = 128
_KEEPER_SECS = 10.0
"""How long past the grace a keeper may take to report the end before it is taken for hung."""


def connect(folder: Path) -> socket.socket:
    """A non-blocking connection to the keeper of `folder`; the path may be longer than a socket address. OSError."""
    directory = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        sock.connect(f"/proc/self/fd/{directory}/{SOCKET}")
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(directory)
    return sock


class ProcessInstance:
    """Implements `Instance` for an instance kept by a keeper, running or ended."""

    def __init__(self, folder: Path, record: Record) -> None:
        self._folder = folder
        self._record = record
        self._events: socket.socket | None = None
        self._dials: DialLink | None = None
        self._slots = asyncio.Semaphore(_DIALS_UNDER_WAY)
        self._gone = asyncio.Event()
        self._settling = asyncio.Lock()
        self._exit: InstanceExit | None = None
        self._settled = False
        self._watchers: set[Callable[[], None]] = set()
        self.listens = asyncio.Event()
        """Set once the keeper says that the port is listened on, where it was asked to."""

    @property
    def spec(self) -> InstanceSpec:
        return self._record.spec

    @property
    def record(self) -> Record:
        return self._record

    @property
    def gone(self) -> bool:
        """Whether the keeper has left: nothing more will be logged."""
        return self._gone.is_set()

    def attach(self) -> None:
        """Subscribe to the keeper's events. Raises OSError when there is no keeper to talk to."""
        sock = connect(self._folder)
        sock.send(b"subscribe")
        self._events = sock
        asyncio.get_running_loop().add_reader(sock, self._hear)

    def detach(self) -> None:
        """Close the connections; the instance goes on."""
        if self._events is not None:
            asyncio.get_running_loop().remove_reader(self._events)
            self._events.close()
            self._events = None
        if self._dials is not None:
            self._dials.close()
            self._dials = None

    def mark_gone(self) -> None:
        """There is no keeper any more."""
        self.detach()
        self._gone.set()
        self._grown()

    def watch(self, grew: Callable[[], None]) -> None:
        """Call `grew` whenever the log may have grown and when the instance has ended."""
        self._watchers.add(grew)

    def unwatch(self, grew: Callable[[], None]) -> None:
        self._watchers.discard(grew)

    def _grown(self) -> None:
        for grew in tuple(self._watchers):
            grew()

    async def dial(self) -> socket.socket:
        if self._gone.is_set():
            raise ConnectionResetError(errno.ECONNRESET, "the instance has ended")
        async with self._slots:
            if self._record.kind == NONE:
                return await _dial_plain(self._record.port)
            link = self._link()
            try:
                return await link.dial()
            except (BrokenPipeError, ConnectionResetError) as error:
                if self._gone.is_set() or not (link.closed or isinstance(error, BrokenPipeError)):
                    raise
                link.close()
            # the dialer ended and the keeper starts another; nothing was sent to the app yet
            return await self._link().dial()

    def _link(self) -> DialLink:
        if self._dials is None or self._dials.closed:
            self._dials = DialLink(connect(self._folder))
        return self._dials

    async def listening_ports(self) -> Sequence[int]:
        if self._record.kind == NONE:
            return ()  # a plain child shares the machine's network with everybody
        return await asyncio.to_thread(_listening, init_of(self._folder))

    async def open_console(self) -> Attached:
        if self._gone.is_set():
            raise ConnectionResetError(errno.ECONNRESET, "the instance has ended")
        return await attach(connect(self._folder))

    def resize(self, rows: int, columns: int) -> None:
        self._say(b"window %d %d" % (rows, columns))

    def signal(self, number: int) -> None:
        self._say(b"signal %d" % number)

    def _say(self, message: bytes) -> None:
        if self._events is not None:
            with suppress(OSError):  # the keeper has just left, and its command with it
                self._events.send(message)

    async def wait(self) -> InstanceExit:
        await self._gone.wait()
        async with self._settling:
            if not self._settled:
                self._exit = await settle(self._folder, self._record.group, self._exit)
                self._settled = True
        assert self._exit is not None
        return self._exit

    async def stop(self, grace_secs: float) -> InstanceExit:
        if self._events is not None:
            try:
                self._events.send(b"stop %d" % max(0, int(grace_secs * 1000)))
            except OSError:
                return await self.wait()  # the keeper has just left
        try:
            async with asyncio.timeout(max(0.0, grace_secs) + _KEEPER_SECS):
                return await self.wait()
        except TimeoutError:
            # a keeper that does not answer is ended; the kernel ends the sandbox with it
            send(*keeper_of(self._folder), 9)
            return await self.wait()

    def _hear(self) -> None:
        while self._events is not None:
            try:
                message = self._events.recv(256)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if message == b"log":
                self._grown()
            elif message == b"listening open":
                self.listens.set()
            elif message.startswith(b"exited "):
                code, number, memory, *expired = message.decode().split()[1:]
                self._exit = InstanceExit(
                    None if code == "-" else int(code),
                    None if number == "-" else int(number),
                    memory == "1",
                    expired == ["1"],
                )
            elif not message:
                self.mark_gone()


def _listening(pid: int) -> list[int]:
    """Ports of the listening TCP sockets in the network view of `pid` (proc(5): state 0A in net/tcp and net/tcp6)."""
    found: set[int] = set()
    for name in ("tcp", "tcp6"):
        try:
            table = Path(f"/proc/{pid}/net/{name}").read_text()
        except OSError:
            continue
        rows = [line.split() for line in table.splitlines()[1:]]
        found |= {int(row[1].rsplit(":", 1)[1], 16) for row in rows if row[3] == "0A"}
    return sorted(found)


class DialLink:
    """One connection to a dialer, shared by all dials of an instance."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[socket.socket]] = {}
        self._next = 0
        self.closed = False
        sock.send(b"dial")
        self._loop.add_reader(sock, self._hear)

    async def dial(self) -> socket.socket:
        """See `Instance.dial`; raises TimeoutError (an OSError) when the dialer does not answer."""
        number = self._next = (self._next + 1) & 0xFFFFFFFF
        answer: asyncio.Future[socket.socket] = self._loop.create_future()
        self._waiting[number] = answer
        try:
            self._sock.send(struct.pack("=I", number))
            async with asyncio.timeout(_DIAL_SECS):
                return await answer
        except BaseException:  # cancelled or late: a connection that came all the same has no owner
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                answer.result().close()
            raise
        finally:
            self._waiting.pop(number, None)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock)
        self._sock.close()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ConnectionResetError(errno.ECONNRESET, "the instance has ended"))

    def _hear(self) -> None:
        while not self.closed:
            try:
                message, fds, _, _ = socket.recv_fds(self._sock, 64, 4)
            except BlockingIOError:
                return
            except OSError:
                message, fds = b"", []
            if not message:
                self.close()
                return
            number, failure = struct.unpack("=IH", message)
            answer = self._waiting.get(number)
            if answer is None or answer.done():
                for fd in fds:
                    os.close(fd)
            elif failure:
                # OSError picks the subclass, ConnectionRefusedError among them
                answer.set_exception(OSError(failure, os.strerror(failure)))
            else:
                sock = socket.socket(fileno=fds[0])
                sock.setblocking(False)
                answer.set_result(sock)


async def _dial_plain(port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    failure: OSError = ConnectionRefusedError(errno.ECONNREFUSED, "nothing listens")
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await loop.sock_connect(sock, (host, port))
        except OSError as error:
            sock.close()
            if isinstance(error, ConnectionRefusedError):
                failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure
