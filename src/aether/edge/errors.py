"""The edge's own answers: error envelopes `{"code", "message", "trace_id"}`, redirects and challenges; pure."""

from __future__ import annotations

import json
from typing import Final

_MOVED: Final = "308 Permanent Redirect"
_REASONS: Final[dict[int, tuple[str, str]]] = {
    400: ("Bad Request", "bad_request"),
    404: ("Not Found", "not_found"),
    408: ("Request Timeout", "bad_request"),
    413: ("Content Too Large", "payload_too_large"),
    431: ("Request Header Fields Too Large", "bad_request"),
    502: ("Bad Gateway", "bad_gateway"),
    503: ("Service Unavailable", "service_unavailable"),
    504: ("Gateway Timeout", "gateway_timeout"),
}


def error_response(
    status: int,
    message: str,
    request_id: bytes,
    trace_id: bytes,
    *,
    close: bool,
    bodyless: bool = False,
    old: bool = False,
    retry_after_secs: int = 1,
) -> bytes:
    """A complete answer. `bodyless` for HEAD; `old` for an HTTP/1.0 client that asked to stay connected."""
    reason, code = _REASONS[status]
    body = json.dumps({"code": code, "message": message, "trace_id": trace_id.decode("ascii")}).encode()
    fields = ["Content-Type: application/json", "Cache-Control: no-store"]
    if status == 503:
        fields.append(f"Retry-After: {retry_after_secs}")
    return own_response(f"{status} {reason}", fields, body, request_id, close=close, bodyless=bodyless, old=old)


def redirect_response(
    location: str, request_id: bytes, *, close: bool, bodyless: bool = False, old: bool = False
) -> bytes:
    """Sends the client on to `location`, with the same method and body."""
    body = f"Moved to {location}\n".encode()
    fields = [f"Location: {location}", "Content-Type: text/plain; charset=utf-8"]
    return own_response(_MOVED, fields, body, request_id, close=close, bodyless=bodyless, old=old)


def text_response(text: str, request_id: bytes, *, close: bool, bodyless: bool = False, old: bool = False) -> bytes:
    fields = ["Content-Type: text/plain", "Cache-Control: no-store"]
    return own_response("200 OK", fields, text.encode(), request_id, close=close, bodyless=bodyless, old=old)


def own_response(
    status: str, own: list[str], body: bytes, request_id: bytes, *, close: bool, bodyless: bool, old: bool
) -> bytes:
    fields = [
        f"HTTP/1.1 {status}",
        *own,
        f"Content-Length: {len(body)}",
        f"X-Request-Id: {request_id.decode('ascii')}",
    ]
    if close:
        fields.append("Connection: close")
    elif old:
        fields.append("Connection: keep-alive")
    head = ("\r\n".join(fields) + "\r\n\r\n").encode("ascii")
    return head if bodyless else head + body
