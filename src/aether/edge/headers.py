"""The heads the edge writes: to an upstream, and back to the client; pure.

`head` has already taken out hop-by-hop fields and the fields that only the edge may set; here they are set.
"""

from __future__ import annotations

import os
from struct import Struct
from typing import Final

from aether.edge.head import HEAD_END, RequestHead, ResponseHead

_join: Final = b"".join
_BATCH: Final = 512
_ids_of: Final = Struct("32s" * _BATCH).unpack


class TraceParents:
    """Makes W3C `traceparent` values; draws randomness for many at once, because a system call per request shows."""

    __slots__ = ("_ids", "tail")

    def __init__(self) -> None:
        self._ids: list[bytes] = []
        self.tail = b""
        """What follows the id last taken: a span id shared by a batch, as it need only be unique within its trace."""

    def new_id(self) -> bytes:
        """A trace id of its own, 32 hex characters."""
        return self._ids.pop() if self._ids else self._more()

    def new(self) -> bytes:
        """A whole value with a trace id of its own."""
        return b"00-" + self.new_id() + self.tail

    def continued(self, traceparent: bytes) -> bytes:
        """What to send on for a client's own value."""
        return traceparent

    def unused(self) -> bytes:
        """A trace id for an answer to something that never became a request."""
        return self.new_id()

    def _more(self) -> bytes:
        digits = os.urandom(_BATCH * 16).hex().encode("ascii")
        self._ids = list(_ids_of(digits))
        self.tail = b"-%b-01" % os.urandom(8).hex().encode("ascii")
        return self._ids.pop()


def trace_id(trace: bytes) -> bytes:
    """The 32 hex characters of the trace; `trace` is they, or a whole `traceparent`."""
    return trace if len(trace) == 32 else trace[3:35]


def forwarded_prefix(peer: str, scheme: bytes) -> bytes:
    """The fields that are the same for every request of a client connection."""
    return b"X-Forwarded-For: %b\r\nX-Forwarded-Proto: %b\r\nX-Forwarded-Host: " % (peer.encode("ascii"), scheme)


def upstream_start(head: RequestHead, forwarded: bytes) -> bytes:
    """The request head to send, up to the value of X-Request-Id; `forwarded` comes from `forwarded_prefix`."""
    host = head.host
    lines = head.lines
    if head.chunked:
        lines.append(b"Transfer-Encoding: chunked")
    if head.expect_continue and head.minor:
        lines.append(b"Expect: 100-continue")
    if head.upgrade:
        lines.append(b"Connection: Upgrade\r\nUpgrade: " + head.upgrade)
    lines.append(b"")
    return b"%b %b HTTP/1.1\r\nHost: %b\r\n%b%b%b\r\nX-Request-Id: " % (
        head.method,
        head.target,
        host,
        b"\r\n".join(lines),
        forwarded,
        host,
    )


def upstream_request(start: bytes, request_id: bytes, traceparent: bytes) -> bytes:
    """The whole request head to send; `start` comes from `upstream_start`."""
    return _join((start, request_id, b"\r\ntraceparent: ", traceparent, b"\r\n\r\n"))


def traced_request(start: bytes, trace_id: bytes, tail: bytes) -> bytes:
    """The same for an id and `tail` of `TraceParents`; the id names the request too."""
    return _join((start, trace_id, b"\r\ntraceparent: 00-", trace_id, tail, b"\r\n\r\n"))


def client_response(head: ResponseHead, request_id: bytes, framing: bytes, ending: bytes = HEAD_END) -> bytes:
    """The whole response head to send; `framing` holds complete lines (length or coding, Connection)."""
    return b"%b%bX-Request-Id: %b%b" % (head.start, framing, request_id, ending)


def interim_response(head: ResponseHead) -> bytes:
    """A 1xx head to pass on (100, 102, 103)."""
    return head.start + b"\r\n"


def switching_response(head: ResponseHead, request_id: bytes) -> bytes:
    """The 101 head; the tunnel follows it."""
    return client_response(head, request_id, b"Connection: Upgrade\r\nUpgrade: %b\r\n" % head.upgrade)
