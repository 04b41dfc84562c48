"""Rows of uploads: what an upload is, and every statement over its table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.stores.database.tables import applications, uploads

LIVE = ("pending", "completing")


@dataclass(frozen=True, slots=True)
class Upload:
    """One upload. Times are microseconds since the epoch.

    pending → completing → completed, or → failed. `completing` is the recorded intent that recovery finishes: all
    that was said when it was completed is in the row.
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
    signature: str | None = None
    idempotency_key: str | None = None
    multipart_id: str | None = None
    part_size_bytes: int | None = None
    parts: str | None = None

    @property
    def pending_key(self) -> str:
        return f"pending/{self.id}"

    @property
    def named_parts(self) -> list[tuple[int, str]]:
        """The (number, etag) it was completed with."""
        return [(number, etag) for number, etag in json.loads(self.parts or "[]")]


@dataclass(frozen=True, slots=True)
class Said:
    """What a client says of an upload when it completes it; None where it says nothing."""

    content_digest: str | None = None
    runtime: str | None = None
    signature: str | None = None
    idempotency_key: str | None = None
    parts: Sequence[tuple[int, str]] | None = None


_UPLOADS = sa.select(*uploads.c, applications.c.name.label("app")).join(
    applications, applications.c.id == uploads.c.app_id
)


# Built once: of a statement as small as these, making it takes longer than running it.
_BY_ID = _UPLOADS.where(uploads.c.id == sa.bindparam("of"))
_BY_ID_LOCKED = _BY_ID.with_for_update(of=uploads)
_INSERT = sa.insert(uploads)
_SAID = ("content_digest", "runtime", "signature", "idempotency_key", "parts")
_COMPLETING = (
    sa.update(uploads)
    .where(uploads.c.id == sa.bindparam("of"))
    .values(status="completing", **{name: sa.bindparam(f"said_{name}") for name in _SAID})
)
_SET_STATUS = (
    sa.update(uploads)
    .where(uploads.c.id == sa.bindparam("of"), uploads.c.status.in_(sa.bindparam("only_from", expanding=True)))
    .values(status=sa.bindparam("becomes"))
)


def _upload(row: Any) -> Upload:
    return Upload(**row._mapping)


async def add(tx: AsyncConnection, upload: Upload) -> None:
    await tx.execute(_INSERT, {column.name: getattr(upload, column.name) for column in uploads.c})


async def find(tx: AsyncConnection, upload_id: str, *, lock: bool = False) -> Upload | None:
    """With `lock` nobody else changes the row before the transaction ends."""
    row = (await tx.execute(_BY_ID_LOCKED if lock else _BY_ID, {"of": upload_id})).one_or_none()
    return None if row is None else _upload(row)


async def resumable(
    tx: AsyncConnection, app_id: str, digest: str, size_bytes: int, created_by: str, now: int
) -> list[Upload]:
    """Uploads in parts of the same artifact by the same caller that are under way, the newest first."""
    query = _UPLOADS.where(
        uploads.c.app_id == app_id,
        uploads.c.digest == digest,
        uploads.c.status == "pending",
        uploads.c.size_bytes == size_bytes,
        uploads.c.created_by == created_by,
        uploads.c.multipart_id.is_not(None),
        uploads.c.expires_at > now,
    )
    return [
        _upload(row) for row in await tx.execute(query.order_by(uploads.c.created_at.desc(), uploads.c.id.desc()))
    ]


async def prolong(tx: AsyncConnection, upload_id: str, expires_at: int) -> bool:
    """False when it is no longer under way."""
    query = sa.update(uploads).where(uploads.c.id == upload_id, uploads.c.status == "pending")
    return (await tx.execute(query.values(expires_at=expires_at))).rowcount == 1


async def begin_completing(tx: AsyncConnection, upload: Upload, said: Said) -> Upload:
    """Record the intent with all that was said; what presign was told stays. Returns the row as it is now. The
    caller has locked `upload`."""
    values: dict[str, Any] = {name: getattr(upload, name) for name in _SAID}
    for name in ("content_digest", "runtime"):
        if values[name] is None:
            values[name] = getattr(said, name)
    for name in ("signature", "idempotency_key"):
        if getattr(said, name) is not None:
            values[name] = getattr(said, name)
    if said.parts is not None:
        values["parts"] = json.dumps([list(part) for part in said.parts])
    await tx.execute(_COMPLETING, {"of": upload.id, **{f"said_{name}": value for name, value in values.items()}})
    return replace(upload, status="completing", **values)


async def in_status(tx: AsyncConnection, status: str) -> list[Upload]:
    return [_upload(row) for row in await tx.execute(_UPLOADS.where(uploads.c.status == status))]


async def set_status(tx: AsyncConnection, upload_id: str, status: str, *, only_from: tuple[str, ...]) -> bool:
    """True when the upload was in one of `only_from` and now is in `status`."""
    values = {"of": upload_id, "only_from": only_from, "becomes": status}
    return (await tx.execute(_SET_STATUS, values)).rowcount == 1


async def expired(tx: AsyncConnection, now: int, limit: int) -> list[Upload]:
    """Pending uploads whose time is over."""
    query = _UPLOADS.where(uploads.c.status == "pending", uploads.c.expires_at <= now).limit(limit)
    return [_upload(row) for row in await tx.execute(query)]


async def live(tx: AsyncConnection, ids: Sequence[str]) -> set[str]:
    """Those of `ids` that may still become an artifact."""
    query = sa.select(uploads.c.id).where(uploads.c.id.in_(ids), uploads.c.status.in_(LIVE))
    return set((await tx.execute(query)).scalars())


async def forget_settled(tx: AsyncConnection, before: int) -> None:
    """Drop the rows of uploads that ended and whose time is over."""
    ended = uploads.c.status.in_(("completed", "failed"))
    await tx.execute(sa.delete(uploads).where(ended, uploads.c.expires_at <= before))
