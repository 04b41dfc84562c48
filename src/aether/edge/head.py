"""Message heads of HTTP/1.x: strict validation and classification, pure (bytes in, fields out).

One grammar decides (RFC 9112 sections 2 to 6, without its tolerances): a head that matches it is read in the same
way by every server, and whatever could be read in two ways is refused, which is what stops request smuggling.
Rewriting is the business of `headers`, body framing of `body`, routing of `table`.
"""

from __future__ import annotations

import re
from typing import Final

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_TEXT: Final = rb"[\t\x20-\x7e\x80-\xff]"
_FIELDS: Final = rb"((?:" + _TOKEN + rb"++:" + _TEXT + rb"*+\r\n)*+)"
_REQUEST: Final = re.compile(rb"(" + _TOKEN + rb"{1,32}) ([\x21-\x7e]++) HTTP/1\.([01])\r\n" + _FIELDS)
_RESPONSE: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: (" + _TEXT + rb"*+))?\r\n" + _FIELDS)
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._\-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?")
_ABSOLUTE: Final = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://([^/?#]*)([^#]*)")
_REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")
_TRACEPARENT: Final = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_STRAY: Final = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\x00")
_WELL_FORMED_LINE: Final = re.compile(_TOKEN + rb"++:" + _TEXT + rb"*+")

HEAD_END: Final = b"\r\n\r\n"
NO_BODY: Final = -1
"""`content_length` of a head that carries none."""

_MAX_LENGTH_DIGITS: Final = 18

_HOST_FIELD, _LENGTH, _CODING, _CONNECTION, _UPGRADE, _EXPECT, _ID, _TRACE, _STATE, _KEEP_ALIVE, _DROP = range(11)
_REQUEST_FIELDS: Final[dict[bytes, int]] = {
    b"host": _HOST_FIELD,
    b"content-length": _LENGTH,
    b"transfer-encoding": _CODING,
    b"connection": _CONNECTION,
    b"upgrade": _UPGRADE,
    b"expect": _EXPECT,
    b"x-request-id": _ID,
    b"traceparent": _TRACE,
    b"tracestate": _STATE,
    b"keep-alive": _DROP,
    b"proxy-connection": _DROP,
    b"proxy-authorization": _DROP,
    b"te": _DROP,
    b"trailer": _DROP,
    b"http2-settings": _DROP,
    b"forwarded": _DROP,
    b"x-real-ip": _DROP,
}
_RESPONSE_FIELDS: Final[dict[bytes, int]] = {
    b"content-length": _LENGTH,
    b"transfer-encoding": _CODING,
    b"connection": _CONNECTION,
    b"upgrade": _UPGRADE,
    b"keep-alive": _KEEP_ALIVE,
    b"x-request-id": _DROP,
    b"proxy-connection": _DROP,
    b"proxy-authenticate": _DROP,
    b"te": _DROP,
    b"trailer": _DROP,
}
_OWNED_PREFIXES: Final = (b"x-aether-", b"x-forwarded-")


