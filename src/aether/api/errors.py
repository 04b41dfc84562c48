"""Every failure as one envelope: {"code", "message", "details"?, "trace_id"}; no stack trace leaves."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

from aether.api import auditing
from aether.model.errors import AetherError
from aether.observability import tracing
from aether.observability.logging import logger

_log = logger(__name__)
_CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "bad_request",
    409: "conflict",
    413: "payload_too_large",
    429: "rate_limited",
    503: "service_unavailable",
}
RETRY_AFTER_SECS = "1"
_DISCONNECTED = "client disconnected prematurely"
"""How Litestar's request body says that its sender went away; it has no exception of its own for it."""


class Envelope(msgspec.Struct, omit_defaults=True):
    """The body of every answer that is not 2xx."""

    code: str
    message: str
    details: dict[str, Any] | None = None
    trace_id: str | None = None


def envelope(error: AetherError) -> Envelope:
    auditing.note().code = error.code
    details = dict(error.details) if error.details else None
    return Envelope(error.code, error.message, details, tracing.trace_id.get())


def headers_for(error: AetherError) -> dict[str, str]:
    if error.status == 401:
        return {"WWW-Authenticate": 'Basic realm="aether", Bearer'}
    if error.status in (429, 503):
        secs = (error.details or {}).get("retry_after_secs")
        return {"Retry-After": RETRY_AFTER_SECS if secs is None else str(secs)}
    return {}


def _answer(error: AetherError, extra: Mapping[str, str] | None = None) -> Response[Envelope]:
    headers = {**headers_for(error), **(extra or {})}
    return Response(envelope(error), status_code=error.status, headers=headers, media_type="application/json")


def on_aether_error(_request: Request[Any, Any, Any], error: AetherError) -> Response[Envelope]:
    if error.status >= 500:
        _log.warning("request failed", code=error.code, error=error.message)
    return _answer(error)


def on_http_exception(_request: Request[Any, Any, Any], error: HTTPException) -> Response[Envelope]:
    """Litestar's own refusals: unknown route, wrong method, body that does not fit."""
    status = error.status_code
    message = error.detail or HTTPStatus(status).phrase
    details: dict[str, Any] | None = None
    if isinstance(error, ValidationException):
        message, details = _explain(error)
    elif status == 404:
        message = "there is nothing at this path"
    elif status == 405:
        message = "this path does not take that method"
    elif status >= 500 and message == _DISCONNECTED:
        # nobody is left to answer, and nothing went wrong here
        status, message = 400, "the request ended before its body did"
    elif status >= 500:
        _log.error("request failed", error=message, exc_info=error)
        message = "the server failed to answer; its log names the trace id"
    made = AetherError(message, details)
    made.code, made.status = _CODES.get(status, "internal" if status >= 500 else "bad_request"), status
    allow = {name.lower(): value for name, value in (error.headers or {}).items()}.get("allow")
    # the framework counts a WebSocket among the methods
    methods = [word for word in (allow or "").split(", ") if word.isupper()]
    return _answer(made, {"Allow": ", ".join(sorted(methods))} if methods else None)


def on_exception(_request: Request[Any, Any, Any], error: Exception) -> Response[Envelope]:
    """A bug: logged in full, told in one sentence."""
    _log.error("unhandled error", exc_info=error)
    return _answer(AetherError("the server failed to answer; its log names the trace id"))


def _explain(error: ValidationException) -> tuple[str, dict[str, Any] | None]:
    problems: list[dict[str, str]] = []
    entries: Any = error.extra if isinstance(error.extra, list) else []
    for entry in entries:
        problems.append({key: str(entry[key]) for key in ("key", "source", "message") if entry.get(key)})
    if not problems:
        return error.detail, None
    told = "; ".join(f"{p['key']}: {p['message']}" if p.get("key") else p.get("message", "") for p in problems)
    return f"the request does not fit: {told}", {"problems": problems}


HANDLERS: dict[type[Exception] | int, Any] = {
    AetherError: on_aether_error,
    HTTPException: on_http_exception,
    Exception: on_exception,
}
