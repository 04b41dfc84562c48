"""What runs of functions as Prometheus metrics, read when scraped. No label names a function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from aether.functions.board import Stage
from aether.functions.engine import FunctionEngine


class FunctionMetrics(Collector):
    def __init__(self, engine: FunctionEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        stages = Counter(
            entry.record.stage for instances in engine.board.instances.values() for entry in instances.values()
        )
        gauge = GaugeMetricFamily("function_instances", "Instances of functions by stage.", labels=["stage"])
        for stage in Stage:
            gauge.add_metric([stage.value], stages[stage])
        yield gauge
        yield GaugeMetricFamily("function_waiting", "Calls that wait for an instance.", value=engine.waiting())
        done = CounterMetricFamily(
            "function_invocations", "Calls by status class and how their instance was started.",
            labels=["status", "start"],
        )  # fmt: skip
        for (status, start), count in sorted(engine.ledger.counted.items()):
            done.add_metric([status, start], count)
        yield done
        yield CounterMetricFamily(
            "function_dropped_records", "Records of calls that could not be kept.", value=engine.ledger.dropped
        )
        failed = sum(failure.count for failure in engine.board.failures.values())
        yield GaugeMetricFamily(
            "function_failed_instances", "Instances that failed, of functions there are.", value=failed
        )
