"""Traces and metrics as an OpenTelemetry collector gets them, and a server whose collector fails it."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.collector import Collector, collector
from support.product import AETHER, HELLO, Product, node_app, product

FAST = {
    "OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_METRIC_EXPORT_INTERVAL": "300",
    "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=blue", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test",
}  # fmt: skip

SHOWS_HEADERS = """
require('http').createServer((q, s) => s.end(JSON.stringify(q.headers))).listen(process.env.PORT);
process.on('SIGTERM', () => process.exit(0));
"""


@contextmanager
def watched(home: Path, **more: str) -> Iterator[tuple[Product, Collector]]:
    with collector() as it, product(home, **(FAST | {"OTEL_EXPORTER_OTLP_ENDPOINT": it.url} | more)) as up:
        yield up, it


def test_a_deployment_is_one_trace_from_the_command_to_the_last_drain(tmp_path: Path) -> None:
    with watched(tmp_path / "home") as (up, it):
        project = node_app(tmp_path / "traced", HELLO % "one", name="traced")
        up.deploy(project)
        (project / "server.js").write_text(HELLO % "two")
        caller = f"00-{'5' * 32}-{'6' * 16}-01"
        done = up.deploy(project, env={"TRACEPARENT": caller}).json
        status, deployment, _ = up.api("GET", f"/deployments/{done['deployment_id']}")
        assert status == 200
        assert deployment["trace_id"] == "5" * 32, "the trace that the CI job named"
        spans = {span.name: span for span in it.wait(lambda: _whole(it, "5" * 32))}
        wanted = {
            "deployment", "verifying", "rolling_out", "unpack", "start instance", "health gate", "promote", "drain",
            "POST /deployments", "hash artifact", "store artifact",
        }  # fmt: skip
        assert wanted <= spans.keys()
        root = spans["deployment"]
        assert root.attributes["aether.status"] == "active"
        assert root.attributes["aether.app"] == "traced"
        assert not root.failed
        for name in ("verifying", "rolling_out", "unpack", "start instance", "health gate", "promote", "drain"):
            assert spans[name].parent_id == root.span_id, name
        assert spans["hash artifact"].parent_id in {span.span_id for span in it.trace("5" * 32)}
        assert root.start_ns <= spans["verifying"].start_ns <= spans["verifying"].end_ns
        assert spans["verifying"].end_ns <= spans["rolling_out"].start_ns <= spans["rolling_out"].end_ns
        assert root.resource["service.name"] == "aether"
        assert root.resource["deployment.environment"] == "test"
        assert it.headers[0]["x-tenant"] == "blue"
        assert it.headers[0]["content-type"] == "application/x-protobuf"


def _whole(it: Collector, trace: str) -> object:
    names = {span.name for span in it.trace(trace)}
    return it.trace(trace) if {"deployment", "drain", "POST /deployments"} <= names else None


def test_a_failed_deployment_says_so_in_its_trace(tmp_path: Path) -> None:
    with watched(tmp_path / "home") as (up, it):
        done = up.deploy(node_app(tmp_path / "broken", "process.exit(7)", name="broken"), check=False)
        assert done.code == 50
        roots = it.wait(lambda: [span for span in it.spans if span.name == "deployment"])
        assert len(roots) == 1
        assert roots[0].failed
        assert roots[0].attributes["aether.status"] == "failed"
        gates = [span for span in it.trace(roots[0].trace_id) if span.name == "health gate"]
        assert gates


def test_a_rollout_taken_over_by_the_next_server_stays_in_its_trace(tmp_path: Path) -> None:
    with watched(tmp_path / "home") as (up, it):
        slow = "setTimeout(() => {" + HELLO % "slow" + "}, 2500);"
        project = node_app(tmp_path / "slow", slow, name="slow")
        command = subprocess.Popen(
            [AETHER, "deploy", str(project), "--timeout", "30", "--format", "json"],
            env=up.env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        it.wait(lambda: [span for span in it.spans if span.name == "unpack"])
        time.sleep(0.5)
        up.kill9()
        up.start()
        said, _ = command.communicate(timeout=60)
        assert command.returncode == 0, said
        row = up.api("GET", f"/deployments/{json.loads(said)['deployment_id']}")[1]
        spans = it.wait(lambda: _settled(it, row["trace_id"]))
        roots = [span for span in spans if span.name == "deployment"]
        assert len(roots) == 1
        servers = {span.resource["service.instance.id"] for span in spans}
        assert len(servers) == 2, "spans of the killed server and of its successor"
        for span in spans:
            if span.name in ("verifying", "unpack", "rolling_out", "health gate", "promote"):
                assert span.parent_id == roots[0].span_id, span.name
        assert roots[0].start_ns <= min(span.start_ns for span in spans if span.name == "unpack")


def _settled(it: Collector, trace: str) -> object:
    spans = it.trace(trace)
    return spans if any(span.name == "deployment" for span in spans) else None


def test_requests_through_the_edge_carry_their_trace_to_the_app(tmp_path: Path) -> None:
    with watched(tmp_path / "home") as (up, it):
        up.deploy(node_app(tmp_path / "headers", SHOWS_HEADERS, name="headers"))
        seen = json.loads(up.get("headers")[1])
        version, trace, parent, flags = seen["traceparent"].split("-")
        assert (version, flags) == ("00", "01")
        span = it.wait(lambda: it.trace(trace))[0]
        assert span.span_id == parent
        assert span.parent_id == ""
        assert span.kind == 2
        assert span.attributes["http.response.status_code"] == 200
        assert span.attributes["aether.app"] == "headers"
        given = f"00-{'a' * 32}-{'b' * 16}-01"
        seen = json.loads(up.get("headers", headers={"traceparent": given})[1])
        _, trace, parent, flags = seen["traceparent"].split("-")
        assert (trace, flags) == ("a" * 32, "01")
        assert parent != "b" * 16, "the app's parent is the edge's span"
        span = it.wait(lambda: it.trace("a" * 32))[0]
        assert (span.span_id, span.parent_id) == (parent, "b" * 16)
        quiet = f"00-{'c' * 32}-{'d' * 16}-00"
        assert json.loads(up.get("headers", headers={"traceparent": quiet})[1])["traceparent"] == quiet
        up.api("GET", "/apps/none", headers={"traceparent": f"00-{'e' * 32}-{'f' * 16}-01"})
        spans = it.wait(lambda: len(it.trace("e" * 32)) == 2 and it.trace("e" * 32))
        by_name = {span.name: span for span in spans}
        assert by_name["GET /apps/{app}"].parent_id == by_name["GET"].span_id
        assert by_name["GET /apps/{app}"].attributes["http.response.status_code"] == 404
        assert it.trace("c" * 32) == []


def test_the_metrics_are_those_of_prometheus(tmp_path: Path) -> None:
    with watched(tmp_path / "home", OTEL_TRACES_EXPORTER="none") as (up, it):
        up.deploy(node_app(tmp_path / "counted", HELLO % "x", name="counted"))
        for _ in range(5):
            up.get("counted")
        time.sleep(0.7)
        it.metrics.clear()
        it.wait(lambda: "edge_app_requests_total" in it.metrics)
        text = up.api("GET", "/metrics")[1].decode()
        names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}
        missing = {name for name in names if name not in it.metrics and not name.endswith("_created")}
        # a metric with labels has no sample until something happens
        assert not [line for line in text.splitlines() if line.startswith(tuple(missing))], missing
        requests = it.metrics["edge_app_requests_total"].sum
        assert requests.is_monotonic
        points = {point.attributes[0].value.string_value: point.as_double for point in requests.data_points}
        assert points["2xx"] >= 5
        histogram = it.metrics["edge_app_request_duration_seconds"].histogram.data_points[0]
        assert histogram.count == sum(histogram.bucket_counts) >= 5
        assert len(histogram.bucket_counts) == len(histogram.explicit_bounds) + 1
        assert it.metrics["artifacts_total"].gauge.data_points[0].as_double == 1
        assert it.spans == []


@pytest.mark.parametrize("trouble", ["refuses", "500", "slow"])
def test_a_collector_in_trouble_harms_nobody(tmp_path: Path, trouble: str) -> None:
    with collector() as it:
        url = "http://127.0.0.1:9" if trouble == "refuses" else it.url
        it.status = 500 if trouble == "500" else 200
        it.delay_secs = 60 if trouble == "slow" else 0
        settings = FAST | {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_MAX_QUEUE_SIZE": "512"}
        settings["OTEL_EXPORTER_OTLP_TIMEOUT"] = "1000"
        up = Product(tmp_path / "home", extra_env=settings)
        try:
            up.start()
            up.login()
            up.deploy(node_app(tmp_path / "fine", HELLO % "x", name="fine"))
            slowest = 0.0
            for _ in range(300):
                began = time.monotonic()
                assert up.get("fine")[0] == 200
                slowest = max(slowest, time.monotonic() - began)
            assert slowest < 2, "a request waited for the collector"
            time.sleep(1.5)
            began = time.monotonic()
            assert up.stop() == 0
            assert time.monotonic() - began < 12, "the end waited for the collector"
        finally:
            up.close()
        said = (up.home / "up.stderr").read_text()
        assert said.count("OpenTelemetry collector does not take") <= 2, "traces and metrics each say it once"
        assert said.count("OpenTelemetry collector does not take") >= 1
        assert "Traceback" not in said
        assert "opentelemetry.exporter" not in said


def test_what_is_not_offered_is_refused_at_the_start(tmp_path: Path) -> None:
    it = Product(tmp_path / "home")
    it.home.mkdir()
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    done = it.run("up", "--port", "0", check=False, env=env, timeout=20)
    assert done.code == 10, done
    assert "http/protobuf" in done.stderr
    assert "4318" in done.stderr
