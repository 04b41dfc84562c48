"""How apps are isolated here, from the settings."""

from __future__ import annotations

from aether.model.errors import ConfigError
from aether.runtimes.process import egress
from aether.runtimes.process.runtime import RuntimeOptions
from aether.settings import Settings


def runtime_options(settings: Settings) -> RuntimeOptions:
    """Raises ConfigError naming the variable that is wrong."""
    try:
        outgoing = egress.parse(settings.app_egress, settings.app_egress_allow)
    except ValueError as error:
        raise ConfigError(f"AETHER_APP_EGRESS or AETHER_APP_EGRESS_ALLOW: {error}") from None
    return RuntimeOptions(
        sandbox=settings.sandbox,
        log_bytes=settings.app_log_bytes,
        open_files=settings.app_open_files,
        egress=outgoing,
    )
