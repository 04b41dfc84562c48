"""The registry's rows: what an upload and an artifact are, and every statement over their tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.model.errors import NotFound
from aether.model.names import new_id
from aether.stores.database.tables import applications, artifacts, uploads


@dataclass(frozen=True, slots=True)
class Upload:
    """One presigned upload. Times are microseconds since the epoch.

    pending → completing → completed, or → failed. `completing` is the recorded intent that start-up recovery
    finishes.
    """

    id: str
    app_id: str
    app: str
    digest: str
    content_digest: str | None
    runtime: str | None
    size_bytes: int
    status: str
    created_by: str
    created_at: int
    expires_at: int

    @property
    def pending_key(self) -> str:
        return f"pending/{self.id}"


@dataclass(frozen=True, slots=True)
class Artifact:
    """One verified artifact of one app."""

    id: str
    app_id: str
    app: str
    digest: str
    content_digest: str | None
    runtime: str | None
    size_bytes: int
    status: str
    storage_key: str
    verified: bool
    idempotency_key: str | None
    upload_id: str | None
    created_at: int


def storage_key(app: str, digest: str) -> str:
    return f"artifacts/{app}/{digest}/app.tar.gz"


_ARTIFACT_COLUMNS = [*artifacts.c, applications.c.name.label("app")]
_ARTIFACTS = sa.select(*_ARTIFACT_COLUMNS).join(applications, applications.c.id == artifacts.c.app_id)
_STORED = _ARTIFACTS.where(artifacts.c.status == "stored")
_UPLOADS = sa.select(*uploads.c, applications.c.name.label("app")).join(
    applications, applications.c.id == uploads.c.app_id
)


def _artifact(row: Any) -> Artifact:
    return Artifact(**row._mapping)


def _upload(row: Any) -> Upload:
    return Upload(**row._mapping)


async def app_id(tx: AsyncConnection, name: str) -> str:
    """Raises NotFound for an app that does not exist or is being deleted."""
    query = sa.select(applications.c.id).where(applications.c.name == name, applications.c.deleting_at.is_(None))
    found = await tx.scalar(query)
    if found is None:
        raise NotFound(f"there is no app '{name}'")
    return str(found)


async def stored(tx: AsyncConnection, app: str, digest: str) -> Artifact | None:
    """The verified artifact with this digest that belongs to the app with id `app`."""
    row = (await tx.execute(_STORED.where(artifacts.c.app_id == app, artifacts.c.digest == digest))).one_or_none()
    return None if row is None else _artifact(row)


async def newest(
    tx: AsyncConnection, digest: str, app_name: str | None, only: sa.ColumnElement[bool] | None
) -> Artifact | None:
    query = _STORED.where(artifacts.c.digest == digest)
    if only is not None:
        query = query.where(only)
    if app_name is not None:
        query = query.where(applications.c.name == app_name)
    row = (await tx.execute(query.order_by(artifacts.c.created_at.desc()).limit(1))).one_or_none()
    return None if row is None else _artifact(row)


async def listed(
    tx: AsyncConnection,
    app_name: str | None,
    limit: int,
    after: tuple[int, str] | None,
    only: sa.ColumnElement[bool] | None,
) -> list[Artifact]:
    """Newest first, from just behind `after` = (created_at, id); `only` is a condition on `applications`."""
    query = _STORED.order_by(artifacts.c.created_at.desc(), artifacts.c.id.desc()).limit(limit)
    if app_name is not None:
        query = query.where(applications.c.name == app_name)
    if only is not None:
        query = query.where(only)
    if after is not None:
        query = query.where(sa.tuple_(artifacts.c.created_at, artifacts.c.id) < sa.tuple_(*after))
    return [_artifact(row) for row in await tx.execute(query)]


async def count(tx: AsyncConnection) -> int:
    query = sa.select(sa.func.count()).select_from(artifacts).where(artifacts.c.status == "stored")
    return int(await tx.scalar(query) or 0)


async def by_idempotency_key(tx: AsyncConnection, app: str, key: str) -> Artifact | None:
    query = _ARTIFACTS.where(artifacts.c.app_id == app, artifacts.c.idempotency_key == key)
    row = (await tx.execute(query)).one_or_none()
    return None if row is None else _artifact(row)


async def remember_key(tx: AsyncConnection, artifact: Artifact, key: str | None) -> None:
    """Note the idempotency key of a completion that was recorded without one (by recovery)."""
    if key is not None and artifact.idempotency_key is None:
        await tx.execute(sa.update(artifacts).where(artifacts.c.id == artifact.id).values(idempotency_key=key))


async def add_artifact(tx: AsyncConnection, upload: Upload, key: str | None, now: int) -> bool:
    """Insert or revive the artifact that `upload` became; False when it was stored already."""
    values: dict[str, Any] = {
        "content_digest": upload.content_digest,
        "runtime": upload.runtime,
        "size_bytes": upload.size_bytes,
        "status": "stored",
        "storage_key": storage_key(upload.app, upload.digest),
        "verified": False,
        "upload_id": upload.id,
        "created_at": now,
    }
    same = (artifacts.c.app_id == upload.app_id, artifacts.c.digest == upload.digest)
    status = await tx.scalar(sa.select(artifacts.c.status).where(*same))
    if status == "stored":
        return False
    if status is not None:
        await tx.execute(sa.update(artifacts).where(*same).values(values))
        return True
    row = {"id": new_id(), "app_id": upload.app_id, "digest": upload.digest, "idempotency_key": key, **values}
    await tx.execute(sa.insert(artifacts).values(row))
    return True


async def add_upload(tx: AsyncConnection, upload: Upload) -> None:
    row = {column.name: getattr(upload, column.name) for column in uploads.c}
    await tx.execute(sa.insert(uploads).values(row))


async def upload(tx: AsyncConnection, upload_id: str) -> Upload | None:
    row = (await tx.execute(_UPLOADS.where(uploads.c.id == upload_id))).one_or_none()
    return None if row is None else _upload(row)


async def describe(tx: AsyncConnection, upload_id: str, content_digest: str | None, runtime: str | None) -> None:
    """Fill in what presign was not told."""
    for column, value in ((uploads.c.content_digest, content_digest), (uploads.c.runtime, runtime)):
        if value is not None:
            query = sa.update(uploads).where(uploads.c.id == upload_id, column.is_(None))
            await tx.execute(query.values({column: value}))


async def uploads_in(tx: AsyncConnection, status: str) -> list[Upload]:
    return [_upload(row) for row in await tx.execute(_UPLOADS.where(uploads.c.status == status))]


async def set_status(tx: AsyncConnection, upload_id: str, status: str, *, only_from: tuple[str, ...]) -> bool:
    """True when the upload was in one of `only_from` and now is in `status`."""
    query = sa.update(uploads).where(uploads.c.id == upload_id, uploads.c.status.in_(only_from)).values(status=status)
    return (await tx.execute(query)).rowcount == 1


async def expired_uploads(tx: AsyncConnection, now: int, limit: int) -> list[Upload]:
    query = _UPLOADS.where(uploads.c.status == "pending", uploads.c.expires_at <= now).limit(limit)
    return [_upload(row) for row in await tx.execute(query)]


async def live_uploads(tx: AsyncConnection, ids: list[str]) -> set[str]:
    """Those of `ids` that may still become an artifact."""
    live = uploads.c.status.in_(("pending", "completing"))
    return set((await tx.execute(sa.select(uploads.c.id).where(uploads.c.id.in_(ids), live))).scalars())


async def forget_settled(tx: AsyncConnection, before: int) -> None:
    """Drop the rows of uploads that ended and whose time is over."""
    ended = uploads.c.status.in_(("completed", "failed"))
    await tx.execute(sa.delete(uploads).where(ended, uploads.c.expires_at <= before))
