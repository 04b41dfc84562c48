"""Bytes both ways after a 101: back-pressure, half-close, and an end that both sides see."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Final

_HIGH_WATER: Final = 64 * 1024


class Tunnel:
    """Joins two transports until both directions have ended or one side broke; then calls `on_end` once."""

    __slots__ = ("_client", "_on_end", "_open", "_upstream", "bytes_in", "bytes_out", "half_closed", "seen")

    def __init__(
        self,
        client: asyncio.Transport,
        upstream: asyncio.Transport,
        on_end: Callable[[Tunnel], None],
    ) -> None:
        self._on_end = on_end
        self.seen = monotonic()
        self.half_closed = False
        """One side has said that it will send nothing more."""
        self.bytes_in = 0
        self.bytes_out = 0
        self._open = 2
        self._client = _Side(self, client, upstream, inbound=True)
        self._upstream = _Side(self, upstream, client, inbound=False)
        client.set_protocol(self._client)
        upstream.set_protocol(self._upstream)
        for transport, other in ((client, upstream), (upstream, client)):
            transport.set_write_buffer_limits(high=_HIGH_WATER)
            if not other.is_closing():
                # what was written before the switch may have stopped either side; start from a known state
                other.resume_reading()

    def abort(self) -> None:
        """Drop both sides at once."""
        self._client.transport.abort()
        self._upstream.transport.abort()

    def moved(self, size: int, *, inbound: bool) -> None:
        self.seen = monotonic()
        if inbound:
            self.bytes_in += size
        else:
            self.bytes_out += size

    def side_closed(self) -> None:
        self._open -= 1
        if not self._open:
            self._on_end(self)


class _Side(asyncio.Protocol):
    """Reads one transport and writes the other."""

    __slots__ = ("_inbound", "_other", "_tunnel", "finished", "transport")

    def __init__(
        self, tunnel: Tunnel, transport: asyncio.Transport, other: asyncio.Transport, *, inbound: bool
    ) -> None:
        self.transport = transport
        self._tunnel = tunnel
        self._other = other
        self._inbound = inbound
        self.finished = False

    def data_received(self, data: bytes) -> None:
        self._tunnel.moved(len(data), inbound=self._inbound)
        if not self._other.is_closing():
            self._other.write(data)

    def pause_writing(self) -> None:
        if not self._other.is_closing():
            self._other.pause_reading()

    def resume_writing(self) -> None:
        if not self._other.is_closing():
            self._other.resume_reading()

    def eof_received(self) -> bool:
        self.finished = True
        self._tunnel.half_closed = True
        if not self.transport.can_write_eof():
            # TLS knows no half-close: the end of one direction is that of both, and the transport closes by itself
            self._other.close()
            return False
        peer = self._other.get_protocol()
        if isinstance(peer, _Side) and peer.finished:
            # both directions are over: closing flushes what is still to be written
            self._other.close()
            return False
        if self._other.is_closing() or not self._other.can_write_eof():
            self._other.close()
            return False
        self._other.write_eof()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._other.abort()
        elif not self._other.is_closing():
            self._other.close()
        self._tunnel.side_closed()
