"""Message heads of HTTP/1.x: strict validation and classification, pure (bytes in, fields out).

One grammar decides (RFC 9112 sections 2 to 6, without its tolerances): a head that matches it is read in the same
way by every server, and whatever could be read in two ways is refused, which is what stops request smuggling.
Rewriting is the business of `headers`, body framing of `body`, routing of `table`.
"""

from __future__ import annotations

import math
import re
from typing import Final

from aether.edge.lines import (
    CODING,
    CONNECTION,
    DROP,
    EXPECT,
    FOR_API,
    HOST,
    HOST_FIELD,
    ID,
    KEEP_ALIVE,
    LENGTH,
    MAX_KNOWN,
    MAX_KNOWN_BYTES,
    STATE,
    STRAY_MESSAGE,
    TEXT,
    TOKEN,
    TRACE,
    UPGRADE,
    Entry,
    HeadError,
    Twice,
    has_stray_control,
    request_lines,
    response_lines,
)

_REQUEST_LINE: Final = re.compile(rb"(" + TOKEN + rb"{1,32}) ([\x21-\x7e]++) HTTP/1\.([01])")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: (" + TEXT + rb"*+))?")
_ABSOLUTE: Final = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://([^/?#]*)([^#]*)")
_REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")
_TRACEPARENT: Final = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

HEAD_END: Final = b"\r\n\r\n"
NO_BODY: Final = -1
"""`content_length` of a head that carries none."""

NO_PROMISE: Final = -1
"""`keep_alive_secs` of a head that says nothing about it."""

_PLAIN: Final = frozenset((b"GET", b"OPTIONS"))
"""Methods whose repetition does no harm and whose answer is framed as any other, unlike that of HEAD."""

_UNNAMED: Final = frozenset((b"keep-alive", b"close", b"upgrade", b"", b"content-length"))
"""Connection options that are no field names, and the one end-to-end field whose loss would change the framing."""


class RequestHead:
    """What the edge needs of a request head. `lines` are the end-to-end fields that pass unchanged,
    Content-Length among them."""

    method: bytes
    target: bytes
    """Origin form, or `*` for OPTIONS."""
    host: bytes
    lines: list[bytes]
    minor: int = 1
    content_length: int = NO_BODY
    chunked: bool = False
    keep_alive: bool = True
    upgrade: bytes = b""
    """Protocols asked for in a valid Upgrade, else empty."""
    expect_continue: bool = False
    request_id: bytes = b""
    traceparent: bytes = b""
    plain: bool = False
    """GET or OPTIONS in HTTP/1.1 without body, ids, Upgrade, Expect or Connection: close: what most requests are."""
    start: bytes = b""
    """What is sent upstream for a plain head that came again, up to the request id; made by `headers`."""
    for_api: tuple[bytes, ...] = ()
    """Fields that pass to the API alone."""


NO_REQUEST: Final = RequestHead()
"""Stands for a head before there is one."""


class ResponseHead:
    """What the edge needs of a response head; not changed once it is made, because equal heads share it."""

    status: int
    raw: bytes
    """As it came, with the empty line that ends it."""
    start: bytes
    """Status line and the end-to-end fields that pass unchanged, Content-Length (but never of a 1xx or 204) among
    them; each line with its CRLF."""
    content_length: int = NO_BODY
    chunked: bool = False
    keep_alive: bool = True
    keep_alive_secs: int = NO_PROMISE
    """What `Keep-Alive: timeout=` promises."""
    idle_secs: float = math.inf
    """How long that lets the connection be kept unused."""
    upgrade: bytes = b""
    whole: int = NO_BODY
    """Bytes of the answer with this head, when it is final, keeps the connection open and gives the length."""
    opening: bytes = b""
    """Of such an answer what goes to the client up to the value of X-Request-Id."""


NO_RESPONSE: Final = ResponseHead()
"""Stands for a head before there is one: equal to none that can come."""
NO_RESPONSE.raw = b""


