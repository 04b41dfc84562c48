"""One client connection: reads request heads and bodies in order, keeps the clocks of reading, closes politely.

What happens with a request is the business of `exchange`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from time import monotonic
from typing import TYPE_CHECKING, Final, cast

from aether.edge.body import ChunkedDecoder, ChunkError
from aether.edge.errors import error_response
from aether.edge.exchange import Exchange
from aether.edge.familiar import MAX_FAMILIAR, learn, recall
from aether.edge.head import HEAD_END, NO_REQUEST, RequestHead, parse_request
from aether.edge.headers import forwarded_prefix, upstream_start
from aether.edge.lines import HeadError, has_stray_control

if TYPE_CHECKING:
    from aether.edge.server import Edge
    from aether.edge.table import Entrance

_HEAD, _LENGTH, _CHUNKED, _WAIT, _LINGER, _CLOSED = range(6)
_BODY: Final = (_LENGTH, _CHUNKED)
_MAX_LINGER_BYTES: Final = 8 * 1024 * 1024
_HIGH_WATER: Final = 64 * 1024
_STRANGE: Final = 16
"""After so many heads in a row that are not familiar, a connection asks of one in so many whether it is."""


class ClientConnection(asyncio.Protocol):
    """States: head → (body by length or chunks) → wait for the answer → head …; linger and closed at the end.

    Bytes of the next request (pipelining) wait in `_pending`, and reading stops, until the answer is out.
    """

    __slots__ = (
        "_chunks",
        "_head_since",
        "_last",
        "_last_head",
        "_left",
        "_lingered",
        "_max_familiar",
        "_pending",
        "_reading",
        "_seen",
        "_state",
        "_strange",
        "_stuck_bytes",
        "address",
        "edge",
        "entrance",
        "exchange",
        "forwarded",
        "transport",
        "write_paused",
    )

    def __init__(self, edge: Edge, entrance: Entrance | None = None) -> None:
        self.edge = edge
        self.entrance = entrance or edge.table.entrance
        self.transport: asyncio.Transport
        self.address = b""
        self.forwarded = b""
        self.write_paused = False
        self.exchange = Exchange(self)
        self._state = _HEAD
        self._pending = b""
        self._left = 0
        self._chunks: ChunkedDecoder | None = None
        self._head_since = 0.0
        self._reading = True
        self._seen = monotonic()
        self._last = b""
        self._last_head = NO_REQUEST
        self._max_familiar = min(MAX_FAMILIAR, edge.options.max_head_bytes)
        self._strange = 0
        self._lingered = 0
        self._stuck_bytes = 0

    # ---- what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=_HIGH_WATER)
        peer: tuple[str, int] | str | None = transport.get_extra_info("peername")
        address = peer[0].partition("%")[0] if isinstance(peer, tuple) else "127.0.0.1"
        self.address = address.encode("ascii")
        self.forwarded = forwarded_prefix(address, b"https" if transport.get_extra_info("sslcontext") else b"http")
        if not self.edge.admit(self):
            self._refuse(503, "the edge has too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        self._state = _CLOSED
        self.edge.leave(self)
        self.exchange.client_gone()

    def eof_received(self) -> bool:
        # a client that half-closes has left: only tunnels go on one way, and they have a protocol of their own
        return False

    def pause_writing(self) -> None:
        self.write_paused = True
        self.exchange.client_writable(False)

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.exchange.active:
            self.exchange.client_writable(True)
        elif self._state == _HEAD:
            self._next_request()

    def data_received(self, data: bytes) -> None:
        self._seen = now = monotonic()
        state = self._state
        if data == self._last and state == _HEAD and not self._pending:
            self._state = _WAIT
            self.exchange.begin(self._last_head, b"", True, now)
        elif state == _HEAD:
            if self._pending:
                self._take_head(self._pending + data)
            elif (
                (self._strange < _STRANGE or not self._strange % _STRANGE)
                and len(data) <= self._max_familiar
                and (head := recall(data, self.forwarded)) is not None
            ):
                self._strange = 0
                self._last = data
                self._last_head = head
                self._state = _WAIT
                self.exchange.begin(head, b"", True, now)
            else:
                self._strange += 1
                self._take_head(data)
        elif state in _BODY:
            self.exchange.seen = self._seen
            self._take_body(data)
        elif state == _WAIT:
            self._pending += data
            self.update_reading()
        elif state == _LINGER:
            self._lingered += len(data)
            if self._lingered > _MAX_LINGER_BYTES:
                self.transport.abort()

    # ---- reading

    def _take_head(self, data: bytes) -> None:
        options = self.edge.options
        if data[0] == 0x0D and data[:2] == b"\r\n":
            # one empty line before a request is ignored (RFC 9112 section 2.2)
            data = data[2:]
        end = data.find(HEAD_END)
        if end < 0 or end > options.max_head_bytes:
            self._partial_head(data, options.max_head_bytes)
            return
        self._head_since = 0.0
        try:
            head = parse_request(data, end)
        except HeadError as error:
            self._refuse(400, error.message)
            return
        if len(data) > end + 4:
            rest = data[end + 4 :]
        else:
            rest = b""
            if head.plain and len(data) <= self._max_familiar:
                self._remember(data, head)
        self._pending = b""
        exchange = self.exchange
        if head.chunked:
            self._state = _CHUNKED
            self._chunks = ChunkedDecoder()
            try:
                payload = self._chunks.feed(rest) if rest else b""
            except ChunkError as error:
                self._refuse(400, str(error))
                return
            complete = self._chunks.done
            rest = self._chunks.rest
        elif head.content_length > 0:
            self._left = head.content_length
            payload = rest[: self._left]
            self._left -= len(payload)
            complete = not self._left
            rest = rest[len(payload) :]
            self._state = _LENGTH
        else:
            payload = b""
            complete = True
        if complete:
            self._state = _WAIT
            self._pending = rest
        exchange.begin(head, payload, complete, self._seen)
        if (rest or not complete) and exchange.active:
            self.update_reading()

    def _remember(self, data: bytes, head: RequestHead) -> None:
        """Keep a plain request: clients often send the same again, and then it need not be parsed.

        What `begin` gets of it is all there is to know, the same each time; nothing of it is shared with others.
        """
        if self._strange <= _STRANGE or self._strange % _STRANGE == 1:
            learn(data, head)
        if not head.start:
            head.start = upstream_start(head, self.forwarded)
        self._last = data
        self._last_head = head

    def _partial_head(self, data: bytes, limit: int) -> None:
        if has_stray_control(data[: limit + 1]):
            self._refuse(400, "the request head has a bare CR, a bare LF or a NUL byte")
        elif len(data) > limit:
            self._refuse(431, f"the request head is larger than the limit of {limit} bytes")
        else:
            self._pending = data
            if data and not self._head_since:
                self._head_since = monotonic()

    def _take_body(self, data: bytes) -> None:
        if self._chunks is not None and self._state == _CHUNKED:
            try:
                payload = self._chunks.feed(data)
            except ChunkError as error:
                self._break_upload(str(error))
                return
            complete = self._chunks.done
            rest = self._chunks.rest
            if not payload and not complete:
                return
        else:
            payload = data[: self._left]
            self._left -= len(payload)
            complete = not self._left
            rest = data[len(payload) :]
        if complete:
            self._state = _WAIT
            self._chunks = None
            self._pending = rest
        self.exchange.upload(payload, complete=complete)
        if (rest or not complete) and self.exchange.active:
            self.update_reading()

    def _break_upload(self, message: str) -> None:
        self.exchange.fail(400, message)

    def update_reading(self) -> None:
        """Read on or stop, by what is waiting: a pipelined request, a full upstream, an unfinished dial."""
        state = self._state
        if state == _WAIT:
            wanted = not self._pending
        elif state in _BODY:
            wanted = not self.exchange.upload_blocked
        else:
            wanted = True
        self._set_reading(wanted)

    def _set_reading(self, wanted: bool) -> None:
        if wanted != self._reading and not self.transport.is_closing():
            self._reading = wanted
            if wanted:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    def take_pending(self) -> bytes:
        """What the client sent after its request; for a tunnel."""
        pending, self._pending = self._pending, b""
        self._state = _CLOSED
        return pending

    # ---- ends of requests and of the connection

    def exchange_done(self, keep_alive: bool) -> None:
        """The answer has been written."""
        if self._state == _CLOSED:
            return
        if not keep_alive or self.edge.closing:
            self._finish(unread=self._state != _WAIT)
            return
        self._state = _HEAD
        if self._pending or not self._reading:
            # deferred, so that a long pipeline of quick answers does not nest
            self.edge.loop.call_soon(self._next_request)

    def _next_request(self) -> None:
        """Take the pipelined bytes, but not while the client leaves earlier answers unread."""
        if self._state != _HEAD or self.exchange.active:
            return
        if self.write_paused:
            self._set_reading(False)
            return
        if self._pending:
            self._seen = monotonic()
            self._take_head(self._pending)
        if self._state == _HEAD:
            self._set_reading(True)

    def _refuse(self, status: int, message: str) -> None:
        """Answer bytes that are no request, and close."""
        self._pending = b""
        trace = self.edge.traces.unused()
        errors = self.edge.counters.errors
        errors[status] = errors.get(status, 0) + 1
        self.transport.write(error_response(status, message, trace, trace, close=True))
        self._finish(unread=True)

    def _finish(self, *, unread: bool) -> None:
        """Close after what is written; with `unread` input first take it in, so that no reset eats the answer."""
        self._pending = b""
        self._head_since = 0.0
        self._seen = monotonic()
        if unread and self.transport.can_write_eof():
            self._state = _LINGER
            self._head_since = self._seen  # lingering has an end however much still comes
            self.transport.write_eof()
            self._set_reading(True)
        else:
            self._state = _CLOSED
            self.transport.close()

    def cut_off(self, *, reset: bool) -> None:
        """Close in the middle of an answer; `reset` when the client could take a plain close for its end."""
        self._state = _CLOSED
        self._seen = monotonic()
        if reset:
            sock = self.transport.get_extra_info("socket")
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        else:
            self.transport.close()

    def forget(self) -> None:
        """The tunnel that took over this connection has ended."""
        self.edge.leave(self)

    def abort(self) -> None:
        """Drop the connection and what goes over it."""
        self._state = _CLOSED
        self.exchange.abort()
        self.transport.abort()

    def close_if_idle(self) -> None:
        """Close unless a request is under way or has begun to come; then it is closed after its answer."""
        if self._state == _HEAD and not self._pending:
            self._state = _CLOSED
            self.transport.close()

    def check(self, now: float) -> None:
        """Look at the clocks (loop time) and act on what is overdue."""
        options = self.edge.options
        if self.write_paused:
            # a client that reads slowly is alive as long as its buffer moves
            stuck = self.transport.get_write_buffer_size()
            if stuck != self._stuck_bytes:
                self._stuck_bytes = stuck
                self._seen = self.exchange.seen = now
        if self.exchange.active:
            if not self.exchange.check(now):
                self.abort()
        elif self._state == _HEAD:
            if self._head_since and now - self._head_since > options.header_timeout_secs:
                self._refuse(408, "the request head did not come in time")
            elif now - self._seen > options.idle_timeout_secs:
                self.transport.abort()
        elif self._state == _LINGER:
            if now - self._head_since > options.linger_secs:
                self.transport.abort()
        elif now - self._seen > options.linger_secs and self.write_paused:
            self.transport.abort()
