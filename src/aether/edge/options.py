"""Limits of the edge, what it counts, and the record it gives for every request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, cast

if TYPE_CHECKING:
    from aether.edge.pool import EdgeBackend


@dataclass(frozen=True, slots=True)
class EdgeOptions:
    """Durations in seconds, sizes in bytes; `max_body_bytes` 0 means no limit."""

    max_head_bytes: int = 32 * 1024
    max_body_bytes: int = 0
    """For requests to apps; the API has limits of its own."""
    max_connections: int = 10_000
    header_timeout_secs: float = 10.0
    """From the first byte of a request head to its end."""
    idle_timeout_secs: float = 75.0
    """A connection between requests, a stalled upload, or a client that reads nothing of a waiting answer."""
    handshake_timeout_secs: float = 10.0
    """From the connection to the end of the TLS handshake."""
    connect_timeout_secs: float = 5.0
    upstream_timeout_secs: float = 60.0
    """From the last byte sent upstream to the first byte of the answer."""
    stream_idle_secs: float = 300.0
    """Longest silence within an answer's body."""
    tunnel_idle_secs: float = 3600.0
    """Longest silence of both sides of an upgraded connection."""
    pool_idle_secs: float = 4.0
    """How long an unused upstream connection is kept; Node.js closes after 5 s."""
    pool_size: int = 128
    """Unused upstream connections kept per backend."""
    linger_secs: float = 2.0
    """How long a refused upload is still read, so that the client sees the answer and not a reset."""


class RequestRecord(NamedTuple):
    """One finished request. Durations in seconds."""

    app: str | None
    """None for the API and for hosts the edge does not know."""
    method: bytes
    status: int
    """What the client got; 499 when it left before an answer began."""
    duration: float
    upstream_secs: float
    """From sending the request upstream to the head of its answer; 0 when there was none."""
    bytes_in: int
    bytes_out: int
    """Body bytes of the request and the answer as payload."""
    request_id: bytes
    aborted: bool
    """The answer began and did not end."""
    host: bytes = b""
    target: bytes = b""
    address: bytes = b""
    """The client's."""
    trace: bytes = b""
    """What was sent upstream: a trace id of the edge's own, or a whole `traceparent`."""
    backend: EdgeBackend | None = None
    """Who was asked last."""
    ended: float = 0.0
    """Loop time of the end."""


_tuple: Final[type[tuple[object, ...]]] = tuple
_Fields = tuple[
    str | None,
    bytes,
    int,
    float,
    float,
    int,
    int,
    bytes,
    bool,
    bytes,
    bytes,
    bytes,
    bytes,
    "EdgeBackend | None",
    float,
]
new_record: Final = cast("Callable[[type[RequestRecord], _Fields], RequestRecord]", _tuple.__new__)
"""`RequestRecord(...)` as its own constructor makes it, without the call of a Python function for every request."""

RecordSink = Callable[[RequestRecord], None]


@dataclass(slots=True)
class EdgeCounters:
    """Totals since start; `connections` is the number now open."""

    connections: int = 0
    accepted: int = 0
    refused_connections: int = 0
    handshakes: int = 0
    """TLS handshakes that came to their end."""
    handshake_failures: int = 0
    requests: int = 0
    tunnels: int = 0
    dials: int = 0
    dial_failures: int = 0
    retries: int = 0
    aborted: int = 0
    errors: dict[int, int] = field(default_factory=dict[int, int])
    """The edge's own error answers by status."""
