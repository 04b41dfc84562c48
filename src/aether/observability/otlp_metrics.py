"""The Prometheus registry as OpenTelemetry metrics, read at the moment of export; names and labels stay the same."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.samples import Sample

_CUMULATIVE = AggregationTemporality.CUMULATIVE
_Labels = tuple[tuple[str, str], ...]


def read(registry: CollectorRegistry, resource: Resource, scope: InstrumentationScope, began_ns: int) -> MetricsData:
    """Everything the registry knows now; counts are since `began_ns`."""
    now_ns = time.time_ns()
    metrics = [made for family in registry.collect() if (made := _metric(family, began_ns, now_ns)) is not None]
    return MetricsData([ResourceMetrics(resource, [ScopeMetrics(scope, metrics, "")], "")])


def _metric(family: Family, began_ns: int, now_ns: int) -> Metric | None:
    if family.type == "counter":
        samples = [sample for sample in family.samples if sample.name.endswith("_total")]
        points = [_number(sample, began_ns, now_ns) for sample in samples]
        data = Sum(points, aggregation_temporality=_CUMULATIVE, is_monotonic=True)
        return Metric(f"{family.name}_total", family.documentation, "", data) if points else None
    if family.type == "histogram":
        found = _histograms(family.samples, began_ns, now_ns)
        return Metric(family.name, family.documentation, "", Histogram(found, _CUMULATIVE)) if found else None
    points = [_number(sample, None, now_ns) for sample in family.samples if sample.name == family.name]
    return Metric(family.name, family.documentation, "", Gauge(points)) if points else None


def _number(sample: Sample, began_ns: int | None, now_ns: int) -> NumberDataPoint:
    return NumberDataPoint(dict(sample.labels), began_ns or 0, now_ns, float(sample.value))


def _histograms(samples: Sequence[Sample], began_ns: int, now_ns: int) -> list[HistogramDataPoint]:
    """Prometheus counts up to each bound from below, OpenTelemetry within each bucket."""
    buckets: dict[_Labels, list[tuple[float, float]]] = defaultdict(list)
    sums: dict[_Labels, float] = {}
    for sample in samples:
        labels = tuple(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
        if sample.name.endswith("_bucket"):
            buckets[labels].append((float(sample.labels["le"]), sample.value))
        elif sample.name.endswith("_sum"):
            sums[labels] = sample.value
    found: list[HistogramDataPoint] = []
    for labels, counts in buckets.items():
        counts.sort()
        below = [0.0, *(count for _, count in counts[:-1])]
        within = [int(count - before) for (_, count), before in zip(counts, below, strict=True)]
        found.append(
            HistogramDataPoint(
                attributes=dict(labels),
                start_time_unix_nano=began_ns,
                time_unix_nano=now_ns,
                count=int(counts[-1][1]),
                sum=sums.get(labels, 0.0),
                bucket_counts=within,
                explicit_bounds=[bound for bound, _ in counts[:-1]],
                min=0.0,
                max=0.0,
            )
        )
    return found
