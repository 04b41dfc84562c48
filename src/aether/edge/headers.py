"""The heads the edge writes: to an upstream, and back to the client; pure.

`head` has already taken out hop-by-hop fields and the fields that only the edge may set; here they are set.
"""

from __future__ import annotations

import os
from typing import Final

from aether.edge.head import RequestHead, ResponseHead


class TraceParents:
    """Makes W3C `traceparent` values; draws randomness for many at once, because a system call per request shows."""

    __slots__ = ("_at", "_hex", "_span")

    _BATCH: Final = 256
    _DIGITS: Final = 32

    def __init__(self) -> None:
        self._hex = b""
        self._span = b""
        self._at = 0

    def new(self) -> bytes:
        """A trace id of its own; the span id is shared by a batch, as it need only be unique within its trace."""
        at = self._at
        if at >= len(self._hex):
            self._hex = os.urandom(self._BATCH * self._DIGITS // 2).hex().encode("ascii")
            self._span = b"-%b-01" % os.urandom(8).hex().encode("ascii")
            at = 0
        self._at = end = at + self._DIGITS
        return b"00-" + self._hex[at:end] + self._span


def trace_id(traceparent: bytes) -> bytes:
    """The 32 hex characters of the trace."""
    return traceparent[3:35]


def forwarded_prefix(peer: str, scheme: bytes) -> bytes:
    """The fields that are the same for every request of a client connection."""
    return b"X-Forwarded-For: %b\r\nX-Forwarded-Proto: %b\r\nX-Forwarded-Host: " % (peer.encode("ascii"), scheme)


def upstream_request(head: RequestHead, forwarded: bytes, request_id: bytes, traceparent: bytes) -> bytes:
    """The whole request head to send; `forwarded` comes from `forwarded_prefix`."""
    host = head.host
    lines = head.lines
    if head.chunked:
        lines.append(b"Transfer-Encoding: chunked")
    if head.expect_continue and head.minor:
        lines.append(b"Expect: 100-continue")
    if head.upgrade:
        lines.append(b"Connection: Upgrade\r\nUpgrade: " + head.upgrade)
    lines.append(b"")
    return b"%b %b HTTP/1.1\r\nHost: %b\r\n%b%b%b\r\nX-Request-Id: %b\r\ntraceparent: %b\r\n\r\n" % (
        head.method,
        head.target,
        host,
        b"\r\n".join(lines),
        forwarded,
        host,
        request_id,
        traceparent,
    )


def client_response(head: ResponseHead, request_id: bytes, framing: bytes) -> bytes:
    """The whole response head to send; `framing` holds complete lines (length or coding, Connection)."""
    return b"%b%bX-Request-Id: %b\r\n\r\n" % (head.start, framing, request_id)


def interim_response(head: ResponseHead) -> bytes:
    """A 1xx head to pass on (100, 102, 103)."""
    return head.start + b"\r\n"


def switching_response(head: ResponseHead, request_id: bytes) -> bytes:
    """The 101 head; the tunnel follows it."""
    return client_response(head, request_id, b"Connection: Upgrade\r\nUpgrade: %b\r\n" % head.upgrade)
