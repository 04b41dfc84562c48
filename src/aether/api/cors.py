"""Cross-origin requests from the pages that the operator names (WHATWG Fetch, "CORS protocol").

Callers prove themselves with a bearer token that a page must hold itself: nothing that a browser attaches on its own
counts, so credentials are never allowed and a listed origin gets no more than any other program with the token. It
stands outside everything else because a preflight carries no token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ANY = "*"
_METHODS = b"GET, HEAD, POST, PUT, PATCH, DELETE"
_REQUEST_HEADERS = b"Authorization, Content-Type, Idempotency-Key, Last-Event-ID, Traceparent, X-Request-Id"
_ANSWER_HEADERS = b"ETag, Location, Retry-After, X-Request-Id, X-Trace-Id"
_PREFLIGHT_SECS = b"600"


class Cors:
    """Wraps the whole API. `origins` are scheme, host and port as browsers send them, or `*` for all."""

    def __init__(self, app: App, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        allowed = self._allowed(headers.get(b"origin"))
        if scope["method"] == "OPTIONS" and b"origin" in headers and b"access-control-request-method" in headers:
            await _preflight(send, allowed)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_headers(allowed)]}
            await send(message)

        await self._app(scope, receive, answer)

    def _allowed(self, origin: bytes | None) -> bytes | None:
        """What Access-Control-Allow-Origin says to this origin."""
        if ANY in self._origins:
            return b"*"
        return origin if origin is not None and origin.decode("latin-1") in self._origins else None


def _headers(allowed: bytes | None) -> list[tuple[bytes, bytes]]:
    if allowed is None:
        return [(b"vary", b"Origin")]
    headers = [(b"access-control-allow-origin", allowed), (b"access-control-expose-headers", _ANSWER_HEADERS)]
    return headers if allowed == b"*" else [*headers, (b"vary", b"Origin")]


async def _preflight(send: Send, allowed: bytes | None) -> None:
    """An origin that is not allowed gets an answer without permission, which the browser reports as such."""
    headers = [(b"content-length", b"0"), *_headers(allowed)]
    if allowed is not None:
        headers += [
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-allow-headers", _REQUEST_HEADERS),
            (b"access-control-max-age", _PREFLIGHT_SECS),
        ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
