"""One request and its answer: routing, sending it upstream (again if that is safe), relaying the answer, the record.

A client connection has one exchange and uses it for its requests one after the other. Reading the request is the
business of `downstream`, framing the answer that of `upstream`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Final

from aether.edge.body import LAST_CHUNK, encode_chunk
from aether.edge.errors import error_response, redirect_response, text_response
from aether.edge.functions import FUNCTIONS, FunctionRoute, NoRoom, retargeted
from aether.edge.head import HEAD_END, NO_BODY, NO_REQUEST, RequestHead, ResponseHead
from aether.edge.headers import (
    client_response,
    interim_response,
    switching_response,
    trace_id,
    traced_request,
    upstream_request,
    upstream_start,
)
from aether.edge.options import RequestRecord, new_record
from aether.edge.pool import EdgeBackend
from aether.edge.table import Entrance, Route
from aether.edge.tunnel import Tunnel
from aether.edge.upstream import UpstreamConnection

if TYPE_CHECKING:
    from aether.edge.downstream import ClientConnection

_IDEMPOTENT: Final = frozenset((b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE"))
_MAX_REPLAYS: Final = 1
"""A request that ends its instance ends at most one more."""


class Exchange:
    """States: unused → begun (dialling or sent) → answering → unused; `active` from begin to done."""

    __slots__ = (
        "_answer_length",
        "_backend",
        "_bytes_in",
        "_encode",
        "_held",
        "_keep_alive",
        "_replay",
        "_replays",
        "_retry_after_secs",
        "_route",
        "_started_at",
        "_task",
        "_trace",
        "_tunnel",
        "active",
        "answering",
        "bytes_out",
        "client",
        "ending",
        "head",
        "is_head",
        "pool_secs",
        "pool_size",
        "request_id",
        "seen",
        "sent_at",
        "status",
        "upload_done",
        "upstream",
        "upstream_secs",
    )

    def __init__(self, client: ClientConnection) -> None:
        self.client = client
        self.active = False
        self.answering = False
        """The head of the answer has been sent."""
        self.is_head = False
        self.upload_done = True
        self.status = 0
        self.seen = 0.0
        """Loop time of the last sign of life of either side."""
        self.pool_size = client.edge.options.pool_size
        self.pool_secs = client.edge.options.pool_idle_secs
        self.head = NO_REQUEST
        self.ending = HEAD_END
        """What ends the head of the answer: an empty line, for some hosts with a field before it."""
        self._route: Route | None = None
        self._backend: EdgeBackend | None = None
        self.upstream: UpstreamConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._tunnel: Tunnel | None = None
        self._replay: bytes | None = None
        self._replays = 0
        self._retry_after_secs = 1
        self._held: list[bytes] = []
        self._encode = False
        self._keep_alive = True
        self._bytes_in = self.bytes_out = 0
        self._started_at = self.sent_at = self.upstream_secs = 0.0
        self.request_id = self._trace = b""
        self._answer_length = NO_BODY

    # ---- the request

    def begin(self, head: RequestHead, body: bytes, complete: bool, now: float) -> None:
        """Take a request; `body` is the payload that came with the head, `complete` when that was all of it."""
        client = self.client
        edge = client.edge
        self.head = head
        self.active = True
        self.answering = False
        self.upload_done = complete
        self.is_head = head.method == b"HEAD"
        self._started_at = self.seen = now
        self._bytes_in = len(body)
        self._replays = 0
        counters = edge.counters
        counters.requests += 1
        if head.plain:
            traces = edge.traces
            self.request_id = self._trace = request_id = traces.new_id()
            data = traced_request(head.start or upstream_start(head, client.forwarded), request_id, traces.tail)
        else:
            traces = edge.traces
            self._trace = trace = traces.continued(head.traceparent) if head.traceparent else traces.new()
            self.request_id = request_id = head.request_id or trace_id(trace)
            if head.for_api and _leads_to_api(client.entrance, head):
                head.lines.extend(head.for_api)
            data = upstream_request(upstream_start(head, client.forwarded), request_id, trace)
        entrance = client.entrance
        if entrance.strict:
            self.ending = entrance.ending(head.host)
        self._route = route = entrance.found.get(head.host) or entrance.find(head.host)
        if route is None:
            self.fail(404, f"no app answers to the host '{head.host.decode('ascii')}'")
            return
        if route.app is None and edge.functions is not None and head.target.startswith(FUNCTIONS):
            found, target, name = edge.functions.enter(head.target)
            if route.backends:  # else the client is sent on
                if found is None:
                    self.fail(404, f"there is no function '{name[:80].decode('ascii')}'")
                    return
                self._route = route = found
                data = retargeted(data, head.method, head.target, target)
        if head.plain:
            self._replay = data
        elif complete and not body and not head.chunked:
            self._replay = data if head.method in _IDEMPOTENT else None
        else:
            limit = edge.options.max_body_bytes
            if limit and route.app is not None and (head.content_length > limit or len(body) > limit):
                self.fail(413, f"the request body is larger than the limit of {limit} bytes")
                return
            data += self._coded(body, complete)
            self._replay = data if complete and head.method in _IDEMPOTENT else None
        self._attempt(route, data, now)

    def upload(self, payload: bytes, *, complete: bool) -> None:
        """More of the request's body."""
        self._bytes_in += len(payload)
        limit = self.client.edge.options.max_body_bytes
        if limit and self._bytes_in > limit and self._route is not None and self._route.app is not None:
            self.fail(413, f"the request body is larger than the limit of {limit} bytes")
            return
        data = self._coded(payload, complete)
        upstream = self.upstream
        if upstream is None:
            if self._task is not None:
                self._held.append(data)
        elif not upstream.closed and data:
            upstream.transport.write(data)
        self.upload_done = complete

    @property
    def upload_blocked(self) -> bool:
        """The client should not be read further: nobody takes the bytes yet."""
        upstream = self.upstream
        if upstream is None:
            return self._task is not None and not self.upload_done
        return upstream.write_paused

    def _coded(self, payload: bytes, complete: bool) -> bytes:
        if not self.head.chunked:
            return payload
        data = encode_chunk(payload) if payload else b""
        return data + LAST_CHUNK if complete else data

    def _attempt(self, route: Route, data: bytes, now: float) -> None:
        """Send on a pooled connection of the chosen backend, or dial one; dial for a request that is sent again,
        so that it does not meet another connection that has just ended."""
        backend = route.pick()
        if backend is None and isinstance(route, FunctionRoute):
            self._held = [data]
            self._task = self.client.edge.own_task(self._wait(route), self)
            return
        if backend is None:
            self.fail(503, "the app has no running instance; it may be starting")
            return
        backend.in_flight += 1
        self._backend = backend
        upstream = self._pooled(backend, now)
        if upstream is None:
            self._held = [data]
            self._task = self.client.edge.own_task(self._dial(backend), self)
        else:
            self.upstream = upstream
            self.sent_at = now
            upstream.begin(self, data)

    def _pooled(self, backend: EdgeBackend, now: float) -> UpstreamConnection | None:
        upstream = None if self._replays else backend.take(now)
        if self._replay is None:
            while upstream is not None and upstream.gone():
                upstream.close()
                upstream = backend.take(now)
        return upstream

    async def _wait(self, route: FunctionRoute) -> None:
        """Send the request once an instance of the function has room."""
        backend = await self._room(route)
        if backend is None:
            return
        upstream = self._pooled(backend, monotonic())
        if upstream is None:
            await self._dial(backend)
        else:
            self._send_held(upstream)

    async def _room(self, route: FunctionRoute) -> EdgeBackend | None:
        """A backend with the request counted in; None when it has been answered because there is none."""
        try:
            backend = await route.room(self.request_id, self._started_at + route.wait_secs)
        except NoRoom as refused:
            self._task = None
            self._retry_after_secs = refused.retry_after_secs
            self.fail(refused.status, refused.message)
            return None
        self._backend = backend
        return backend

    def _send_held(self, upstream: UpstreamConnection) -> None:
        """What was held back while there was no connection goes out."""
        self._task = None
        self.seen = monotonic()
        held, self._held = self._held, []
        self.upstream = upstream
        self.sent_at = self.seen
        upstream.begin(self, b"".join(held))
        self.client.update_reading()

    async def _dial(self, backend: EdgeBackend) -> None:
        """Connect to `backend`, or while that fails to another one: nothing has been sent yet."""
        edge = self.client.edge
        tried: set[EdgeBackend] = set()
        while True:
            try:
                async with asyncio.timeout(edge.options.connect_timeout_secs):
                    edge.counters.dials += 1
                    upstream = await backend.open()
                break
            except (OSError, TimeoutError) as error:
                edge.counters.dial_failures += 1
                tried.add(backend)
                route = self._route
                if isinstance(route, FunctionRoute):
                    route.unreachable(backend)
                self._leave_backend()
                other = None if route is None else route.pick(tried)
                if other is None and isinstance(route, FunctionRoute):
                    other = await self._room(route)
                    if other is None:
                        return
                    backend = other
                    continue
                if other is None:
                    self._task = None
                    self._cannot_dial(error)
                    return
                backend = other
                backend.in_flight += 1
                self._backend = backend
        self._send_held(upstream)

    def _cannot_dial(self, error: OSError | TimeoutError) -> None:
        if isinstance(error, TimeoutError):
            self.fail(504, f"no instance of {self._whom()} accepted a connection in time")
        elif self._route is not None and not self._route.backends:
            self.fail(503, "the app has no running instance; it may be starting")
        else:
            self.fail(502, f"no instance of {self._whom()} accepts connections")

    def _whom(self) -> str:
        return "the function" if isinstance(self._route, FunctionRoute) else "the app"

    def dial_crashed(self) -> None:
        """A driver raised something that `dial` does not promise."""
        self._task = None
        if self.active:
            self.fail(502, f"the instance of {self._whom()} cannot be reached")

    # ---- the answer

    def interim(self, head: ResponseHead) -> None:
        """A 1xx head other than 101."""
        self.seen = monotonic()
        if self.head.minor and (head.status != 100 or self.head.expect_continue):
            self.client.transport.write(interim_response(head))

    def answer(self, head: ResponseHead, body: bytes, ended: bool, now: float) -> None:
        """The final head and the payload that came with it."""
        client = self.client
        request = self.head
        self.seen = now
        self.upstream_secs = now - self.sent_at
        self.answering = True
        self.status = status = head.status
        self.bytes_out = len(body)
        self._answer_length = length = head.content_length
        self._encode = False
        keep_alive = request.keep_alive
        if client.edge.closing or (ended and not self.upload_done) or request.upgrade:
            keep_alive = False
        if length != NO_BODY or status == 204 or status == 304 or request.method == b"HEAD":
            framing = b""
        elif request.minor:
            self._encode = True
            framing = b"Transfer-Encoding: chunked\r\n"
            if body:
                body = encode_chunk(body)
            if ended:
                body += LAST_CHUNK
        else:
            keep_alive = False
            framing = b""
        if not keep_alive:
            framing += b"Connection: close\r\n"
        elif not request.minor:
            framing += b"Connection: keep-alive\r\n"
        self._keep_alive = keep_alive
        if ended:
            # the connection is back in the pool: a full send buffer must not stop its reading any more
            self.upstream = None
        client.transport.write(client_response(head, self.request_id, framing, self.ending) + body)
        if ended:
            self.settle(now)
            client.exchange_done(keep_alive and self.upload_done)
        elif client.write_paused and self.upstream is not None:
            self.upstream.pause_reading()

    def answer_body(self, payload: bytes, ended: bool) -> None:
        client = self.client
        self.seen = now = monotonic()
        self.bytes_out += len(payload)
        if self._encode:
            data = encode_chunk(payload) if payload else b""
            if ended:
                data += LAST_CHUNK
        else:
            data = payload
        if ended:
            self.upstream = None
        if data:
            client.transport.write(data)
        if ended:
            self._done(now)

    def client_writable(self, writable: bool) -> None:
        """The client's send buffer has filled or emptied."""
        if self.upstream is not None and self.active:
            if writable:
                self.upstream.resume_reading()
            else:
                self.upstream.pause_reading()

    def switch(self, upstream: UpstreamConnection, head: ResponseHead, rest: bytes) -> None:
        """101: from now on bytes both ways."""
        client = self.client
        if not self.head.upgrade or not head.upgrade:
            upstream.abort()
            self.fail(502, f"{self._whom()} switched protocols without being asked")
            return
        self.status = 101
        self.answering = True
        self.upstream_secs = monotonic() - self.sent_at
        client.edge.counters.tunnels += 1
        upstream.release_to_tunnel()
        self.upstream = None
        client.transport.write(switching_response(head, self.request_id) + rest)
        if early := client.take_pending():
            upstream.transport.write(early)
        self._tunnel = Tunnel(client.transport, upstream.transport, self._tunnel_ended)
        client.edge.tunnelled(client)

    def _tunnel_ended(self, tunnel: Tunnel) -> None:
        self._bytes_in, self.bytes_out = tunnel.bytes_in, tunnel.bytes_out
        self._tunnel = None
        self.settle(monotonic())
        self.client.forget()

    # ---- ends

    def upstream_lost(self, upstream: UpstreamConnection) -> None:
        """The connection closed before the answer was complete."""
        if self.answering:
            self._cut_off()
        elif upstream.reused and not upstream.heard and self._replay is not None and self._replays < _MAX_REPLAYS:
            self._replays += 1
            self.client.edge.counters.retries += 1
            self.upstream = None
            self._leave_backend()
            if self._route is not None:
                self._attempt(self._route, self._replay, monotonic())
        else:
            self.upstream = None
            self.fail(502, f"{self._whom()} closed the connection without an answer")

    def upstream_broke(self, upstream: UpstreamConnection, message: str) -> None:
        """The answer cannot be understood; the connection is already gone."""
        del upstream
        self.upstream = None
        if self.answering:
            self._cut_off()
        else:
            self.fail(502, message)

    def fail(self, status: int, message: str) -> None:
        """End the request with an answer of the edge's own, or cut it off when an answer has begun."""
        if self.answering:
            self._cut_off()
            return
        errors = self.client.edge.counters.errors
        errors[status] = errors.get(status, 0) + 1
        ids = self.request_id, trace_id(self._trace)
        retry_after_secs, self._retry_after_secs = self._retry_after_secs, 1
        self._reply(
            status,
            lambda close, bodyless, old: error_response(
                status, message, *ids, close=close, bodyless=bodyless, old=old, retry_after_secs=retry_after_secs
            ),
        )

    def redirect(self, location: str) -> None:
        """Send the client on; `location` holds nothing that a header cannot."""
        name = self.request_id
        self._reply(
            308,
            lambda close, bodyless, old: redirect_response(location, name, close=close, bodyless=bodyless, old=old),
        )

    def say(self, text: str) -> None:
        """Answer with a short text."""
        name = self.request_id
        self._reply(
            200, lambda close, bodyless, old: text_response(text, name, close=close, bodyless=bodyless, old=old)
        )

    def reroute(self, route: Route, data: bytes) -> None:
        """Give the request to another route: the one it was given to has looked at it and passes it on."""
        self._leave_backend()
        self.upstream = None
        self._route = route
        self._attempt(route, data, monotonic())

    def _reply(self, status: int, response: Callable[[bool, bool, bool], bytes]) -> None:
        """End the request with an answer of the edge's own."""
        self._drop_upstream()
        client = self.client
        self._keep_alive = (
            self.head.keep_alive and self.upload_done and not client.edge.closing and not self.head.upgrade
        )
        self.status = status
        answer = response(not self._keep_alive, self.is_head, not self.head.minor)
        client.transport.write(answer if self.ending is HEAD_END else answer.replace(HEAD_END, self.ending, 1))
        self._done(monotonic())

    def client_gone(self) -> None:
        """The client has left; the upstream is told by a closed connection."""
        if self.active:
            self._drop_upstream()
            if not self.answering:
                self.status = 499
            self.settle(monotonic(), aborted=True)

    def abort(self) -> None:
        """Stop at once, tunnels too; the client connection is dropped by the caller."""
        if self._tunnel is not None:
            self._tunnel.abort()
        else:
            self.client_gone()

    def check(self, now: float) -> bool:
        """Look at the clocks (loop time); False when the client connection must be dropped."""
        options = self.client.edge.options
        if self._tunnel is not None:
            limit = options.idle_timeout_secs if self._tunnel.half_closed else options.tunnel_idle_secs
            if now - self._tunnel.seen > limit:
                self._tunnel.abort()
            return True
        if self._task is not None:
            return True
        silence = now - self.seen
        if self.client.write_paused:
            return silence <= options.idle_timeout_secs
        if self.answering:
            if silence > options.stream_idle_secs:
                self._cut_off()
        elif not self.upload_done and not self.upload_blocked:
            if silence > options.idle_timeout_secs:
                self.fail(408, "the request body did not come in time")
        elif silence > ((self._route is not None and self._route.timeout_secs) or options.upstream_timeout_secs):
            self.fail(504, f"{self._whom()} did not answer in time")
        return True

    def _cut_off(self) -> None:
        """Let the client notice that the answer is not whole: never a clean end."""
        self._drop_upstream()
        # an answer that ends with the connection can only be seen as cut when the connection is reset
        reset = not self._encode and self._answer_length == NO_BODY
        self.settle(monotonic(), aborted=True)
        self.client.cut_off(reset=reset)

    def _drop_upstream(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self.upstream is not None:
            self.upstream.abort()
            self.upstream = None

    def _leave_backend(self) -> None:
        if self._backend is not None:
            self._backend.leave()
            self._backend = None

    def _done(self, now: float) -> None:
        """The answer is complete."""
        keep_alive = self._keep_alive and self.upload_done
        self.settle(now)
        self.client.exchange_done(keep_alive)

    def settle(self, now: float, *, aborted: bool = False) -> None:
        """Count out and give the record."""
        self.active = False
        self.upstream = None
        self._replay = None
        backend = self._backend
        if backend is not None:
            self._backend = None
            backend.leave()
        edge = self.client.edge
        if aborted:
            edge.counters.aborted += 1
        on_record = edge.on_record
        if on_record is not None:
            head = self.head
            route = self._route
            record = new_record(
                RequestRecord,
                (
                    None if route is None else route.app,
                    head.method,
                    self.status,
                    now - self._started_at,
                    self.upstream_secs if self.answering else 0.0,
                    self._bytes_in,
                    self.bytes_out if self.answering else 0,
                    self.request_id,
                    aborted,
                    head.host,
                    head.target,
                    self.client.address,
                    self._trace,
                    backend,
                    now,
                ),
            )
            on_record(record)
            if edge.on_access is not None:
                edge.on_access(record)


def _leads_to_api(entrance: Entrance, head: RequestHead) -> bool:
    route = entrance.found.get(head.host) or entrance.find(head.host)
    return route is not None and route.app is None and not head.target.startswith(FUNCTIONS)
