"""The ASGI layer around the routes: ids, authentication, audit, metrics, bounds, and the last line for errors.

It is plain ASGI because everything here must also hold for paths that no route serves, for /objects, which
bypasses the framework, and for WebSockets.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec

from aether.api import auditing
from aether.api.auditing import Note
from aether.api.auth import address_of, refuse_cross_site, token_of
from aether.api.errors import envelope, headers_for
from aether.api.services import Services
from aether.identity.roles import Principal
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
        tracing.trace_id.set(tracing.trace_id_from(_text(headers.get(b"traceparent"))))
        note = auditing.begin(address_of(scope, headers))
        answer = _Answer(send, lambda status: self._audit(scope, note, status))
        began = time.perf_counter()
        try:
            await self._serve(scope, headers, note, receive, answer)
        except AetherError as error:
            await answer.fail(scope, error)
        except Exception as error:  # noqa: BLE001 - the boundary: whatever went wrong is told without its trace
            _log.error("unhandled error", exc_info=error)
            await answer.fail(scope, Internal("the server failed to answer; its log names the trace id"))
        finally:
            self._record(scope, answer.status, time.perf_counter() - began)

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
        if self._control is None or scope["type"] == "websocket" or scope["method"] in _SAFE:
            await self._routed(scope, receive, answer.send)
            return
        async with _turn(self._control):
            await self._routed(scope, receive, answer.send)

    async def _caller(self, headers: dict[bytes, bytes]) -> Principal:
        token, basic = token_of(headers)
        caller = await self._services.identity.tokens.authenticate(token)
        if basic or caller.kind == "anonymous":
            refuse_cross_site(headers)
        return caller

    async def _audit(self, scope: Scope, note: Note, status: int) -> None:
        """Write what a change came to before its answer leaves."""
        template = scope.get("path_template")
        if scope["type"] != "http" or scope["method"] in _SAFE or template is None:
            return
        if template.startswith(OBJECTS):
            if status >= 400:
                return
            note.actor, note.actor_kind = "signed URL", "signature"
            note.target = scope["path"][len(OBJECTS) :]
        if not note.actor:
            return
        if not note.target:
            note.target = " ".join(str(value) for value in scope.get("path_params", {}).values())
        await self._services.identity.audit.record(note.entry(f"{scope['method']} {template}", status))

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        method = str(scope.get("method", "WEBSOCKET"))
        method = method if method in _METHODS or method == "WEBSOCKET" else "OTHER"
        route = scope.get("path_template") or "unmatched"
        metrics = self._services.metrics
        metrics.http_requests.labels(method, route, str(status)).inc()
        metrics.http_seconds.labels(method, route).observe(seconds)
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


def _id_headers() -> list[tuple[bytes, bytes]]:
    return [
        (b"x-request-id", cast(str, tracing.request_id.get()).encode()),
        (b"x-trace-id", cast(str, tracing.trace_id.get()).encode()),
    ]


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")
