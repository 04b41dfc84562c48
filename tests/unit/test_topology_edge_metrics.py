"""The edge's metrics in the text format."""

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from aether.edge.options import EdgeCounters, RequestRecord
from aether.topology.edge_metrics import EdgeMetrics


def record(app: str | None, status: int, duration: float) -> RequestRecord:
    return RequestRecord(app, b"GET", status, duration, 0.0, 0, 0, b"id", False)


def test_requests_are_counted_by_class_and_duration() -> None:
    metrics = EdgeMetrics()
    metrics.counters = EdgeCounters(connections=3, dials=2, errors={503: 4})
    for status, duration in ((200, 0.001), (204, 0.002), (404, 0.3), (503, 100.0)):
        metrics.record(record("shop", status, duration))
    metrics.record(record(None, 200, 0.001))
    registry = CollectorRegistry()
    registry.register(metrics)
    lines = set(generate_latest(registry).decode().splitlines())
    assert lines >= {
        "edge_connections 3.0",
        "edge_dials_total 2.0",
        'edge_errors_total{status="503"} 4.0',
        'edge_app_requests_total{status="2xx"} 2.0',
        'edge_app_requests_total{status="4xx"} 1.0',
        'edge_app_requests_total{status="5xx"} 1.0',
        'edge_app_request_duration_seconds_bucket{le="0.001"} 1.0',
        'edge_app_request_duration_seconds_bucket{le="0.0025"} 2.0',
        'edge_app_request_duration_seconds_bucket{le="60.0"} 3.0',
        'edge_app_request_duration_seconds_bucket{le="+Inf"} 4.0',
        "edge_app_request_duration_seconds_count 4.0",
    }


def test_a_status_beyond_all_classes_is_a_failure_of_the_app() -> None:
    metrics = EdgeMetrics()
    for status in (500, 599, 600, 999):
        metrics.record(record("shop", status, 0.001))
    registry = CollectorRegistry()
    registry.register(metrics)
    assert 'edge_app_requests_total{status="5xx"} 4.0' in generate_latest(registry).decode().splitlines()
