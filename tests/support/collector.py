"""An OpenTelemetry collector as far as its wire goes: takes OTLP over HTTP in protobuf and keeps what it was sent."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass
class SeenSpan:
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    start_ns: int
    end_ns: int
    failed: bool
    attributes: dict[str, Any]
    resource: dict[str, Any]


@dataclass
class Collector:
    """`status` is what it answers, `delay_secs` how long it takes to."""

    url: str = ""
    status: int = 200
    delay_secs: float = 0.0
    requests: int = 0
    spans: list[SeenSpan] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    """Name → the metric as it came last."""
    headers: list[dict[str, str]] = field(default_factory=list)

    def trace(self, trace_id: str) -> list[SeenSpan]:
        return [span for span in list(self.spans) if span.trace_id == trace_id]

    def wait(self, what: Callable[[], object], secs: float = 20.0) -> Any:
        until = time.monotonic() + secs
        while not (found := what()):
            assert time.monotonic() < until, f"the collector waited too long; it has {[s.name for s in self.spans]}"
            time.sleep(0.02)
        return found

    def take(self, path: str, body: bytes) -> None:
        if path == "/v1/traces":
            message = ExportTraceServiceRequest.FromString(body)
            for group in message.resource_spans:
                resource = _attributes(group.resource.attributes)
                for scope in group.scope_spans:
                    self.spans += [_span(span, resource) for span in scope.spans]
        elif path == "/v1/metrics":
            for group in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                for scope in group.scope_metrics:
                    self.metrics |= {metric.name: metric for metric in scope.metrics}


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def _span(span: Any, resource: dict[str, Any]) -> SeenSpan:
    return SeenSpan(
        span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.kind,
        span.start_time_unix_nano, span.end_time_unix_nano, span.status.code == 2, _attributes(span.attributes),
        resource,
    )  # fmt: skip


@contextmanager
def collector() -> Iterator[Collector]:
    it = Collector()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            it.requests += 1
            it.headers.append({name.lower(): value for name, value in self.headers.items()})
            time.sleep(it.delay_secs)
            if it.status == 200:
                it.take(self.path, body)
            self.send_response(it.status)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    it.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield it
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
