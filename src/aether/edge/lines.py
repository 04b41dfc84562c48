"""One header line: its grammar, what it means to the edge, and a memory of the lines that come again; pure.

What a head as a whole must look like is the business of `head`.
"""

from __future__ import annotations

import re
from typing import Final

TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
TEXT: Final = rb"[\t\x20-\x7e\x80-\xff]"
_FIELD: Final = re.compile(rb"(" + TOKEN + rb"++):[ \t]*+(" + TEXT + rb"*+)")
HOST: Final = re.compile(rb"(?:[A-Za-z0-9._\-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?")
_STRAY: Final = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\x00")

MAX_KNOWN: Final = 4096
MAX_KNOWN_BYTES: Final = 256

_MAX_LENGTH_DIGITS: Final = 18

HOST_FIELD, LENGTH, CODING, CONNECTION, UPGRADE, EXPECT, ID, TRACE, STATE, KEEP_ALIVE, FOR_API, DROP = range(12)
_REQUEST_FIELDS: Final[dict[bytes, int]] = {
    b"host": HOST_FIELD,
    b"content-length": LENGTH,
    b"transfer-encoding": CODING,
    b"connection": CONNECTION,
    b"upgrade": UPGRADE,
    b"expect": EXPECT,
    b"x-request-id": ID,
    b"traceparent": TRACE,
    b"tracestate": STATE,
    b"keep-alive": DROP,
    b"proxy-connection": DROP,
    b"proxy-authorization": DROP,
    b"te": DROP,
    b"trailer": DROP,
    b"http2-settings": DROP,
    b"forwarded": DROP,
    b"x-real-ip": DROP,
    # what a client says of an upload; no app may see them, which could take them for words of the edge
    b"x-aether-artifact-digest": FOR_API,
    b"x-aether-signature": FOR_API,
    b"x-aether-app": FOR_API,
    b"x-aether-runtime": FOR_API,
}
_RESPONSE_FIELDS: Final[dict[bytes, int]] = {
    b"content-length": LENGTH,
    b"transfer-encoding": CODING,
    b"connection": CONNECTION,
    b"upgrade": UPGRADE,
    b"keep-alive": KEEP_ALIVE,
    b"x-request-id": DROP,
    b"proxy-connection": DROP,
    b"proxy-authenticate": DROP,
    b"te": DROP,
    b"trailer": DROP,
}
STRAY_MESSAGE: Final = "the head has a bare CR, a bare LF or a NUL byte"
_OWNED_PREFIXES: Final = (b"x-aether-", b"x-forwarded-")


class HeadError(Exception):
    """A head that must be refused; `message` says why in a sentence part."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Twice:
    """Tells lines that come again from those that come once, so that only the former are kept; bounded."""

    __slots__ = ("_marks",)

    def __init__(self) -> None:
        self._marks: set[int] = set()

    def seen(self, line: bytes | tuple[bytes | None, bytes]) -> bool:
        mark = hash(line)
        if mark in self._marks:
            return True
        if len(self._marks) >= MAX_KNOWN:
            self._marks.clear()
        self._marks.add(mark)
        return False


Entry = tuple[int, bytes, int]


class _Lines:
    """Field lines already found valid, by their bytes: most lines of most messages repeat.

    Maps a line to None when it passes unchanged, else to its kind, value (the line of what is for the API alone) and
    number (of a Content-Length). Bounded;
    forgets all when full. Lines that carry credentials or are long are not kept.
    """

    __slots__ = ("_kinds", "_twice", "known", "owned")

    _SECRET: Final = frozenset((b"authorization", b"cookie", b"set-cookie", b"proxy-authorization"))

    def __init__(self, kinds: dict[bytes, int], *, owned: bool) -> None:
        self._kinds = kinds
        self._twice = Twice()
        self.owned = owned
        self.known: dict[bytes, Entry | None] = {}

    def learn(self, line: bytes) -> Entry | None:
        """Check and classify a line. Raises HeadError."""
        match = _FIELD.fullmatch(line)
        if match is None:
            raise HeadError(_why_not(line))
        name = match[1].lower()
        kind = self._kinds.get(name)
        if kind is None and self.owned and (name[0] == 0x78 or b"_" in name) and _owned(name):
            kind = DROP
        entry: Entry | None = None
        if kind is not None:
            value = match[2].rstrip(b" \t")
            if kind == HOST_FIELD and not HOST.fullmatch(value):
                raise HeadError("the Host field does not name a host")
            entry = kind, line if kind == FOR_API else value, _length(value) if kind == LENGTH else 0
        if len(line) <= MAX_KNOWN_BYTES and name not in self._SECRET and self._twice.seen(line):
            if len(self.known) >= MAX_KNOWN:
                self.known.clear()
            self.known[line] = entry
        return entry


def has_stray_control(partial: bytes) -> bool:
    """True when an unfinished head already holds a bare CR, bare LF or NUL, so waiting for its end is useless."""
    return _STRAY.search(partial) is not None


def _owned(name: bytes) -> bool:
    """True for a field only the edge may set, also spelt with `_`: CGI and WSGI read both spellings as one."""
    plain = name.replace(b"_", b"-")
    return plain.startswith(_OWNED_PREFIXES) or (plain != name and plain in _REQUEST_FIELDS)


def _length(value: bytes) -> int:
    if not value.isdigit() or len(value) > _MAX_LENGTH_DIGITS:
        raise HeadError("Content-Length is not a number")
    return int(value)


def _why_not(line: bytes) -> str:
    """Name what is wrong with a field line that the grammar refused."""
    if has_stray_control(line):
        return STRAY_MESSAGE
    if line[:1] in (b" ", b"\t"):
        return "a header field is folded over several lines"
    return "a header field has a malformed name or a control byte in its value"


request_lines: Final = _Lines(_REQUEST_FIELDS, owned=True)
response_lines: Final = _Lines(_RESPONSE_FIELDS, owned=False)
