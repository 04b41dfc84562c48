"""The capabilities of one server over a given database, without its HTTP side and without instances."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from aether.apps.artifacts import UnpackedArtifacts
from aether.apps.broadcast import Broadcast
from aether.apps.catalogue import Catalogue
from aether.apps.deployments import Deployments
from aether.apps.engine import Engine, EngineOptions
from aether.apps.runs import Runs
from aether.apps.vault import Vault
from aether.apps.volumes import AppVolumes
from aether.edge.table import RouteTable
from aether.identity.service import Identity
from aether.leases import Lease, Leases
from aether.model.names import new_id
from aether.model.times import now_us
from aether.registry.policy import ReleasePolicy
from aether.runtimes.process.runtime import ProcessRuntime
from aether.stores.database.engine import Database
from aether.stores.database.tables import artifacts
from aether.stores.keys import keyring
from aether.stores.objects.filesystem import FilesystemObjects
from aether.stores.objects.signing import UrlSigner, load_key
from support.identity import CHEAP

DIGEST = "ab" * 32


class _Still(Engine):
    """Runs nothing: what is recorded stays as it is."""

    def register(self, app_id: str, app: str, lease: Lease) -> None:
        self._leases.keep(lease)


@dataclass
class Plane:
    """One server, called `name` in leases. Nothing of it runs by itself."""

    name: str
    database: Database
    broadcast: Broadcast
    vault: Vault
    leases: Leases
    engine: Engine
    deployments: Deployments
    catalogue: Catalogue
    runs: Runs
    identity: Identity

    async def add_artifact(self, app: str, digest: str = DIGEST) -> None:
        """A row without bytes: enough to deploy, not to run."""
        view = await self.catalogue.get(app)
        row = {"id": new_id(), "app_id": view.id, "digest": digest, "size_bytes": 1, "status": "stored",
               "storage_key": "none", "created_at": now_us()}  # fmt: skip
        async with self.database.write() as tx:
            await tx.execute(sa.insert(artifacts).values(row))


def plane(folder: Path, database: Database, name: str = "one") -> Plane:
    vault = Vault(keyring.load(folder, given="", file=None, in_use=()))
    objects = FilesystemObjects(folder / "objects", UrlSigner(load_key(folder / "signing.key")))
    source = UnpackedArtifacts(folder / "releases", objects)
    runtime = ProcessRuntime(folder)
    broadcast = Broadcast()
    leases = Leases(database, name)
    engine = _Still(database, broadcast, runtime, RouteTable(), source, EngineOptions(), leases, vault)
    runs = Runs(database, broadcast, engine, runtime, 1.0)
    catalogue = Catalogue(
        database, broadcast, engine, source, objects, leases, runs, AppVolumes(database, runtime.volumes)
    )
    deployments = Deployments(database, broadcast, engine, ReleasePolicy())
    identity = Identity(database, passwords=CHEAP)
    return Plane(name, database, broadcast, vault, leases, engine, deployments, catalogue, runs, identity)
