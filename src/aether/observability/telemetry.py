"""What the standard `OTEL_*` variables ask for. Reading them loads no library; `otlp` is loaded only when they do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aether.model.errors import ConfigError

_SAMPLERS = (
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
)
_SIGNALS = ("TRACES", "METRICS")


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which traces are recorded: `share` of those that begin here; of others what the caller says, if `follows`."""

    share: float = 1.0
    follows: bool = True

    def samples(self, trace_id: str, parent: bool | None) -> bool:
        if self.follows and parent is not None:
            return parent
        # as the specification's TraceIdRatioBased: the low 8 bytes against a bound
        return int(trace_id[16:], 16) < round(self.share * (1 << 64))


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What to export; endpoints, headers, certificates, time-outs and batching are read by the exporters."""

    traces: bool
    metrics: bool
    sampling: Sampling
    interval_secs: float
    """Between two exports of metrics."""
    timeout_secs: Mapping[str, float]
    """TRACES and METRICS → how long one export may take; the SDK would read the variables as seconds."""


def wanted(environ: Mapping[str, str]) -> Telemetry | None:
    """None unless an OTLP endpoint is set. Raises ConfigError, naming the variable, for what is not offered."""
    if _get(environ, "OTEL_SDK_DISABLED").lower() == "true":
        return None
    everywhere = _get(environ, "OTEL_EXPORTER_OTLP_ENDPOINT")
    chosen: dict[str, bool] = {}
    for signal in _SIGNALS:
        name = f"OTEL_{signal}_EXPORTER"
        exporter = _get(environ, name) or "otlp"
        if exporter not in ("otlp", "none"):
            raise ConfigError(f"{name} is '{exporter}': Aether exports by otlp, or none")
        endpoint = _get(environ, f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT") or everywhere
        chosen[signal] = exporter == "otlp" and bool(endpoint)
        if chosen[signal]:
            _check(environ, signal, endpoint)
    if not any(chosen.values()):
        return None
    timeouts = {signal: _timeout(environ, signal) for signal in _SIGNALS}
    interval = _milliseconds("OTEL_METRIC_EXPORT_INTERVAL", _get(environ, "OTEL_METRIC_EXPORT_INTERVAL") or "60000")
    return Telemetry(chosen["TRACES"], chosen["METRICS"], sampling(environ), interval, timeouts)


def sampling(environ: Mapping[str, str]) -> Sampling:
    """OTEL_TRACES_SAMPLER and its argument. Raises ConfigError."""
    name = _get(environ, "OTEL_TRACES_SAMPLER") or "parentbased_always_on"
    if name not in _SAMPLERS:
        raise ConfigError(f"OTEL_TRACES_SAMPLER is '{name}': choose one of {', '.join(_SAMPLERS)}")
    share = 1.0 if name.endswith("always_on") else 0.0
    if name.endswith("traceidratio"):
        text = _get(environ, "OTEL_TRACES_SAMPLER_ARG") or "1"
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"OTEL_TRACES_SAMPLER_ARG must be a number from 0 to 1, not '{text}'")
    return Sampling(share, name.startswith("parentbased_"))


def _check(environ: Mapping[str, str], signal: str, endpoint: str) -> None:
    name = f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL"
    if not (protocol := _get(environ, name)):
        name = "OTEL_EXPORTER_OTLP_PROTOCOL"
        protocol = _get(environ, name) or "http/protobuf"
    if protocol != "http/protobuf":
        raise ConfigError(
            f"{name} is '{protocol}': Aether speaks http/protobuf only; set that, and the collector's HTTP port "
            "(4318, where gRPC has 4317)"
        )
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"the OTLP endpoint '{endpoint}' must start with http:// or https://")


def _timeout(environ: Mapping[str, str], signal: str) -> float:
    name = f"OTEL_EXPORTER_OTLP_{signal}_TIMEOUT"
    if not (text := _get(environ, name)):
        name = "OTEL_EXPORTER_OTLP_TIMEOUT"
        text = _get(environ, name) or "10000"
    return _milliseconds(name, text)


def _milliseconds(name: str, text: str) -> float:
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"{name} must be milliseconds above 0, not '{text}'")
    return int(text) / 1000


def _get(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name, "").strip()
