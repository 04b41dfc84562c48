"""A TCP proxy that does to connections what networks do: cuts them, refuses them, slows them down."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from support.product import free_port

_BLOCK = 65_536


class Cutter:
    """Forwards `address` to `target` (host, port). `sent` counts the bytes that clients have sent through it."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.port = free_port()
        self.sent = 0
        self.received = 0
        self.rate = 0
        """Bytes a second that each client may send; 0: any. It holds for connections that are made from now on."""
        self._until = 0.0
        self._listener: socket.socket | None = None
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._events: list[tuple[str, int, Callable[[], None]]] = []
        self.up()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    # --- what a test does to it

    def up(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(256)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections, and cut those that are open."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.cut()

    def away(self, secs: float) -> threading.Timer:
        """Down now, up again later by itself."""
        self.down()
        timer = threading.Timer(secs, self.up)
        timer.daemon = True
        timer.start()
        return timer

    def hold(self, secs: float) -> None:
        """What clients send from now on goes on only that much later."""
        self._until = time.monotonic() + secs

    def cut(self) -> None:
        """Reset every connection, both ways."""
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def once_sent(self, count: int, act: Callable[[], None]) -> None:
        """Do something as soon as clients have sent so many bytes more."""
        with self._lock:
            self._events.append(("sent", self.sent + count, act))

    def once_received(self, count: int, act: Callable[[], None]) -> None:
        """Do something as soon as so many bytes more went to clients."""
        with self._lock:
            self._events.append(("received", self.received + count, act))

    def wait_sent(self, count: int, secs: float = 60.0) -> None:
        """Until clients have sent so many bytes more."""
        there = threading.Event()
        self.once_sent(count, there.set)
        assert there.wait(secs), f"{count} bytes did not come in {secs} s"

    # --- threads

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self.target, 10)
                server.settimeout(None)
            except OSError:
                client.close()
                continue
            pair = (client, server)
            with self._lock:
                self._pairs.add(pair)
            for source, sink, name in ((client, server, "sent"), (server, client, "received")):
                rate = self.rate if name == "sent" else 0
                threading.Thread(target=self._pump, args=(source, sink, name, pair, rate), daemon=True).start()

    def _pump(
        self,
        source: socket.socket,
        sink: socket.socket,
        name: str,
        pair: tuple[socket.socket, socket.socket],
        rate: int,
    ) -> None:
        try:
            while data := source.recv(_BLOCK):
                if name == "sent" and (left := self._until - time.monotonic()) > 0:
                    time.sleep(left)
                sink.sendall(data)
                self._count(name, len(data))
                if rate:
                    time.sleep(len(data) / rate)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._end(pair)
            return
        if name == "received":
            self._end(pair)

    def _end(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._lock:
            self._pairs.discard(pair)
        for end in pair:
            # a close alone neither wakes the other pump nor tells the peer: the kernel keeps what is being read from
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _count(self, name: str, size: int) -> None:
        with self._lock:
            setattr(self, name, getattr(self, name) + size)
            due = [event for event in self._events if event[0] == name and getattr(self, name) >= event[1]]
            self._events = [event for event in self._events if event not in due]
        for _, _, act in due:
            act()


@contextmanager
def cutter(target: tuple[str, int]) -> Iterator[Cutter]:
    it = Cutter(target)
    try:
        yield it
    finally:
        it.down()
