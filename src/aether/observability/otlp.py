"""Spans and metrics to an OpenTelemetry collector: OTLP over HTTP in protobuf. Loaded only when it is asked for.

Work never waits for a collector: spans are put into a bounded queue and a thread sends them in batches, metrics are
read and sent by another. What a slow or missing collector cannot take is dropped; that is said once per outage.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from urllib.parse import unquote

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics.export import MetricExportResult
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
from prometheus_client import CollectorRegistry

from aether import __version__
from aether.model.names import new_id
from aether.observability import otlp_metrics
from aether.observability.logging import logger
from aether.observability.telemetry import Telemetry
from aether.observability.tracing import SERVER, Span

SHUTDOWN_SECS = 3.0
_log = logger(__name__)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_UNSET = Status(StatusCode.UNSET)
_SCOPE = InstrumentationScope("aether", __version__)


class Otlp:
    """The exports of one server. Implements `tracing.Recorder`; `close` sends what is left, within a bound."""

    def __init__(self, telemetry: Telemetry, registry: CollectorRegistry, environ: Mapping[str, str]) -> None:
        self._sampling = telemetry.sampling
        # what the exporters say of every single failure would flood the log; `_Outage` says it once
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._resource = _resource(environ)
        self._spans: BatchSpanProcessor | None = None
        if telemetry.traces:
            exporter = OTLPSpanExporter(timeout=telemetry.timeout_secs["TRACES"])
            self._spans = BatchSpanProcessor(_Quiet(exporter, "traces"))
        self._metrics: _MetricsThread | None = None
        if telemetry.metrics:
            sender = OTLPMetricExporter(timeout=telemetry.timeout_secs["METRICS"])
            self._metrics = _MetricsThread(sender, registry, self._resource, telemetry.interval_secs)

    @property
    def traces(self) -> bool:
        return self._spans is not None

    def samples(self, trace_id: str, parent: bool | None) -> bool:
        return self._spans is not None and self._sampling.samples(trace_id, parent)

    def record(self, span: Span) -> None:
        if self._spans is not None:
            self._spans.on_end(_readable(span, self._resource))

    def close(self, within_secs: float = SHUTDOWN_SECS) -> None:
        """Send what is left for at most `within_secs`; blocks."""
        closing = [
            threading.Thread(target=part.shutdown, name="otlp-close", daemon=True)
            for part in (self._spans, self._metrics)
            if part is not None
        ]
        until = time.monotonic() + within_secs
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(max(0.0, until - time.monotonic()))
        if any(thread.is_alive() for thread in closing):
            _log.warning("the OpenTelemetry collector did not take the last spans or metrics in time")


class _Outage:
    """Says when an export begins to fail and when it works again, and nothing in between."""

    def __init__(self, signal: str) -> None:
        self._signal = signal
        self._failing = False
        self._failures = 0

    def heard(self, good: bool) -> None:
        if not good:
            self._failures += 1
            if not self._failing:
                self._failing = True
                _log.warning(
                    "the OpenTelemetry collector does not take what is sent; it is dropped until it does",
                    signal=self._signal,
                    hint="see OTEL_EXPORTER_OTLP_ENDPOINT and the collector's own log",
                )
        elif self._failing:
            self._failing = False
            _log.info("the OpenTelemetry collector answers again", signal=self._signal, lost_batches=self._failures)
            self._failures = 0


class _Quiet(SpanExporter):
    def __init__(self, exporter: SpanExporter, signal: str) -> None:
        self._exporter = exporter
        self._outage = _Outage(signal)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        self._outage.heard(result is SpanExportResult.SUCCESS)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class _MetricsThread:
    """Reads and sends the metrics every so often, and once more at the end."""

    def __init__(
        self, exporter: OTLPMetricExporter, registry: CollectorRegistry, resource: Resource, interval_secs: float
    ) -> None:
        self._registry = registry
        self._resource = resource
        self._interval_secs = interval_secs
        self._began_ns = time.time_ns()
        self._exporter = exporter
        self._outage = _Outage("metrics")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp-metrics", daemon=True)
        self._thread.start()

    def shutdown(self) -> None:
        self._stop.set()
        self._thread.join()
        self._exporter.shutdown()  # pyright: ignore[reportUnknownMemberType]

    def _run(self) -> None:
        while True:
            stopping = self._stop.wait(self._interval_secs)
            data = otlp_metrics.read(self._registry, self._resource, _SCOPE, self._began_ns)
            result = self._exporter.export(data)  # pyright: ignore[reportUnknownMemberType]
            self._outage.heard(result is MetricExportResult.SUCCESS)
            if stopping:
                return


def _resource(environ: Mapping[str, str]) -> Resource:
    """What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say, over what is known without them."""
    own: dict[str, str | int] = {
        "service.name": "aether",
        "service.version": __version__,
        "service.instance.id": new_id(),
        "host.name": socket.gethostname(),
        "process.pid": os.getpid(),
    }
    given: dict[str, str] = {}
    for pair in environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","):
        name, equals, value = pair.partition("=")
        if equals and name.strip():
            given[name.strip()] = unquote(value.strip())
    if name := environ.get("OTEL_SERVICE_NAME", "").strip():
        given["service.name"] = name
    return Resource(own | given)


def _readable(span: Span, resource: Resource) -> ReadableSpan:
    trace = int(span.trace_id, 16)
    parent = SpanContext(trace, int(span.parent_id, 16), True, _SAMPLED) if span.parent_id else None
    return ReadableSpan(
        span.name,
        context=SpanContext(trace, int(span.span_id, 16), False, _SAMPLED),
        parent=parent,
        resource=resource,
        attributes=span.attributes,
        kind=SpanKind.SERVER if span.kind == SERVER else SpanKind.INTERNAL,
        status=_UNSET if span.failure is None else Status(StatusCode.ERROR, span.failure),
        start_time=span.start_ns,
        end_time=span.end_ns,
        instrumentation_scope=_SCOPE,
    )
