"""OpenTelemetry for a server, when the environment asks for it; the libraries are loaded only then."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from aether.observability import tracing
from aether.observability.metrics import Metrics
from aether.observability.telemetry import wanted

if TYPE_CHECKING:
    from aether.observability.otlp import Otlp


async def exporting(stack: AsyncExitStack, metrics: Metrics) -> Otlp | None:
    """Export what the environment names until `stack` is closed; None when it names nothing. Raises ConfigError."""
    telemetry = wanted(os.environ)
    if telemetry is None:
        return None
    from aether.observability.otlp import Otlp

    otlp = Otlp(telemetry, metrics.registry, os.environ)
    tracing.install(otlp)

    async def close() -> None:
        tracing.install(None)
        await asyncio.to_thread(otlp.close)

    stack.push_async_callback(close)
    return otlp