class HeadError(Exception):
    """A head that must be refused; `message` says why in a sentence part."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RequestHead:
    """What the edge needs of a request head. `lines` are the end-to-end fields that pass unchanged."""

    __slots__ = (
        "chunked",
        "content_length",
        "expect_continue",
        "host",
        "keep_alive",
        "lines",
        "method",
        "minor",
        "request_id",
        "target",
        "traceparent",
        "upgrade",
    )

    method: bytes
    target: bytes
    """Origin form, or `*` for OPTIONS."""
    minor: int
    host: bytes
    lines: list[bytes]
    content_length: int
    chunked: bool
    keep_alive: bool
    upgrade: bytes
    """Protocols asked for in a valid Upgrade, else empty."""
    expect_continue: bool
    request_id: bytes
    traceparent: bytes


class ResponseHead:
    """What the edge needs of a response head. `lines` are the end-to-end fields that pass unchanged."""

    __slots__ = ("chunked", "content_length", "keep_alive", "keep_alive_secs", "lines", "reason", "status", "upgrade")

    status: int
    reason: bytes
    lines: list[bytes]
    content_length: int
    chunked: bool
    keep_alive: bool
    keep_alive_secs: int
    """What `Keep-Alive: timeout=` promises, 0 when it is absent."""
    upgrade: bytes


def has_stray_control(partial: bytes) -> bool:
    """True when an unfinished head already holds a bare CR, bare LF or NUL, so waiting for its end is useless."""
    return _STRAY.search(partial) is not None


def parse_request(data: bytes, end: int) -> RequestHead:
    """Read the request head `data[:end]`, `end` being just after the CRLF of its last line. Raises HeadError."""
    match = _REQUEST.fullmatch(data, 0, end)
    if match is None:
        raise HeadError(_why_not(data[:end], "request"))
    method, target, minor, fields = match.groups()
    head = RequestHead()
    head.method = method
    head.minor = 1 if minor == b"1" else 0
    head.content_length = length = NO_BODY
    head.chunked = head.expect_continue = False
    head.request_id = head.traceparent = head.upgrade = b""
    kept: list[bytes] = []
    head.lines = kept
    host: bytes | None = None
    connection = upgrade = state = b""
    ids = traces = 0
    lines = fields.split(b"\r\n")
    lines.pop()
    for line in lines:
        name = line[: line.index(b":")].lower()
        kind = _REQUEST_FIELDS.get(name)
        if kind is None:
            if (name[0] == 0x78 or b"_" in name) and _owned(name):
                continue
            kept.append(line)
            continue
        value = line[len(name) + 1 :].strip(b" \t")
        if kind == _HOST_FIELD:
            if host is not None:
                raise HeadError("more than one Host field")
            host = value
        elif kind == _CONNECTION:
            connection = connection + b"," + value if connection else value
        elif kind == _LENGTH:
            if length != NO_BODY:
                raise HeadError("more than one Content-Length field")
            length = _length(value)
        elif kind == _CODING:
            if head.chunked or value.lower() != b"chunked":
                raise HeadError("Transfer-Encoding must be exactly 'chunked'")
            head.chunked = True
        elif kind == _UPGRADE:
            upgrade = upgrade + b", " + value if upgrade else value
        elif kind == _EXPECT:
            head.expect_continue = value.lower() == b"100-continue"
        elif kind == _ID:
            ids += 1
            head.request_id = value if ids == 1 and _REQUEST_ID.fullmatch(value) else b""
        elif kind == _TRACE:
            traces += 1
            head.traceparent = value if traces == 1 and _TRACEPARENT.fullmatch(value) else b""
        elif kind == _STATE:
            state = state + b"," + value if state else value
    if host is None:
        raise HeadError("no Host field")
    if head.chunked:
        if length != NO_BODY:
            raise HeadError("both Content-Length and Transfer-Encoding")
        if not head.minor:
            raise HeadError("Transfer-Encoding in an HTTP/1.0 request")
    head.content_length = length
    if target[0] != 0x2F:
        target, host = _other_form(method, target, host)
    head.target = target
    if not _HOST.fullmatch(host):
        raise HeadError("the Host field does not name a host")
    head.host = host
    if state and head.traceparent:
        kept.append(b"tracestate: " + state)
    if connection:
        tokens = _tokens(connection)
        head.keep_alive = b"close" not in tokens and (head.minor == 1 or b"keep-alive" in tokens)
        if upgrade and head.minor and b"upgrade" in tokens and not head.chunked and length <= 0:
            head.upgrade = _tunnels(upgrade)
        head.lines = _without(kept, tokens)
    else:
        head.keep_alive = head.minor == 1
    return head


def parse_response(data: bytes, end: int) -> ResponseHead:
    """Read the response head `data[:end]`, `end` being just after the CRLF of its last line. Raises HeadError."""
    match = _RESPONSE.fullmatch(data, 0, end)
    if match is None:
        raise HeadError(_why_not(data[:end], "response"))
    minor, status, reason, fields = match.groups(b"")
    head = ResponseHead()
    head.status = int(status)
    head.reason = reason
    head.chunked = False
    head.keep_alive_secs = 0
    head.upgrade = b""
    kept: list[bytes] = []
    head.lines = kept
    length = NO_BODY
    connection = b""
    lines = fields.split(b"\r\n")
    lines.pop()
    for line in lines:
        name = line[: line.index(b":")].lower()
        kind = _RESPONSE_FIELDS.get(name)
        if kind is None:
            kept.append(line)
            continue
        value = line[len(name) + 1 :].strip(b" \t")
        if kind == _LENGTH:
            if length != NO_BODY:
                raise HeadError("more than one Content-Length field")
            length = _length(value)
        elif kind == _CONNECTION:
            connection = connection + b"," + value if connection else value
        elif kind == _KEEP_ALIVE:
            head.keep_alive_secs = _keep_alive_secs(value)
        elif kind == _CODING:
            if head.chunked or value.lower() != b"chunked":
                raise HeadError("Transfer-Encoding must be exactly 'chunked'")
            head.chunked = True
        elif kind == _UPGRADE:
            head.upgrade = value
    if head.chunked and length != NO_BODY:
        raise HeadError("both Content-Length and Transfer-Encoding")
    head.content_length = length
    if not connection or connection == b"keep-alive":
        head.keep_alive = minor == b"1" or connection != b""
    else:
        tokens = _tokens(connection)
        head.keep_alive = b"close" not in tokens and (minor == b"1" or b"keep-alive" in tokens)
        head.lines = _without(kept, tokens)
    return head


def _owned(name: bytes) -> bool:
    """True for a field only the edge may set, also spelt with `_`: CGI and WSGI read both spellings as one."""
    plain = name.replace(b"_", b"-")
    return plain.startswith(_OWNED_PREFIXES) or plain in _REQUEST_FIELDS


def _length(value: bytes) -> int:
    if not value.isdigit() or len(value) > _MAX_LENGTH_DIGITS:
        raise HeadError("Content-Length is not a number")
    return int(value)


def _other_form(method: bytes, target: bytes, host: bytes) -> tuple[bytes, bytes]:
    """Turn the absolute and asterisk forms into (target to send, host to route by); RFC 9112 section 3.2."""
    if target == b"*" and method == b"OPTIONS":
        return target, host
    match = _ABSOLUTE.fullmatch(target)
    if match is None or method == b"CONNECT":
        raise HeadError("the request target is neither a path nor an http URL")
    if not _HOST.fullmatch(host):
        raise HeadError("the Host field does not name a host")
    authority, path = match.groups()
    return (path if path.startswith(b"/") else b"/" + path), authority


def _tokens(connection: bytes) -> list[bytes]:
    return [token.strip(b" \t") for token in connection.lower().split(b",")]


def _without(lines: list[bytes], names: list[bytes]) -> list[bytes]:
    """`lines` less the fields that a Connection field names."""
    if not any(name not in (b"keep-alive", b"close", b"upgrade", b"") for name in names):
        return lines
    return [line for line in lines if line[: line.index(b":")].lower() not in names]


def _tunnels(upgrade: bytes) -> bytes:
    """The Upgrade field unless it asks for HTTP/2, which would carry requests past the edge unseen."""
    return b"" if any(token.strip(b" \t").lower() in (b"h2c", b"h2") for token in upgrade.split(b",")) else upgrade


def _keep_alive_secs(value: bytes) -> int:
    for part in value.lower().split(b","):
        name, _, number = part.strip(b" \t").partition(b"=")
        if name == b"timeout" and number.isdigit() and len(number) < 10:
            return int(number)
    return 0


def _why_not(head: bytes, what: str) -> str:
    """Name the first thing that is wrong with a head that the grammar refused."""
    if has_stray_control(head):
        return f"the {what} head has a bare CR, a bare LF or a NUL byte"
    first, *rest = head.split(b"\r\n")[:-1]
    pattern = _REQUEST if what == "request" else _RESPONSE
    if not pattern.fullmatch(first + b"\r\n"):
        return f"the {what} line is malformed"
    for line in rest:
        if line[:1] in (b" ", b"\t"):
            return f"a {what} field is folded over several lines"
        if not _WELL_FORMED_LINE.fullmatch(line):
            return f"a {what} field has a malformed name or a control byte in its value"
    return f"the {what} head is malformed"
