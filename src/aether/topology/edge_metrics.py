"""The edge's counters as Prometheus metrics, read when scraped; the hot path only adds to plain integers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from aether.edge.access_log import AccessLog
from aether.edge.functions import FunctionName
from aether.edge.options import EdgeCounters, RequestRecord
from aether.edge.table import CountedApp

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds in seconds of the request duration histogram."""
_CLASSES = ("1xx", "2xx", "3xx", "4xx", "5xx")
_STATUSES = 1000


class EdgeMetrics(Collector):
    """`record` is the edge's sink for requests; `counters` is set once the edge exists. No label names an app."""

    def __init__(self) -> None:
        self.counters = EdgeCounters()
        self.access_log: AccessLog | None = None
        self._answers = [0] * _STATUSES
        self._buckets = [0] * (len(BUCKETS) + 1)
        self._seconds = 0.0

    def record(self, request: RequestRecord) -> None:
        """Count a finished request to an app; those to the API are counted by route there, those to functions as
        invocations."""
        app = request.app
        if type(app) is FunctionName:
            app.answered(request)
        elif app is not None:
            duration = request.duration
            self._buckets[bisect_left(BUCKETS, duration)] += 1
            self._seconds += duration
            self._answers[request.status] += 1
            if type(app) is CountedApp:
                app.answered(request.status, request.upstream_secs)

    def collect(self) -> Iterator[Metric]:
        counters = self.counters
        yield GaugeMetricFamily("edge_connections", "Client connections now open.", value=counters.connections)
        for name, text, value in (
            ("edge_accepted_connections", "Client connections accepted.", counters.accepted),
            ("edge_refused_connections", "Client connections refused at the limit.", counters.refused_connections),
            ("edge_tls_handshakes", "TLS handshakes that succeeded.", counters.handshakes),
            ("edge_tls_handshake_failures", "TLS handshakes that did not.", counters.handshake_failures),
            ("edge_tunnels", "Requests that became WebSocket or other tunnels.", counters.tunnels),
            ("edge_dials", "Connections opened to instances and the API.", counters.dials),
            ("edge_dial_failures", "Connections that could not be opened.", counters.dial_failures),
            ("edge_retries", "Idempotent requests sent again on a fresh connection.", counters.retries),
            ("edge_aborted_requests", "Answers that began and did not end.", counters.aborted),
        ):
            yield CounterMetricFamily(name, text, value=value)
        if self.access_log is not None:
            log = self.access_log
            yield CounterMetricFamily("edge_access_log_lines", "Lines of the access log written.", value=log.written)
            yield CounterMetricFamily("edge_access_log_dropped_lines", "Lines it could not take.", value=log.dropped)
        answers = CounterMetricFamily("edge_app_requests", "Requests to apps by status class.", labels=["status"])
        for number, status in enumerate(_CLASSES, 1):
            # what lies beyond is a server's failure too (RFC 9110 section 15)
            end = _STATUSES if number == len(_CLASSES) else number * 100 + 100
            answers.add_metric([status], sum(self._answers[number * 100 : end]))
        yield answers
        errors = CounterMetricFamily("edge_errors", "Answers of the edge's own by status.", labels=["status"])
        for status, value in sorted(counters.errors.items()):
            errors.add_metric([str(status)], value)
        yield errors
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self._buckets, strict=True):
            total += count
            buckets.append((bound, total))
        histogram = HistogramMetricFamily("edge_app_request_duration_seconds", "From head to end of the answer.")
        histogram.add_metric([], buckets, self._seconds)
        yield histogram
