"""The registry as a server has it: its parts put together, and what is stored looked at, pinned and deleted.

How something comes to be stored is in `uploads`, `multipart` and `completing`; what nobody needs any more is the
`sweeper`'s and the `collector`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

import sqlalchemy as sa

from aether.leases import Leases
from aether.model.database import DatabasePort
from aether.model.errors import BadRequest
from aether.model.objects import SignedRequest
from aether.model.times import now_us
from aether.observability.metrics import Metrics
from aether.registry import events, records
from aether.registry.attestation_keys import AttestationKeys
from aether.registry.checks import check_artifact_digest
from aether.registry.documents import Documents
from aether.registry.events import Event, What
from aether.registry.legacy import Legacy
from aether.registry.locks import ArtifactLocks, Hold
from aether.registry.multipart import Multipart
from aether.registry.ports import ObjectStore, Sealer
from aether.registry.provenance import Provenances
from aether.registry.public_keys import PublicKeys
from aether.registry.records import Artifact, Filter
from aether.registry.tools import Tools
from aether.registry.uploads import Uploads
from aether.settings import Settings

_HEX = frozenset("0123456789abcdef")


class Registry:
    """Artifacts of apps. `leases` are needed where other servers share the database and the store."""

    def __init__(
        self,
        database: DatabasePort,
        objects: ObjectStore,
        settings: Settings,
        metrics: Metrics,
        sealer: Sealer,
        leases: Leases | None = None,
    ) -> None:
        self.tools = Tools(database, objects, settings, metrics, ArtifactLocks(leases))
        self._database = database
        self._objects = objects
        self._settings = settings
        self._metrics = metrics
        self.uploads = Uploads(self.tools)
        self.multipart = Multipart(self.tools, self.uploads)
        self.legacy = Legacy(self.tools, self.uploads)
        self.public_keys = PublicKeys(database)
        self.documents = Documents(self.tools)
        self.attestation_keys = AttestationKeys(database, sealer)
        self.provenances = Provenances(database, self.documents, self.public_keys, self.attestation_keys)

    # --- looking

    async def find(self, digest: str, app: str | None = None, only: sa.ColumnElement[bool] | None = None) -> Artifact:
        """The newest stored artifact with this digest, of apps for which `only` (a condition on `applications`)
        holds. Raises NotFound, InvalidDigest."""
        check_artifact_digest(digest)
        async with self._database.read() as tx:
            return await records.find(tx, digest, app, only)

    async def download(
        self, digest: str, app: str | None = None, only: sa.ColumnElement[bool] | None = None
    ) -> SignedRequest:
        """A fresh signed GET of what `find` finds. Raises NotFound, InvalidDigest."""
        found = await self.find(digest, app, only)
        name = f"{found.app}-{digest[:12]}.tar.gz"
        self._metrics.events.labels("download").inc()
        return await self._objects.sign_get(found.storage_key, self._settings.presign_expire_secs, name)

    async def list(
        self, app: str | None, wanted: Filter, limit: int, after: tuple[int, str] | None
    ) -> Sequence[Artifact]:
        """Up to `limit` artifacts, newest first. Raises NotFound for an unknown app, BadRequest for a digest prefix
        that is none."""
        if not _HEX.issuperset(wanted.digest_prefix) or len(wanted.digest_prefix) > 64:
            raise BadRequest("a digest begins with up to 64 lower-case hex characters")
        async with self._database.read() as tx:
            if app is not None:
                wanted = replace(wanted, app_id=await records.app_id(tx, app))
            return await records.listed(tx, wanted, limit, after)

    async def events(
        self, digest: str, app: str | None, before: int | None, limit: int, only: sa.ColumnElement[bool] | None = None
    ) -> Sequence[Event]:
        """What happened to artifacts with this digest, newest first. Raises InvalidDigest."""
        check_artifact_digest(digest)
        async with self._database.read() as tx:
            return await events.listed(tx, digest, app, before, limit, only)

    async def count(self) -> None:
        """Bring the gauge of stored artifacts up to date."""
        async with self._database.read() as tx:
            self._metrics.artifacts.set(await records.count(tx))

    # --- changing

    async def pin(
        self, digest: str, app: str | None, *, pinned: bool, actor: str, only: sa.ColumnElement[bool] | None = None
    ) -> Artifact:
        """Keep an artifact whatever its age, or no longer. Idempotent. Raises NotFound, InvalidDigest, BadRequest."""
        check_artifact_digest(digest)
        event = What.PINNED if pinned else What.UNPINNED
        async with self._database.write() as tx:
            named = await records.only_one(tx, digest, app, only)
            found = await records.stored(tx, named.app_id, digest, lock=True) or named
            changed = found.pinned != pinned
            if changed:
                await records.set_values(tx, found.id, pinned=pinned)
                await events.add(tx, events.row(found.app_id, digest, event, actor, artifact_id=found.id))
        if changed:
            self.tools.tell(event)
        return replace(found, pinned=pinned)

    async def drop_app(self, app: str) -> None:
        """Delete the objects of an app whose rows are gone. Idempotent."""
        await self._delete_all(f"artifacts/{app}/")
        await self.count()

    def alone_with(self, app_id: str, digest: str) -> AbstractAsyncContextManager[Hold]:
        """While it is held nobody, here or on another server, completes an upload of this artifact."""
        return self.tools.locks.alone_with(app_id, digest)

    async def purge(self, artifact_id: str) -> bool:
        """Delete the bytes and documents of an artifact that is deleted; False when it is needed again. Killed in the
        middle it leaves objects that no row knows."""
        async with self._database.read() as tx:
            found = await records.by_id(tx, artifact_id)
        if found is None:
            return False
        async with self.alone_with(found.app_id, found.digest) as hold:
            async with self._database.write() as tx:
                await hold.confirm(tx)
                if not await records.purge(tx, artifact_id, now_us()):
                    return False
                row = events.row(found.app_id, found.digest, What.DELETED, events.SERVER, artifact_id=found.id)
                await events.add(tx, row)
            await self._delete_all(found.storage_key.rpartition("/")[0] + "/", hold)
        self.tools.tell(What.DELETED)
        return True

    async def open(self) -> int:
        """What a start does before the API serves: finish what a killed server left, count, and have a key to sign
        provenance with. Returns how many uploads became artifacts."""
        await self.attestation_keys.ensure()
        return await self.recover()

    async def recover(self) -> int:
        """Finish what a killed server left; returns how many uploads became artifacts."""
        finished = await self.uploads.recover()
        await self.count()
        return finished

    async def _delete_all(self, prefix: str, hold: Hold | None = None) -> None:
        for key in [key async for key, _, _ in self._objects.list(prefix)]:
            if hold is not None:
                hold.check()  # each time: what was listed a while ago may be another server's by now
            await self._objects.delete(key)
