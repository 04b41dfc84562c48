"""What runs of functions as Prometheus metrics, read when scraped. No label names a function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from aether.edge.functions import FunctionTable
from aether.functions.board import Stage
from aether.functions.engine import FunctionEngine
from aether.model.function_instance import StartKind


class FunctionMetrics(Collector):
    def __init__(self, engine: FunctionEngine, table: FunctionTable) -> None:
        self._engine = engine
        self._table = table

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
        done = CounterMetricFamily("function_invocations", "Calls by status class.", labels=["status"])
        for number, status in enumerate(("1xx", "2xx", "3xx", "4xx", "5xx"), 1):
            done.add_metric([status], sum(self._table.answers[number * 100 : number * 100 + 100]))
        yield done
        started = CounterMetricFamily(
            "function_started_invocations", "Calls that an instance was started for, by how.", labels=["start"]
        )
        for start in (StartKind.COLD, StartKind.RESTORED):
            started.add_metric([start.value], self._table.started.get(start, 0))
        yield started
        yield CounterMetricFamily(
            "function_dropped_records", "Records of calls that could not be kept.", value=engine.ledger.dropped
        )
        failed = sum(failure.count for failure in engine.board.failures.values())
        yield GaugeMetricFamily(
            "function_failed_instances", "Instances that failed, of functions there are.", value=failed
        )
