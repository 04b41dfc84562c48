"""Requests through the edge as spans. Made only when traces are exported; the edge then draws its trace parents here.

Whether a trace is recorded is decided before the request goes on, so that the app behind hears of it; the span itself
is made when the request is over.
"""

from __future__ import annotations

import random
import time

from aether.edge.headers import TraceParents
from aether.edge.options import RecordSink, RequestRecord
from aether.observability.tracing import SERVER, Recorder, Span


class EdgeSpans(TraceParents):
    """`record` is called with every finished request."""

    __slots__ = ("_open", "_recorder")

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._open: dict[bytes, tuple[bytes, bytes]] = {}
        """What was sent → span id, and its parent's or nothing; of recorded requests that are not over."""

    def new_id(self) -> bytes:
        made = super().new_id()
        if self._recorder.samples(made.decode("ascii"), None):
            span = _span_id()
            self.tail = b"-%b-01" % span
            self._open[made] = span, b""
        else:
            self.tail = b"-%b-00" % _span_id()
        return made

    def new(self) -> bytes:
        made = self.new_id()
        value = b"00-" + made + self.tail
        if (found := self._open.pop(made, None)) is not None:
            self._open[value] = found
        return value

    def continued(self, traceparent: bytes) -> bytes:
        if not self._recorder.samples(traceparent[3:35].decode("ascii"), bool(int(traceparent[53:55], 16) & 1)):
            return traceparent
        span = _span_id()
        value = b"00-%b-%b-01" % (traceparent[3:35], span)
        self._open[value] = span, traceparent[36:52]
        return value

    def unused(self) -> bytes:
        return super().new_id()

    def beside(self, sink: RecordSink) -> RecordSink:
        """A sink that serves `sink` and then this."""
        record = self.record

        def both(request: RequestRecord) -> None:
            sink(request)
            record(request)

        return both

    def record(self, request: RequestRecord) -> None:
        found = self._open.pop(request.trace, None)
        if found is None:
            return
        span_id, parent_id = found
        now_ns = time.time_ns()
        trace = request.trace if len(request.trace) == 32 else request.trace[3:35]
        method = request.method.decode("ascii", "replace")
        span = Span(
            method,
            trace.decode("ascii"),
            span_id.decode("ascii"),
            parent_id.decode("ascii"),
            kind=SERVER,
            start_ns=now_ns - int(request.duration * 1e9),
            attributes={
                "http.request.method": method,
                "http.response.status_code": request.status,
                "http.request.body.size": request.bytes_in,
                "http.response.body.size": request.bytes_out,
                "aether.upstream_ms": round(request.upstream_secs * 1000, 3),
                **({"aether.app": str(request.app)} if request.app is not None else {}),
            },
        )
        if request.aborted:
            span.failure = "the answer began and did not end"
        elif request.status >= 500:
            span.failure = f"answered {request.status}"
        span.end()


def _span_id() -> bytes:
    return b"%016x" % (random.getrandbits(64) or 1)
