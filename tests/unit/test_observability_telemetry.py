"""What the OTEL_* variables mean, the ids of spans, and that none of it is loaded unless asked for."""

from __future__ import annotations

import contextvars
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

from aether.edge.headers import TraceParents
from aether.model.errors import ConfigError
from aether.observability import tracing
from aether.observability.telemetry import Sampling, sampling, wanted
from aether.topology.edge_spans import EdgeSpans

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


def test_nothing_is_exported_unless_an_endpoint_is_named() -> None:
    assert wanted({}) is None
    assert wanted({"OTEL_SERVICE_NAME": "x", "OTEL_TRACES_SAMPLER": "always_on"}) is None
    assert wanted(ENDPOINT | {"OTEL_SDK_DISABLED": "true"}) is None
    assert wanted(ENDPOINT | {"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none"}) is None


def test_each_signal_is_chosen_by_itself() -> None:
    both = wanted(ENDPOINT)
    assert both is not None
    assert (both.traces, both.metrics, both.interval_secs) == (True, True, 60.0)
    only = wanted(ENDPOINT | {"OTEL_METRICS_EXPORTER": "none"})
    assert only is not None
    assert (only.traces, only.metrics) == (True, False)
    only = wanted(
        {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "https://m/v1/metrics", "OTEL_METRIC_EXPORT_INTERVAL": "500"}
    )
    assert only is not None
    assert (only.traces, only.metrics, only.interval_secs) == (False, True, 0.5)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "OTEL_TRACES_EXPORTER"),
        ("OTEL_TRACES_SAMPLER", "jaeger_remote", "parentbased_traceidratio"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "soon", "OTEL_METRIC_EXPORT_INTERVAL"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "1s", "milliseconds"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317", "http://"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(name: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        wanted(ENDPOINT | {name: value})


@pytest.mark.parametrize("text", ["2", "-0.1", "half", "nan"])
def test_a_share_is_a_share(text: str) -> None:
    with pytest.raises(ConfigError, match="OTEL_TRACES_SAMPLER_ARG"):
        sampling({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": text})


@pytest.mark.parametrize(
    ("name", "alone", "parent_yes", "parent_no"),
    [
        ("always_on", True, True, True),
        ("always_off", False, False, False),
        ("parentbased_always_on", True, True, False),
        ("parentbased_always_off", False, True, False),
        ("", True, True, False),
    ],
)
def test_samplers(name: str, alone: bool, parent_yes: bool, parent_no: bool) -> None:
    chosen = sampling({"OTEL_TRACES_SAMPLER": name})
    trace = "f" * 32
    assert [chosen.samples(trace, parent) for parent in (None, True, False)] == [alone, parent_yes, parent_no]


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(0, 2**128 - 1))
def test_the_share_is_decided_as_every_sdk_decides_it(share: float, number: int) -> None:
    if share in (0.0, 1.0):
        theirs = bool(share)
    else:
        theirs = (number & TraceIdRatioBased.TRACE_ID_LIMIT) < TraceIdRatioBased(share).bound
    assert Sampling(share).samples(f"{number:032x}", None) == theirs


class Kept:
    def __init__(self, share: float = 1.0) -> None:
        self.spans: list[tracing.Span] = []
        self.sampling = Sampling(share)

    def samples(self, trace_id: str, parent: bool | None) -> bool:
        return self.sampling.samples(trace_id, parent)

    def record(self, span: tracing.Span) -> None:
        self.spans.append(span)


@pytest.fixture
def kept() -> object:
    recorder = Kept()
    tracing.install(recorder)
    yield recorder
    tracing.install(None)


def test_spans_nest_and_fail(kept: Kept) -> None:
    def work() -> None:
        tracing.accept(f"00-{'a' * 32}-{'b' * 16}-01")
        with pytest.raises(ValueError, match="no"), tracing.span("outer"), tracing.span("inner"):
            raise ValueError("no")

    contextvars.copy_context().run(work)
    inner, outer = kept.spans
    assert (outer.trace_id, outer.parent_id) == ("a" * 32, "b" * 16)
    assert (inner.trace_id, inner.parent_id) == ("a" * 32, outer.span_id)
    assert outer.start_ns <= inner.start_ns <= inner.end_ns <= outer.end_ns
    assert inner.failure == "ValueError: no"


def test_a_caller_that_does_not_record_is_heeded(kept: Kept) -> None:
    def work() -> None:
        tracing.accept(f"00-{'a' * 32}-{'b' * 16}-00")
        with tracing.span("quiet") as span:
            assert span is None
        assert tracing.trace_id.get() == "a" * 32

    contextvars.copy_context().run(work)
    assert kept.spans == []


def test_without_a_recorder_there_are_ids_and_no_spans() -> None:
    def work() -> None:
        tracing.accept(None)
        assert len(tracing.trace_id.get() or "") == 32
        with tracing.span("nothing") as span:
            assert span is None

    contextvars.copy_context().run(work)


def test_the_edge_decides_before_the_request_goes_on() -> None:
    recorder = Kept(share=0.5)
    spans = EdgeSpans(recorder)
    flags = set[bytes]()
    for _ in range(200):
        made = spans.new_id()
        flags.add(spans.tail[-2:])
        assert (spans.tail[-2:] == b"01") == recorder.samples(made.decode(), None)
    assert flags == {b"00", b"01"}
    client = b"00-" + b"a" * 32 + b"-" + b"b" * 16
    assert spans.continued(client + b"-00") == client + b"-00"
    sent = spans.continued(client + b"-01")
    assert sent.startswith(b"00-" + b"a" * 32)
    assert sent[36:52] != b"b" * 16
    before = len(spans._open)
    spans.unused()
    assert len(spans._open) == before, "an id without a request would be kept for ever"


def test_ids_without_export_are_the_cheap_ones() -> None:
    traces = TraceParents()
    value = b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"
    assert traces.continued(value) is value


def test_the_libraries_are_not_loaded_by_a_server_that_does_not_export() -> None:
    code = (
        "import sys, aether.topology.plane, aether.topology.exporting, aether.observability.telemetry;"
        "print([name for name in sys.modules if name.split('.')[0] in ('opentelemetry', 'requests', 'google')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