def parse_request(data: bytes, end: int) -> RequestHead:
    """Read the request head `data[:end]`, `end` being where its closing empty line begins. Raises HeadError."""
    lines = data[:end].split(b"\r\n")
    first = lines[0]
    method, target, minor = _firsts[first] if first in _firsts else _learn_first(first)
    head = RequestHead()
    if not minor:
        head.minor = 0
        head.keep_alive = False
    head.method = method
    kept: list[bytes] = []
    head.lines = kept
    host = b""
    del lines[0]
    rare: list[Entry] | None = None
    known = request_lines.known
    for line in lines:
        entry = known[line] if line in known else request_lines.learn(line)
        if entry is None:
            kept.append(line)
        elif entry[0] == HOST_FIELD:
            if host:
                raise HeadError("more than one Host field")
            host = entry[1]
        elif entry[0] == LENGTH:
            if head.content_length != NO_BODY:
                raise HeadError("more than one Content-Length field")
            head.content_length = entry[2]
            kept.append(line)
        elif entry[0] != DROP:
            if rare is None:
                rare = [entry]
            else:
                rare.append(entry)
    if not host:
        raise HeadError("no Host field")
    if target[0] != 0x2F:
        target, host = _other_form(method, target, host)
    head.target = target
    head.host = host
    if rare is not None:
        _take_rare(head, rare)
    if minor and method in _PLAIN and head.content_length <= 0:
        head.plain = rare is None or not _special(head)
    return head


def _special(head: RequestHead) -> bool:
    """True when a rare field asks for more than a plain exchange."""
    return bool(
        head.chunked
        or head.upgrade
        or head.expect_continue
        or head.request_id
        or head.traceparent
        or not head.keep_alive
    )


def _take_rare(head: RequestHead, fields: list[Entry]) -> None:
    """Apply the fields that mean something to the edge itself."""
    connection = upgrade = state = b""
    ids = traces = 0
    for kind, value, _ in fields:
        if kind == CONNECTION:
            connection = connection + b"," + value if connection else value
        elif kind == CODING:
            if head.chunked or value.lower() != b"chunked":
                raise HeadError("Transfer-Encoding must be exactly 'chunked'")
            head.chunked = True
        elif kind == UPGRADE:
            upgrade = upgrade + b", " + value if upgrade else value
        elif kind == EXPECT:
            head.expect_continue = value.lower() == b"100-continue"
        elif kind == ID:
            ids += 1
            head.request_id = value if ids == 1 and _REQUEST_ID.fullmatch(value) else b""
        elif kind == TRACE:
            traces += 1
            head.traceparent = value if traces == 1 and _TRACEPARENT.fullmatch(value) else b""
        elif kind == STATE:
            state = state + b"," + value if state else value
        elif kind == FOR_API:
            head.for_api = (*head.for_api, value)
    if head.chunked:
        if head.content_length != NO_BODY:
            raise HeadError("both Content-Length and Transfer-Encoding")
        if not head.minor:
            raise HeadError("Transfer-Encoding in an HTTP/1.0 request")
    if connection and connection != b"keep-alive":
        tokens = _tokens(connection)
        head.keep_alive = b"close" not in tokens and (head.minor == 1 or b"keep-alive" in tokens)
        if upgrade and head.minor and b"upgrade" in tokens and not head.chunked and head.content_length <= 0:
            head.upgrade = _tunnels(upgrade)
        head.lines = _without(head.lines, tokens)
    elif connection:
        head.keep_alive = True
    if state and head.traceparent:
        head.lines.append(b"tracestate: " + state)


