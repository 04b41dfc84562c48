"""A backend: where its connections come from, those kept for reuse, and how many requests it has under way.

Which backend serves a request is the business of `table`; what goes over a connection that of `upstream`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

from aether.edge.head import HEAD_END, NO_RESPONSE, ResponseHead, parse_response
from aether.edge.upstream import UpstreamConnection

Dial = Callable[[], Awaitable[socket.socket]]


class EdgeBackend:
    """One upstream with its pool; implements `Backend` of the apps' ports. Used from one event loop only."""

    __slots__ = (
        "_dial",
        "_emptied",
        "_idle",
        "_on_drain",
        "deployment_id",
        "in_flight",
        "instance_id",
        "known",
        "name",
        "retired",
    )

    def __init__(self, name: str, dial: Dial, on_drain: Callable[[EdgeBackend], None]) -> None:
        self.name = name
        self.instance_id = self.deployment_id = ""
        """Of an app's instance: whose it is, for the access log."""
        self.in_flight = 0
        """Requests and tunnels under way, those still dialling included."""
        self.retired = False
        """Gets no new requests and keeps no idle connection."""
        self._dial = dial
        self._on_drain = on_drain
        self._idle: list[UpstreamConnection] = []
        self._emptied: asyncio.Event | None = None
        self.known = NO_RESPONSE
        """The head last parsed; a backend often gives the same one many times in a row."""

    @property
    def idle_connections(self) -> int:
        return len(self._idle)

    def take(self, now: float) -> UpstreamConnection | None:
        """The most recently used connection that is still good, or None. `now` is monotonic."""
        idle = self._idle
        while idle:
            connection = idle.pop()
            if connection.idle_until > now and not connection.closed:
                return connection
            connection.close()
        return None

    async def open(self) -> UpstreamConnection:
        """A fresh connection. Raises OSError."""
        sock = await self._dial()
        try:
            connection = UpstreamConnection(self, sock.recv)
            await asyncio.get_running_loop().create_connection(lambda: connection, sock=sock)
        except BaseException:
            sock.close()
            raise
        return connection

    def response_head(self, raw: bytes) -> ResponseHead:
        """The parsed head of an answer; `raw` includes its closing empty line. Raises HeadError."""
        if raw != self.known.raw:
            self.known = parse_response(raw[: -len(HEAD_END)])
        return self.known

    def give(self, connection: UpstreamConnection, pool_size: int) -> None:
        """Keep an unused connection for the next request."""
        if self.retired or len(self._idle) >= pool_size:
            connection.close()
        else:
            self._idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        """The connection has closed; it may or may not be in the pool."""
        if connection in self._idle:
            self._idle.remove(connection)

    def leave(self) -> None:
        """A request counted in `in_flight` is over."""
        self.in_flight -= 1
        if not self.in_flight and self._emptied is not None:
            self._emptied.set()

    def prune(self, now: float) -> None:
        """Close the connections that were idle for too long."""
        for connection in [c for c in self._idle if c.idle_until <= now]:
            self._idle.remove(connection)
            connection.close()

    def retire(self) -> None:
        """No more requests; idle connections close now, used ones after their request."""
        self.retired = True
        self.close_idle()

    def close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def drain(self, timeout_secs: float) -> bool:
        """Take no new requests; True when those under way ended in time."""
        self._on_drain(self)
        self.retire()
        if not self.in_flight:
            return True
        if self._emptied is None:
            self._emptied = asyncio.Event()
        self._emptied.clear()
        try:
            async with asyncio.timeout(timeout_secs):
                await self._emptied.wait()
        except TimeoutError:
            return not self.in_flight
        return True
