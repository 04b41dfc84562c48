"""Heads that are known but for their path and one line: most requests of a client differ in no more than that.

A head is learnt only after `head` has read it in full; what is kept of it is what surrounds the request target and
the first line with credentials, byte by byte, and what `head` made of that. A head is familiar when the same bytes
surround a target and a line of the same grammar, so reading it again in full could give nothing else
(`tests/unit/test_edge_familiar.py` compares the two). Credentials are never kept.
"""

from __future__ import annotations

import re
from typing import Final

from aether.edge.head import NO_BODY, RequestHead
from aether.edge.lines import TEXT, Twice

MAX_FAMILIAR: Final = 4096
"""Bytes of a head that may be familiar."""
_MAX_KEPT: Final = 1024
"""Bytes of the surroundings that are kept."""
_MAX_KNOWN: Final = 1024
_SECRET: Final = rb"(?:[Cc]ookie|[Aa]uthorization): "
_HEAD: Final = re.compile(
    # request line; then, if there is one, the first line with credentials and all lines before it
    rb"(GET (/[\x21-\x7e]*+) HTTP/1\.1)\r\n"
    rb"(?:((?:(?!" + _SECRET + rb")[^\r]++\r\n)*+)(" + _SECRET + TEXT + rb"*+)\r\n)?"
).match
_HIDDEN: Final = re.compile(rb"^(?:(?:proxy-)?authorization|cookie)[ \t]*:", re.IGNORECASE | re.MULTILINE).search
_join: Final = b"".join

_Around = tuple[bytes | None, bytes]
"""The lines before the one with credentials (None when there is none), and all that follows, to the last byte."""
_Made = tuple[bytes, bytes, bytes]
"""What is sent before and after the line with credentials, and the host."""
_twice: Final = Twice()
_known: Final[dict[_Around, _Made]] = {}


def recall(data: bytes, forwarded: bytes) -> RequestHead | None:
    """The plain head that `data` is, when it is that from its first to its last byte and familiar; else None."""
    match = _HEAD(data)
    if match is None:
        return None
    first, target, before, line = match.groups()
    around = before, data[match.end() :]
    if around not in _known:
        return None
    opening, closing, host = _known[around]
    head = RequestHead()
    head.method = b"GET"
    head.target = target
    head.host = host
    head.plain = True
    head.start = _join((first, opening, line or b"", closing, forwarded, host, b"\r\nX-Request-Id: "))
    return head


def learn(data: bytes, head: RequestHead) -> None:
    """Keep what surrounds a plain head that was read in full and is all of `data`, when it comes a second time."""
    match = _HEAD(data)
    if match is None or match[2] != head.target or not head.plain or head.content_length != NO_BODY:
        return
    before, line = match[3], match[4]
    around = before, data[match.end() :]
    if len(before or b"") + len(around[1]) > _MAX_KEPT or not _twice.seen(around):
        return
    if _HIDDEN(around[1]) or (before and _HIDDEN(before)):
        return
    lines = head.lines
    opening = b"\r\nHost: " + head.host + b"\r\n"
    if line is None:
        made = opening + _each(lines), b"", head.host
    else:
        if lines.count(line) != 1:
            return  # a Connection field has taken it out
        at = lines.index(line)
        made = opening + _each(lines[:at]), b"\r\n" + _each(lines[at + 1 :]), head.host
    if len(_known) >= _MAX_KNOWN:
        _known.clear()
    _known[around] = made


def _each(lines: list[bytes]) -> bytes:
    return _join([line + b"\r\n" for line in lines])
