"""What the routes work with. The composition root fills it; a handler asks for `services: Services`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from litestar.di import NamedDependency
from litestar.params import HeaderParameter, SkipValidation

from aether.api.turns import UploadTurns
from aether.identity.roles import Principal
from aether.identity.service import Identity
from aether.observability.metrics import Metrics
from aether.settings import Settings

if TYPE_CHECKING:
    from aether.api.transfers import ObjectTransfer
    from aether.apps.services import AppServices
    from aether.backup.write import Plan, Writer
    from aether.functions.services import FunctionServices
    from aether.hosts.certificates import Certificates
    from aether.hosts.service import Hosts
    from aether.registry.service import Registry
    from aether.retention import Retention

Check = Callable[[], Awaitable[None]]


@dataclass
class Services:
    """Everything a running API needs; capabilities that a server does not offer stay None."""

    settings: Settings
    identity: Identity
    registry: Registry | None = None
    apps: AppServices | None = None
    functions: FunctionServices | None = None
    hosts: Hosts | None = None
    certificates: Certificates | None = None
    """None without TLS."""
    retention: Retention | None = None
    backup: Callable[[Plan], Writer] | None = None
    """Makes a backup of this server, when everything of it is on this machine."""
    transfer: ObjectTransfer | None = None
    """The store's side of /objects, when the store has no HTTP server of its own."""
    metrics: Metrics = field(default_factory=Metrics)
    checks: Mapping[str, Check] = field(default_factory=dict[str, Check])
    """Readiness: each raises with a message when its dependency cannot serve."""
    turns: UploadTurns = field(init=False)
    """Uploads whose bytes are taken in at once."""
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by the composition root when recovery is done; /startupz answers 503 before."""
    shutdown: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the server begins to stop: long streams (logs, events) must end then."""

    def __post_init__(self) -> None:
        self.turns = UploadTurns(self.settings.max_concurrent_uploads)


Deps = NamedDependency[SkipValidation[Services]]
"""For handlers: `services: Deps`."""
Caller = NamedDependency[SkipValidation[Principal]]
"""For handlers: `caller: Caller`."""
IdempotencyKey = Annotated[str | None, HeaderParameter(name="Idempotency-Key", min_length=1, max_length=200)]
"""For handlers whose repeat by a client must not be a second change: `idempotency_key: IdempotencyKey = None`."""