def parse_response(raw: bytes) -> ResponseHead:
    """Read a response head up to where its closing empty line begins. Raises HeadError."""
    lines = raw.split(b"\r\n")
    head = ResponseHead()
    head.raw = raw + HEAD_END
    status = _statuses.get(lines[0])
    if status is None:
        status = _learn_status(lines[0])
    head.status, start, minor = status
    kept = [start]
    connection = b""
    del lines[0]
    known = response_lines.known
    for line in lines:
        entry = known[line] if line in known else response_lines.learn(line)
        if entry is None:
            kept.append(line)
            continue
        kind, value, number = entry
        if kind == LENGTH:
            if head.content_length != NO_BODY:
                raise HeadError("more than one Content-Length field")
            head.content_length = number
            if head.status >= 200 and head.status != 204:
                kept.append(line)
        elif kind == CONNECTION:
            connection = connection + b"," + value if connection else value
        elif kind == KEEP_ALIVE:
            head.keep_alive_secs = _keep_alive_secs(value)
        elif kind == CODING:
            if head.chunked or value.lower() != b"chunked":
                raise HeadError("Transfer-Encoding must be exactly 'chunked'")
            head.chunked = True
        elif kind == UPGRADE:
            head.upgrade = value
    if head.chunked and head.content_length != NO_BODY:
        raise HeadError("both Content-Length and Transfer-Encoding")
    if not connection:
        head.keep_alive = minor == 1
    elif connection != b"keep-alive":
        tokens = _tokens(connection)
        head.keep_alive = b"close" not in tokens and (minor == 1 or b"keep-alive" in tokens)
        kept[1:] = _without(kept[1:], tokens)
    kept.append(b"")
    head.start = b"\r\n".join(kept)
    # the upstream closes idle connections after the time it gives: leave well before
    head.idle_secs = math.inf if head.keep_alive_secs == NO_PROMISE else head.keep_alive_secs * 0.8
    if head.keep_alive and head.content_length != NO_BODY and head.status >= 200 and head.status not in (204, 304):
        head.whole = len(head.raw) + head.content_length
        head.opening = head.start + b"X-Request-Id: "
    return head


def _learn_first(line: bytes) -> tuple[bytes, bytes, int]:
    """Check a request line: (method, target, minor version). Raises HeadError."""
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise HeadError(_bad_first(line, "request"))
    first = match[1], match[2], 1 if match[3] == b"1" else 0
    if len(line) <= MAX_KNOWN_BYTES and _first_twice.seen(line):
        if len(_firsts) >= MAX_KNOWN:
            _firsts.clear()
        _firsts[line] = first
    return first


def _learn_status(line: bytes) -> tuple[int, bytes, int]:
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise HeadError(_bad_first(line, "response"))
    status = int(match[2]), b"HTTP/1.1 " + match[2] + b" " + (match[3] or b""), int(match[1])
    if len(line) < 64:
        if len(_statuses) > 256:
            _statuses.clear()
        _statuses[line] = status
    return status


def _other_form(method: bytes, target: bytes, host: bytes) -> tuple[bytes, bytes]:
    """Turn the absolute and asterisk forms into (target to send, host to route by); RFC 9112 section 3.2."""
    if target == b"*" and method == b"OPTIONS":
        return target, host
    match = _ABSOLUTE.fullmatch(target)
    if match is None or method == b"CONNECT":
        raise HeadError("the request target is neither a path nor an http URL")
    authority, path = match.groups()
    if not HOST.fullmatch(authority):
        raise HeadError("the request target does not name a host")
    return (path if path.startswith(b"/") else b"/" + path), authority


def _tokens(connection: bytes) -> list[bytes]:
    return [token.strip(b" \t") for token in connection.lower().split(b",")]


def _without(lines: list[bytes], names: list[bytes]) -> list[bytes]:
    """`lines` less the fields that a Connection field names."""
    named = frozenset(names) - _UNNAMED
    return [line for line in lines if line[: line.index(b":")].lower() not in named] if named else lines


def _tunnels(upgrade: bytes) -> bytes:
    """The Upgrade field unless it asks for HTTP/2, which would carry requests past the edge unseen."""
    return b"" if any(token.strip(b" \t").lower() in (b"h2c", b"h2") for token in upgrade.split(b",")) else upgrade


def _keep_alive_secs(value: bytes) -> int:
    for part in value.lower().split(b","):
        name, _, number = part.strip(b" \t").partition(b"=")
        if name == b"timeout" and number.isdigit() and len(number) < 10:
            return int(number)
    return NO_PROMISE


def _bad_first(line: bytes, what: str) -> str:
    return STRAY_MESSAGE if has_stray_control(line) else f"the {what} line is malformed"


_first_twice: Final = Twice()
_firsts: Final[dict[bytes, tuple[bytes, bytes, int]]] = {}
_statuses: Final[dict[bytes, tuple[int, bytes, int]]] = {}
