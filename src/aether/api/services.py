"""What the routes work with. The composition root fills it; a handler asks for `services: Services`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from litestar.di import NamedDependency
from litestar.params import SkipValidation

from aether.identity.roles import Principal
from aether.identity.service import Identity
from aether.observability.metrics import Metrics
from aether.settings import Settings

if TYPE_CHECKING:
    from aether.api.transfers import ObjectTransfer
    from aether.apps.services import AppServices
    from aether.registry.service import Registry

Check = Callable[[], Awaitable[None]]


@dataclass
class Services:
    """Everything a running API needs; capabilities that a server does not offer stay None."""

    settings: Settings
    identity: Identity
    registry: Registry | None = None
    apps: AppServices | None = None
    transfer: ObjectTransfer | None = None
    """The store's side of /objects, when the store has no HTTP server of its own."""
    metrics: Metrics = field(default_factory=Metrics)
    checks: Mapping[str, Check] = field(default_factory=dict[str, Check])
    """Readiness: each raises with a message when its dependency cannot serve."""
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by the composition root when recovery is done; /startupz answers 503 before."""
    shutdown: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the server begins to stop: long streams (logs, events) must end then."""


Deps = NamedDependency[SkipValidation[Services]]
"""For handlers: `services: Deps`."""
Caller = NamedDependency[SkipValidation[Principal]]
"""For handlers: `caller: Caller`."""
