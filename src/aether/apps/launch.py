"""What a release runs: its instances, its cron processes and its release command, ready to be started.

Made from a deployment's record and its unpacked artifact; when anything of it starts is decided elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import sqlalchemy as sa
import structlog

from aether.apps.ledger import DATABASE_PAUSE_SECS
from aether.apps.ports import ArtifactSource
from aether.apps.records import DeploymentRow
from aether.apps.vault import Variables, Vault
from aether.model.database import DatabasePort
from aether.model.errors import NotFound, ServiceUnavailable
from aether.model.instance import InstanceSpec, Limits
from aether.model.processes import RELEASE, WEB, Cron
from aether.rollout.health import HealthCheck
from aether.stores.database.tables import artifacts

DEFAULT_PORT = 8080
"""PORT of an instance whose health check names none; each has a network view of its own."""
RESTART_TIMEOUT_SECS = 60.0
"""Least time that an instance of the active release has to become healthy: when a server comes back, all its apps
start at once, and a short rollout deadline must not keep one of them down."""
_log = structlog.stdlib.get_logger("aether.apps")


@dataclass(frozen=True, slots=True)
class Launch:
    """What all instances of a process type have in common. `spec.instance_id` is replaced at each start."""

    app_id: str
    spec: InstanceSpec
    check: HealthCheck | None
    """How it shows that it is ready; None for a worker, which has to stay up for `settle_secs`."""
    start_timeout_secs: float
    """How long a restarted instance may take to become healthy before it is replaced."""
    settle_secs: float = 0.0


@dataclass(frozen=True, slots=True)
class ReleaseLaunch:
    """Everything that a release runs."""

    deployment_id: str
    digest: str
    launches: Mapping[str, Launch]
    """Of what runs all the time, web among it."""
    crons: Mapping[str, tuple[Cron, InstanceSpec]] = field(default_factory=dict[str, tuple[Cron, InstanceSpec]])
    command: InstanceSpec | None = None
    """The release command."""


class Launcher:
    def __init__(
        self, database: DatabasePort, source: ArtifactSource, vault: Vault, base_domain: str, limits: Limits
    ) -> None:
        self._database = database
        self._source = source
        self._vault = vault
        self._base_domain = base_domain
        self._limits = limits

    async def base(self, row: DeploymentRow, *, patient: bool = False) -> InstanceSpec:
        """What all that a release runs has in common. Raises NotFound when the artifact is not stored, what unpacking
        raises, and ServiceUnavailable while the database is away, unless it is `patient`."""
        while True:
            try:
                content_digest, variables = await self._recorded(row)
                break
            except ServiceUnavailable as error:
                if not patient:
                    raise
                _log.warning("a rollout waits for the database", deployment=row.id, error=error.message)
            await asyncio.sleep(DATABASE_PAUSE_SECS)
        if isinstance(variables, ServiceUnavailable):
            raise variables
        root = await self._source.unpack(row.app, row.digest, content_digest)
        return InstanceSpec(
            instance_id="",
            app=row.app,
            deployment_id=row.id,
            release=row.release or 0,
            digest=row.digest,
            root=root,
            command=row.command,
            port=row.health.port or DEFAULT_PORT,
            env={**variables.env, **_identity(row)},
            limits=self._limits,
            volumes=row.volumes,
        )

    async def _recorded(self, row: DeploymentRow) -> tuple[str | None, Variables | ServiceUnavailable]:
        """The artifact's content digest and the variables, or why nothing can open those: that is no affair of the
        database, whose being away is raised."""
        async with self._database.read() as tx:
            found = await tx.execute(
                sa.select(artifacts.c.status, artifacts.c.content_digest).where(artifacts.c.id == row.artifact_id)
            )
            artifact = found.one_or_none()
            try:
                variables: Variables | ServiceUnavailable = await self._vault.variables_of(tx, row)
            except ServiceUnavailable as error:
                variables = error
        if artifact is None or artifact.status != "stored":
            raise NotFound(f"the artifact {row.digest[:12]} is not stored")
        return artifact.content_digest, variables

    async def release(self, row: DeploymentRow, *, patient: bool = False) -> ReleaseLaunch:
        """Raises what `base` raises."""
        base = await self.base(row, patient=patient)
        port = base.port

        def spec(process: str, command: str, port: int = 0) -> InstanceSpec:
            named = {**base.env, "AETHER_PROCESS": process}
            return replace(base, process=process, command=command, port=port, env=named)

        patience = max(row.timeout_secs, RESTART_TIMEOUT_SECS)
        check = HealthCheck(f"{row.app}.{self._base_domain}", port, row.health.path)
        types = row.processes
        workers = {
            name: Launch(row.app_id, spec(name, one.command), None, patience, one.settle_secs)
            for name, one in types.workers.items()
        }
        return ReleaseLaunch(
            row.id,
            row.digest,
            {WEB: Launch(row.app_id, spec(WEB, row.command, port), check, patience), **workers},
            {name: (one, spec(name, one.command)) for name, one in types.crons.items()},
            None if types.release is None else spec(RELEASE, types.release.command),
        )


def _identity(row: DeploymentRow) -> dict[str, str]:
    return {
        "AETHER_APP": row.app,
        "AETHER_DEPLOYMENT_ID": row.id,
        "AETHER_ARTIFACT_DIGEST": row.digest,
    }
