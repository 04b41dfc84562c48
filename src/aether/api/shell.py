"""The ASGI layer around the routes: ids, authentication, audit, metrics, bounds, and the last line for errors.

It is plain ASGI because everything here must also hold for paths that no route serves, for /objects, which
bypasses the framework, and for WebSockets.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.api import auditing, bodies
from aether.api.auditing import Note
from aether.api.auth import address_of, refuse_cross_site, token_of
from aether.api.authorization import methods_of
from aether.api.errors import envelope, headers_for
from aether.api.services import Services
from aether.identity.roles import Principal
from aether.model.database import alongside
from aether.model.errors import AetherError, Internal, ServiceUnavailable
from aether.observability import tracing
from aether.observability.logging import logger

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OBJECTS = "/objects/"
_CONTROL_WAIT_SECS = 10.0
_LEGACY = ("POST", "/artifacts")
_CODE = ("/api/functions/", "/code")
_RUNTIMES = "/api/functions/runtimes"
_DEPRECATED = [(b"deprecation", b"@1767225600"), (b"link", b'</artifacts/presign>; rel="successor-version"')]
"""RFC 9745 and RFC 5829: since the first of January 2026."""
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_METHODS = _SAFE | {"POST", "PUT", "PATCH", "DELETE"}
_log = logger(__name__)


class Shell:
    """Wraps the routed app and the objects app; `public` are the paths that need no token."""

    def __init__(self, routed: App, objects: App, services: Services, public: frozenset[str]) -> None:
        self._routed = routed
        self._objects = objects
        self._services = services
        self._public = public
        limit = services.settings.max_concurrent_control
        self._control = asyncio.Semaphore(limit) if limit else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        tracing.request_id.set(tracing.request_id_from(_text(headers.get(b"x-request-id"))))
        tracing.accept(_text(headers.get(b"traceparent")))
        note = auditing.begin(address_of(scope, headers))
        answer = _Answer(send, lambda status: self._audit(scope, note, status))
        alongside.set(lambda tx: self._audit_begins(tx, scope, note))
        began = time.perf_counter()
        with tracing.span("request", kind=tracing.SERVER) as span:
            try:
                await self._serve(scope, headers, note, receive, answer)
            except AetherError as error:
                await answer.fail(scope, error)
            except Exception as error:  # noqa: BLE001 - the boundary: whatever went wrong is told without its trace
                _log.error("unhandled error", exc_info=error)
                await answer.fail(scope, Internal("the server failed to answer; its log names the trace id"))
            finally:
                self._record(scope, answer.status, time.perf_counter() - began, span)

    async def _serve(
        self, scope: Scope, headers: dict[bytes, bytes], note: Note, receive: Receive, answer: _Answer
    ) -> None:
        path: str = scope["path"]
        if path.startswith(OBJECTS):
            scope["path_template"] = "/objects/{key}"
            await self._objects(scope, receive, answer.send)
            return
        if path not in self._public:
            caller = scope.setdefault("state", {})["principal"] = await self._caller(headers)
            note.actor, note.actor_kind = caller.name, caller.kind
        if scope["type"] == "websocket" or scope["method"] in _SAFE:
            options = scope["type"] == "http" and scope["method"] == "OPTIONS"
            await self._routed(scope, receive, _allowing(scope, answer.send) if options else answer.send)
            return
        # bodies that are archives: they are passed on as they come, and have turns and clocks of their own
        if (scope["method"], path) == _LEGACY:
            await self._routed(scope, receive, _deprecated(answer.send))
            return
        streams = path == _RUNTIMES or (path.startswith(_CODE[0]) and path.endswith(_CODE[1]))
        if scope["method"] == "POST" and streams:
            await self._routed(scope, receive, answer.send)
            return
        limit = bodies.MAX_PUBLIC_BYTES if path in self._public else bodies.limit_of(path)
        receive = await bodies.take(receive, limit, self._services.settings.api_body_timeout_secs)
        async with _turn(self._control) if self._control is not None else nullcontext():
            await self._routed(scope, receive, answer.send)

    async def _caller(self, headers: dict[bytes, bytes]) -> Principal:
        token, basic = token_of(headers)
        caller = await self._services.identity.tokens.authenticate(token)
        if basic or caller.kind == "anonymous":
            refuse_cross_site(headers)
        return caller

    async def _audit_begins(self, tx: AsyncConnection, scope: Scope, note: Note) -> None:
        """Write the row of a change together with the first thing that the change writes."""
        if note.begun or note.ended or not note.actor or not _is_change(scope):
            return
        note.begun = True
        target = note.target or _named(scope)
        entry = replace(note.entry(_action(scope), 0), target=target)
        await self._services.identity.audit.begin(tx, entry)

    async def _audit(self, scope: Scope, note: Note, status: int) -> None:
        """Write what a change came to before its answer leaves."""
        note.ended = True
        if not _is_change(scope):
            return
        template: str = scope["path_template"]
        if template.startswith(OBJECTS):
            if status >= 400:
                return
            note.actor, note.actor_kind = "signed URL", "signature"
            note.target = scope["path"][len(OBJECTS) :]
        if not note.actor:
            return
        note.target = note.target or _named(scope)
        await self._services.identity.audit.record(note.entry(_action(scope), status), begun=note.begun)

    def _record(self, scope: Scope, status: int, seconds: float, span: tracing.Span | None) -> None:
        method = str(scope.get("method", "WEBSOCKET"))
        method = method if method in _METHODS or method == "WEBSOCKET" else "OTHER"
        route = scope.get("path_template") or "unmatched"
        metrics = self._services.metrics
        metrics.http_requests.labels(method, route, str(status)).inc()
        metrics.http_seconds.labels(method, route).observe(seconds)
        if span is not None:
            span.name = f"{method} {route}"
            span.attributes |= {
                "http.request.method": method, "http.route": route, "http.response.status_code": status,
                "aether.request_id": tracing.request_id.get() or "",
            }  # fmt: skip
            if status >= 500:
                span.failure = f"answered {status}"
        _log.debug("answered", method=method, path=scope["path"], status=status, ms=round(seconds * 1000, 1))


class _Answer:
    """Watches what is sent, so that every answer carries the ids and a late failure is not answered twice."""

    def __init__(self, send: Send, audit: Callable[[int], Awaitable[None]]) -> None:
        self._send = send
        self._audit = audit
        self.status = 0
        self._closed = False

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
            await self._audit(self.status)
            message = {**message, "headers": [*message.get("headers", ()), *_id_headers()]}
        elif kind == "websocket.accept":
            self.status = 101
            message = {**message, "headers": [*message.get("headers", ()), *_id_headers()]}
        elif kind == "websocket.close":
            self._closed = True
        await self._send(message)

    async def fail(self, scope: Scope, error: AetherError) -> None:
        """Send the envelope; once an answer has begun, HTTP has no way to take it back, so the exception is
        raised again and the server cuts the connection, which the client sees as a truncated body."""
        if scope["type"] == "websocket":
            if not self._closed:
                await self._fail_websocket(scope, error)
            return
        if self.status:
            _log.warning("an answer was cut off", path=scope["path"], error=error.message)
            raise error
        await self._envelope("http.response", error)

    async def _fail_websocket(self, scope: Scope, error: AetherError) -> None:
        if self.status == 101:
            await self.send({"type": "websocket.close", "code": 1011, "reason": error.message[:100]})
        elif "websocket.http.response" in scope.get("extensions", {}):
            await self._envelope("websocket.http.response", error)
        else:
            await self.send({"type": "websocket.close", "code": 1008, "reason": error.message[:100]})

    async def _envelope(self, kind: str, error: AetherError) -> None:
        body = msgspec.json.encode(envelope(error))
        headers = {"content-type": "application/json", "content-length": str(len(body)), **headers_for(error)}
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": f"{kind}.start", "status": error.status, "headers": pairs})
        await self.send({"type": f"{kind}.body", "body": body, "more_body": False})


def _deprecated(send: Send) -> Send:
    """Say of every answer, refusals too, that the route is deprecated."""

    async def tell(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *_DEPRECATED]}
        await send(message)

    return tell


def _allowing(scope: Scope, send: Send) -> Send:
    """Tell all the methods of a path: the framework knows those of one handler."""

    async def tell(message: Message) -> None:
        template = scope.get("path_template")
        if message["type"] == "http.response.start" and template is not None:
            others = [(name, value) for name, value in message["headers"] if name.lower() != b"allow"]
            methods = ", ".join(sorted([*methods_of(template), "OPTIONS"]))
            message = {**message, "headers": [*others, (b"allow", methods.encode())]}
        await send(message)

    return tell


@asynccontextmanager
async def _turn(semaphore: asyncio.Semaphore) -> AsyncGenerator[None]:
    try:
        async with asyncio.timeout(_CONTROL_WAIT_SECS):
            await semaphore.acquire()
    except TimeoutError:
        raise ServiceUnavailable("the server is busy with other changes; try again") from None
    try:
        yield
    finally:
        semaphore.release()


def _is_change(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["method"] not in _SAFE and scope.get("path_template") is not None


def _action(scope: Scope) -> str:
    return f"{scope['method']} {scope['path_template']}"


def _named(scope: Scope) -> str:
    return " ".join(str(value) for value in scope.get("path_params", {}).values())


def _id_headers() -> list[tuple[bytes, bytes]]:
    return [
        (b"x-request-id", cast(str, tracing.request_id.get()).encode()),
        (b"x-trace-id", cast(str, tracing.trace_id.get()).encode()),
    ]


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")
