"""The edge as a whole: listeners, the clock that watches every connection, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Coroutine, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from aether.edge.downstream import ClientConnection
from aether.edge.handshake import TlsDoor
from aether.edge.headers import TraceParents
from aether.edge.options import EdgeCounters, EdgeOptions, RecordSink
from aether.edge.table import Entrance, RouteTable

if TYPE_CHECKING:
    from aether.edge.exchange import Exchange
    from aether.edge.functions import FunctionTable

_log: Final = logging.getLogger(__name__)
_BACKLOG: Final = 4096
_MIN_TICK, _MAX_TICK = 0.01, 1.0


class Edge:
    """The HTTP data path in front of apps and the API. Runs on the loop that calls `start`."""

    def __init__(
        self, table: RouteTable, options: EdgeOptions | None = None, on_record: RecordSink | None = None
    ) -> None:
        self.table = table
        self.options = options or EdgeOptions()
        self.on_record = on_record
        """Called once for every finished request, on the data path: it must be quick and must not raise."""
        self.on_access: RecordSink | None = None
        """Called after `on_record`, if that is set; for the access log."""
        self.functions: FunctionTable | None = None
        """Requests for `/functions/NAME` at the API's hosts go to its routes."""
        self.counters = EdgeCounters()
        self.traces = TraceParents()
        self.closing = False
        self.loop: asyncio.AbstractEventLoop
        self._servers: list[asyncio.Server] = []
        self._doors: list[TlsDoor] = []
        self._connections: set[ClientConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.TimerHandle | None = None
        self._all_gone: asyncio.Event | None = None
        self._tunnelled: set[ClientConnection] = set()
        self._drained: asyncio.Event | None = None

    async def start(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        sockets: Sequence[socket.socket] = (),
        tls: ssl.SSLContext | None = None,
        entrance: Entrance | None = None,
    ) -> int:
        """Listen on `host`:`port` (0 picks a free one) or on given `sockets`; returns the bound port.

        May be called again for further listeners; `entrance` is how they see the table. Raises OSError, for
        instance when the port is in use.
        """
        self.loop = asyncio.get_running_loop()
        bound = 0
        seen_by = entrance or self.table.entrance
        if tls is not None:
            listeners = list(sockets) or [_listener(host, port)]
            self._doors += [TlsDoor(self, seen_by, sock, tls) for sock in listeners]
            for door in self._doors[-len(listeners) :]:
                door.open()
            bound = int(listeners[0].getsockname()[1])
        elif sockets:
            connection = partial(ClientConnection, self, seen_by)
            for sock in sockets:
                server = await self.loop.create_server(connection, sock=sock, backlog=_BACKLOG)
                self._servers.append(server)
                if sock.family in (socket.AF_INET, socket.AF_INET6):
                    bound = bound or int(sock.getsockname()[1])
        else:
            connection = partial(ClientConnection, self, seen_by)
            server = await self.loop.create_server(connection, host, port, backlog=_BACKLOG)
            self._servers.append(server)
            bound = int(server.sockets[0].getsockname()[1])
        if self._ticker is None:
            self._tick()
        return bound

    async def close(self, drain_secs: float = 10.0) -> None:
        """Stop accepting, let requests under way end for `drain_secs`, drop the rest. Idempotent.

        Tunnels (WebSockets) have no end of their own to wait for: they go with the last request.
        """
        self.closing = True
        for server in self._servers:
            server.close()
        for door in self._doors:
            await door.close()
        for connection in list(self._connections):
            connection.close_if_idle()
        if self.functions is not None:
            self.functions.stop_waiting()
        self._all_gone, self._drained = asyncio.Event(), asyncio.Event()
        self._look_if_drained()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_secs):
                await self._drained.wait()
        for connection in list(self._connections):
            connection.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.table.close_idle()
        if self.functions is not None:
            self.functions.close_idle()
        if self._connections:
            await self._all_gone.wait()
        for server in self._servers:
            await server.wait_closed()
        self._servers.clear()
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        # closed transports tell their protocols in the next round of the loop
        await asyncio.sleep(0)

    @property
    def open_connections(self) -> int:
        return len(self._connections)

    # ---- for connections and exchanges

    def admit(self, connection: ClientConnection) -> bool:
        """Count a new connection in; False when there are too many."""
        self._connections.add(connection)
        counters = self.counters
        counters.connections += 1
        counters.accepted += 1
        if len(self._connections) > self.options.max_connections:
            counters.refused_connections += 1
            return False
        return True

    def leave(self, connection: ClientConnection) -> None:
        """Count a closed connection out; again is harmless."""
        if connection in self._connections:
            self._connections.remove(connection)
            self._tunnelled.discard(connection)
            self.counters.connections -= 1
            self._look_if_drained()
            if not self._connections and self._all_gone is not None:
                self._all_gone.set()

    def tunnelled(self, connection: ClientConnection) -> None:
        """The connection carries a tunnel from now on."""
        self._tunnelled.add(connection)
        self._look_if_drained()

    def _look_if_drained(self) -> None:
        if self._drained is not None and len(self._tunnelled) == len(self._connections):
            self._drained.set()

    def own_task(self, work: Coroutine[Any, Any, None], exchange: Exchange) -> asyncio.Task[None]:
        """Run a dial; the edge keeps the task and waits for it on close."""
        task = self.loop.create_task(work)
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.error("a dial failed unexpectedly", exc_info=error)
                exchange.dial_crashed()

        task.add_done_callback(done)
        return task

    def _tick(self) -> None:
        """Check every connection's clocks; one timer for all of them."""
        now = monotonic()
        for connection in list(self._connections):
            connection.check(now)
        self.table.prune(now)
        functions = self.functions
        if functions is not None:
            functions.prune(now)
        options = self.options
        shortest = min(
            options.header_timeout_secs,
            options.idle_timeout_secs,
            options.upstream_timeout_secs,
            options.stream_idle_secs,
            options.tunnel_idle_secs,
            options.pool_idle_secs,
            options.linger_secs,
            _MAX_TICK * 4 if functions is None else functions.shortest_timeout_secs,
        )
        self._ticker = self.loop.call_later(max(_MIN_TICK, min(_MAX_TICK, shortest / 4)), self._tick)


def _listener(host: str, port: int) -> socket.socket:
    sock = socket.create_server((host, port), backlog=_BACKLOG)
    sock.setblocking(False)
    return sock
