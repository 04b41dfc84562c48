"""The express lane: a plain request whose whole answer comes in one read, under a head seen before.

Most answers are like that. What goes this way could as well go through `upstream` and `exchange`, with the same bytes
to the client and the same record: the lane looks before it changes anything, and leaves all that is not exactly so to
them (`tests/unit/test_edge_express.py` compares the two).
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from aether.edge.exchange import Exchange
    from aether.edge.upstream import UpstreamConnection

_join: Final = b"".join


def relay_whole(upstream: UpstreamConnection, exchange: Exchange, data: bytes) -> bool:
    """Pass on the first bytes of the answer to a plain request when they are all of it; else do nothing, give False.

    Holds by then: the request is out and complete, so that its connection can be used again; `data` starts with a
    valid head that keeps the connection open and gives the length (`known.whole` is set for no other), so that it
    goes on with no other framing; nothing is paused or about to close.
    """
    backend = upstream.backend
    known = backend.known
    client = exchange.client
    if (
        len(data) != known.whole
        or not data.startswith(known.raw)
        or upstream.paused
        or upstream.write_paused
        or client.edge.closing
    ):
        return False
    now = monotonic()
    upstream.exchange = None
    upstream.reused = True
    pool_secs = exchange.pool_secs
    upstream.idle_until = now + (pool_secs if pool_secs <= known.idle_secs else known.idle_secs)
    backend.give(upstream, exchange.pool_size)
    # in the pool its reading must not be stopped any more by a full send buffer, so it is let go before the write
    exchange.upstream = None
    raw = known.raw
    client.transport.write(_join((known.opening, exchange.request_id, exchange.ending, data[len(raw) :])))
    exchange.answering = True
    exchange.status = known.status
    exchange.upstream_secs = now - exchange.sent_at
    exchange.bytes_out = known.content_length
    exchange.settle(now)
    client.exchange_done(True)
    return True
