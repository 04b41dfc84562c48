"""One connection to an upstream: sends a request, reads and frames its answer, goes back to the pool.

What the answer means for the client is the business of `exchange`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Final, cast

from aether.edge.body import ChunkedDecoder, ChunkError
from aether.edge.express import relay_whole
from aether.edge.head import HEAD_END, NO_BODY
from aether.edge.lines import HeadError

if TYPE_CHECKING:
    from aether.edge.exchange import Exchange
    from aether.edge.pool import EdgeBackend

_MAX_HEAD: Final = 64 * 1024
_MAX_INTERIM: Final = 32
Peek = Callable[[int, int], bytes]
"""`socket.recv`: bytes wanted and flags."""

_NO_CHUNKS: Final = ChunkedDecoder()
_HEAD, _LENGTH, _CHUNKED, _TO_CLOSE = range(4)


class UpstreamConnection(asyncio.Protocol):
    """States: head (idle while there is no exchange) → body → head or closed."""

    __slots__ = (
        "_buffer",
        "_chunks",
        "_interim",
        "_keep_secs",
        "_left",
        "_peek",
        "_reusable",
        "_state",
        "backend",
        "closed",
        "exchange",
        "heard",
        "idle_until",
        "paused",
        "reused",
        "transport",
        "write_paused",
    )

    def __init__(self, backend: EdgeBackend, peek: Peek) -> None:
        self.backend = backend
        self.transport: asyncio.Transport
        self.closed = False
        self.reused = False
        """An earlier request was answered on it, so the upstream may be closing it for idleness."""
        self.heard = False
        """A byte of the present answer has come."""
        self.idle_until = 0.0
        self.write_paused = False
        self._peek = peek
        self.exchange: Exchange | None = None
        self._state = _HEAD
        self._buffer: bytes = b""
        self._left = 0
        self._interim = 0
        self._chunks = _NO_CHUNKS
        self._reusable = False
        self.paused = False
        self._keep_secs = 0.0

    def begin(self, exchange: Exchange, data: bytes) -> None:
        """Send a request (its head and what there is of its body) and give the answer to `exchange`."""
        self.exchange = exchange
        self.heard = False
        self.transport.write(data)

    def gone(self) -> bool:
        """True when the upstream has already closed; asks the kernel, for requests that must not be sent twice."""
        try:
            self._peek(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        self.closed = True
        self.exchange = None
        self.transport.close()

    def abort(self) -> None:
        """Drop the connection at once; its exchange hears nothing more."""
        self.closed = True
        self.exchange = None
        self.transport.abort()

    def release_to_tunnel(self) -> None:
        """The transport now belongs to a tunnel."""
        self.closed = True
        self.exchange = None

    def pause_reading(self) -> None:
        if not self.paused and not self.closed:
            self.paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self.paused and not self.closed:
            self.paused = False
            self.transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def pause_writing(self) -> None:
        self.write_paused = True
        if self.exchange is not None:
            self.exchange.client.update_reading()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.exchange is not None:
            self.exchange.client.update_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        exchange = self.exchange
        if exchange is None:
            self.backend.forget(self)
        elif self._state == _TO_CLOSE and exc is None:
            self._end(exchange, monotonic())
            exchange.answer_body(b"", True)
        else:
            self.exchange = None
            exchange.upstream_lost(self)

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            self.abort()
            return
        if not self.heard and exchange.head.plain and relay_whole(self, exchange, data):
            return
        state = self._state
        if state == _LENGTH:
            size = len(data)
            if size < self._left:
                self._left -= size
                exchange.answer_body(data, False)
            else:
                if size > self._left:
                    self._reusable = False
                    data = data[: self._left]
                self._end(exchange, monotonic())
                exchange.answer_body(data, True)
        elif state == _HEAD:
            self._take_head(exchange, data)
        elif state == _CHUNKED:
            decoded = self._decode(exchange, data)
            if decoded is not None:
                payload, ended = decoded
                if ended:
                    self._end(exchange, monotonic())
                if payload or ended:
                    exchange.answer_body(payload, ended)
        else:
            exchange.answer_body(data, False)

    def _take_head(self, exchange: Exchange, data: bytes) -> None:
        self.heard = True
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        while True:
            end = data.find(HEAD_END)
            if end < 0 or end > _MAX_HEAD:
                if len(data) > _MAX_HEAD:
                    self._fail(exchange, "the app's response head is too large")
                self._buffer = data
                return
            try:
                head = self.backend.response_head(data[: end + 4])
            except HeadError as error:
                self._fail(exchange, f"the app answered badly: {error.message}")
                return
            data = data[end + 4 :]
            if head.status >= 200:
                break
            if head.status == 101:
                exchange.switch(self, head, data)
                return
            self._interim += 1
            if self._interim > _MAX_INTERIM:
                self._fail(exchange, "the app sent too many interim responses")
                return
            exchange.interim(head)
            if not data:
                return
        now = monotonic()
        self._reusable = head.keep_alive
        self._keep_secs = min(exchange.pool_secs, head.idle_secs)
        ended = False
        if head.status == 204 or head.status == 304 or exchange.is_head:
            ended = True
            if data:
                self._reusable = False
                data = b""
        elif head.chunked:
            self._state = _CHUNKED
            self._chunks = ChunkedDecoder()
            decoded = self._decode(exchange, data)
            if decoded is None:
                return
            data, ended = decoded
        elif head.content_length != NO_BODY:
            self._state = _LENGTH
            self._left = head.content_length - len(data)
            if self._left <= 0:
                ended = True
                if self._left:
                    self._reusable = False
                    data = data[: head.content_length]
        else:
            self._state = _TO_CLOSE
            self._reusable = False
        if ended:
            self._end(exchange, now)
        exchange.answer(head, data, ended, now)

    def _decode(self, exchange: Exchange, data: bytes) -> tuple[bytes, bool] | None:
        """Payload of a chunked answer and whether it has ended; None when it is broken (and dealt with)."""
        chunks = self._chunks
        try:
            payload = chunks.feed(data)
        except ChunkError as error:
            self._fail(exchange, f"the app answered badly: {error}")
            return None
        if chunks.rest:
            self._reusable = False
        return payload, chunks.done

    def _fail(self, exchange: Exchange, message: str) -> None:
        self.abort()
        exchange.upstream_broke(self, message)

    def _end(self, exchange: Exchange, now: float) -> None:
        """The answer is complete: count the request out and keep or close the connection."""
        self.exchange = None
        self._state = _HEAD
        self._interim = 0
        if self.closed:
            return
        if self._reusable and exchange.upload_done and not self.write_paused:
            if self.paused:
                self.resume_reading()
            self.reused = True
            self.idle_until = now + self._keep_secs
            self.backend.give(self, exchange.pool_size)
        else:
            self.close()
