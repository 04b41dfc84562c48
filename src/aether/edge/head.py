"""Message heads of HTTP/1.x: strict validation and classification, pure (bytes in, fields out).

One grammar decides (RFC 9112 sections 2 to 6, without its tolerances): a head that matches it is read in the same
way by every server, and whatever could be read in two ways is refused, which is what stops request smuggling.
Rewriting is the business of `headers`, body framing of `body`, routing of `table`.
"""

from __future__ import annotations

import math
import re
from typing import Final

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_TEXT: Final = rb"[\t\x20-\x7e\x80-\xff]"
_REQUEST_LINE: Final = re.compile(rb"(" + _TOKEN + rb"{1,32}) ([\x21-\x7e]++) HTTP/1\.([01])")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: (" + _TEXT + rb"*+))?")
_FIELD: Final = re.compile(rb"(" + _TOKEN + rb"++):[ \t]*+(" + _TEXT + rb"*+)")
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._\-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?")
_ABSOLUTE: Final = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://([^/?#]*)([^#]*)")
_REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")
_TRACEPARENT: Final = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_STRAY: Final = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\x00")

HEAD_END: Final = b"\r\n\r\n"
NO_BODY: Final = -1
"""`content_length` of a head that carries none."""

_MAX_KNOWN: Final = 4096
_MAX_KNOWN_BYTES: Final = 256

NO_PROMISE: Final = -1
"""`keep_alive_secs` of a head that says nothing about it."""

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
_STRAY_MESSAGE: Final = "the head has a bare CR, a bare LF or a NUL byte"
_UNNAMED: Final = frozenset((b"keep-alive", b"close", b"upgrade", b"", b"content-length"))
"""Connection options that are no field names, and the one end-to-end field whose loss would change the framing."""

_PLAIN: Final = frozenset((b"GET", b"OPTIONS"))
"""Methods whose repetition does no harm and whose answer is framed as any other, unlike that of HEAD."""

_OWNED_PREFIXES: Final = (b"x-aether-", b"x-forwarded-")


class HeadError(Exception):
    """A head that must be refused; `message` says why in a sentence part."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


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


class _Twice:
    """Tells lines that come again from those that come once, so that only the former are kept; bounded."""

    __slots__ = ("_marks",)

    def __init__(self) -> None:
        self._marks: set[int] = set()

    def seen(self, line: bytes) -> bool:
        mark = hash(line)
        if mark in self._marks:
            return True
        if len(self._marks) >= _MAX_KNOWN:
            self._marks.clear()
        self._marks.add(mark)
        return False


_Entry = tuple[int, bytes, int]


class _Lines:
    """Field lines already found valid, by their bytes: most lines of most messages repeat.

    Maps a line to None when it passes unchanged, else to its kind, value and number (of a Content-Length). Bounded;
    forgets all when full. Lines that carry credentials or are long are not kept.
    """

    __slots__ = ("_kinds", "_twice", "known", "owned")

    _SECRET: Final = frozenset((b"authorization", b"cookie", b"set-cookie", b"proxy-authorization"))

    def __init__(self, kinds: dict[bytes, int], *, owned: bool) -> None:
        self._kinds = kinds
        self._twice = _Twice()
        self.owned = owned
        self.known: dict[bytes, _Entry | None] = {}

    def learn(self, line: bytes) -> _Entry | None:
        """Check and classify a line. Raises HeadError."""
        match = _FIELD.fullmatch(line)
        if match is None:
            raise HeadError(_why_not(line))
        name = match[1].lower()
        kind = self._kinds.get(name)
        if kind is None and self.owned and (name[0] == 0x78 or b"_" in name) and _owned(name):
            kind = _DROP
        entry: _Entry | None = None
        if kind is not None:
            value = match[2].rstrip(b" \t")
            if kind == _HOST_FIELD and not _HOST.fullmatch(value):
                raise HeadError("the Host field does not name a host")
            entry = kind, value, _length(value) if kind == _LENGTH else 0
        if len(line) <= _MAX_KNOWN_BYTES and name not in self._SECRET and self._twice.seen(line):
            if len(self.known) >= _MAX_KNOWN:
                self.known.clear()
            self.known[line] = entry
        return entry


def has_stray_control(partial: bytes) -> bool:
    """True when an unfinished head already holds a bare CR, bare LF or NUL, so waiting for its end is useless."""
    return _STRAY.search(partial) is not None


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
    rare: list[_Entry] | None = None
    known = _request_lines.known
    for line in lines:
        entry = known[line] if line in known else _request_lines.learn(line)
        if entry is None:
            kept.append(line)
        elif entry[0] == _HOST_FIELD:
            if host:
                raise HeadError("more than one Host field")
            host = entry[1]
        elif entry[0] == _LENGTH:
            if head.content_length != NO_BODY:
                raise HeadError("more than one Content-Length field")
            head.content_length = entry[2]
            kept.append(line)
        elif entry[0] != _DROP:
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


def _take_rare(head: RequestHead, fields: list[_Entry]) -> None:
    """Apply the fields that mean something to the edge itself."""
    connection = upgrade = state = b""
    ids = traces = 0
    for kind, value, _ in fields:
        if kind == _CONNECTION:
            connection = connection + b"," + value if connection else value
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
    known = _response_lines.known
    for line in lines:
        entry = known[line] if line in known else _response_lines.learn(line)
        if entry is None:
            kept.append(line)
            continue
        kind, value, number = entry
        if kind == _LENGTH:
            if head.content_length != NO_BODY:
                raise HeadError("more than one Content-Length field")
            head.content_length = number
            if head.status >= 200 and head.status != 204:
                kept.append(line)
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
    if len(line) <= _MAX_KNOWN_BYTES and _first_twice.seen(line):
        if len(_firsts) >= _MAX_KNOWN:
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


def _owned(name: bytes) -> bool:
    """True for a field only the edge may set, also spelt with `_`: CGI and WSGI read both spellings as one."""
    plain = name.replace(b"_", b"-")
    return plain.startswith(_OWNED_PREFIXES) or (plain != name and plain in _REQUEST_FIELDS)


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
    authority, path = match.groups()
    if not _HOST.fullmatch(authority):
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
    return _STRAY_MESSAGE if has_stray_control(line) else f"the {what} line is malformed"


def _why_not(line: bytes) -> str:
    """Name what is wrong with a field line that the grammar refused."""
    if has_stray_control(line):
        return _STRAY_MESSAGE
    if line[:1] in (b" ", b"\t"):
        return "a header field is folded over several lines"
    return "a header field has a malformed name or a control byte in its value"


_request_lines: Final = _Lines(_REQUEST_FIELDS, owned=True)
_response_lines: Final = _Lines(_RESPONSE_FIELDS, owned=False)
_first_twice: Final = _Twice()
_firsts: Final[dict[bytes, tuple[bytes, bytes, int]]] = {}
_statuses: Final[dict[bytes, tuple[int, bytes, int]]] = {}
