"""Rows of artifacts: what an artifact is, and the statements over its table. Uploads are in `upload_rows`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.model.errors import BadRequest, NotFound
from aether.model.names import new_id
from aether.registry.upload_rows import Upload
from aether.stores.database.tables import applications, artifacts

MANIFEST, SBOM, PROVENANCE = "manifest", "sbom", "provenance"
DOCUMENTS = (MANIFEST, SBOM, PROVENANCE)


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
    signature: str | None = None
    verified_by: str | None = None
    manifest_digest: str | None = None
    sbom_digest: str | None = None
    provenance_digest: str | None = None
    replacing: str | None = None
    pinned: bool = False

    def document_digest(self, kind: str) -> str | None:
        """SHA-256 of one of `DOCUMENTS`, None without it."""
        found: str | None = getattr(self, f"{kind}_digest")
        return found


@dataclass(frozen=True, slots=True)
class Filter:
    """Which artifacts of a list; times in microseconds since the epoch, `only` a condition on `applications`, None
    where it would hold for all."""

    app_id: str | None = None
    runtime: str | None = None
    verified: bool | None = None
    digest_prefix: str = ""
    since: int | None = None
    before: int | None = None
    only: sa.ColumnElement[bool] | None = None


def storage_key(app: str, digest: str) -> str:
    return f"artifacts/{app}/{digest}/app.tar.gz"


def document_key(app: str, digest: str, kind: str) -> str:
    return f"artifacts/{app}/{digest}/{kind}.json"


def _columns(table: sa.FromClause) -> list[sa.ColumnElement[Any]]:
    """Those of an `Artifact`, from `table` and `applications`."""
    own = [table.c[field.name] for field in fields(Artifact) if field.name != "app"]
    return [*own, applications.c.name.label("app")]


_ARTIFACTS = sa.select(*_columns(artifacts)).join(applications, applications.c.id == artifacts.c.app_id)
_STORED = _ARTIFACTS.where(artifacts.c.status == "stored")
# Built once: of a statement as small as these, making it takes longer than running it.
_OF_APP = _ARTIFACTS.where(artifacts.c.app_id == sa.bindparam("app"), artifacts.c.digest == sa.bindparam("with"))
_STORED_OF_APP = _OF_APP.where(artifacts.c.status == "stored")
_STORED_OF_APP_LOCKED = _STORED_OF_APP.with_for_update(of=artifacts)
_INSERT = sa.insert(artifacts)
_APP_ID = sa.select(applications.c.id).where(
    applications.c.name == sa.bindparam("called"), applications.c.deleting_at.is_(None)
)
# what merely refers to the app (a deployment being inserted) need not wait
_LOCK_APP = (
    sa.select(applications.c.id)
    .where(applications.c.id == sa.bindparam("of"), applications.c.deleting_at.is_(None))
    .with_for_update(key_share=True)
)


def _artifact(row: Any) -> Artifact:
    return Artifact(**row._mapping)


def no_document(artifact: Artifact, kind: str) -> NotFound:
    return NotFound(f"the artifact {artifact.digest[:12]} of app '{artifact.app}' has no {kind}")


# --- apps


async def app_id(tx: AsyncConnection, name: str) -> str:
    """Raises NotFound for an app that does not exist or is being deleted."""
    found = await tx.scalar(_APP_ID, {"called": name})
    if found is None:
        raise NotFound(f"there is no app '{name}'")
    return str(found)


async def lock_app(tx: AsyncConnection, app_id: str) -> bool:
    """Let nobody else add artifacts to the app, or count them, before the transaction ends. Taken before locks on
    artifacts. False when the app is gone or going."""
    return await tx.scalar(_LOCK_APP, {"of": app_id}) is not None


# --- looking


async def stored(tx: AsyncConnection, app: str, digest: str, *, lock: bool = False) -> Artifact | None:
    """The verified artifact with this digest that belongs to the app with id `app`."""
    query = _STORED_OF_APP_LOCKED if lock else _STORED_OF_APP
    row = (await tx.execute(query, {"app": app, "with": digest})).one_or_none()
    return None if row is None else _artifact(row)


async def any_of(tx: AsyncConnection, app: str, digest: str) -> Artifact | None:
    """The same whatever its status."""
    row = (await tx.execute(_OF_APP, {"app": app, "with": digest})).one_or_none()
    return None if row is None else _artifact(row)


async def find(
    tx: AsyncConnection, digest: str, app_name: str | None, only: sa.ColumnElement[bool] | None
) -> Artifact:
    """The newest artifact with this digest, of the app or of those for which `only` holds. Raises NotFound."""
    query = _STORED.where(artifacts.c.digest == digest)
    if only is not None:
        query = query.where(only)
    if app_name is not None:
        query = query.where(applications.c.name == app_name)
    row = (await tx.execute(query.order_by(artifacts.c.created_at.desc()).limit(1))).one_or_none()
    if row is None:
        raise NotFound("there is no artifact with this digest")
    return _artifact(row)


async def only_one(
    tx: AsyncConnection, digest: str, app_name: str | None, only: sa.ColumnElement[bool] | None
) -> Artifact:
    """The artifact that is to be changed. Raises NotFound, and BadRequest when several apps have it and none is
    named."""
    query = _STORED.where(artifacts.c.digest == digest)
    if only is not None:
        query = query.where(only)
    if app_name is not None:
        query = query.where(applications.c.name == app_name)
    rows = (await tx.execute(query.order_by(applications.c.name).limit(2))).all()
    if not rows:
        raise NotFound("there is no artifact with this digest")
    if len(rows) > 1:
        raise BadRequest("several apps have an artifact with this digest: name one with ?app=")
    return _artifact(rows[0])


async def listed(tx: AsyncConnection, wanted: Filter, limit: int, after: tuple[int, str] | None) -> list[Artifact]:
    """Newest first, from just behind `after` = (created_at, id)."""
    if wanted.only is None or wanted.app_id is not None or wanted.digest_prefix:
        query = _newest_first(_STORED.where(*_matching(artifacts, wanted, after)), artifacts, limit)
        if wanted.only is not None:
            query = query.where(wanted.only)
    else:
        query = _newest_of_each(tx, wanted, limit, after).where(wanted.only)
    return [_artifact(row) for row in await tx.execute(query)]


def _newest_first(query: sa.Select[Any], table: sa.FromClause, limit: int) -> sa.Select[Any]:
    return query.order_by(table.c.created_at.desc(), table.c.id.desc()).limit(limit)


def _newest_of_each(
    tx: AsyncConnection, wanted: Filter, limit: int, after: tuple[int, str] | None
) -> sa.Select[tuple[Any, ...]]:
    """A page of each app, among which the page of some apps is. One index serves each, so that the artifacts of all
    other apps, however many, cost nothing."""
    one = artifacts.alias("one")
    of_app = (one.c.app_id == applications.c.id, one.c.status == "stored", *_matching(one, wanted, after))
    if tx.dialect.name == "postgresql":
        columns = [one.c[column.name] for column in artifacts.c]
        newest = _newest_first(sa.select(*columns).where(*of_app), one, limit)
        table: sa.FromClause = newest.correlate(applications).lateral("newest")
        found = applications.join(table, sa.true())
    else:  # which has no LATERAL; PostgreSQL would try such a condition on every artifact
        table, ids = artifacts, _newest_first(sa.select(one.c.id).where(*of_app), one, limit)
        found = applications.join(artifacts, artifacts.c.id.in_(ids.correlate(applications)))
    return _newest_first(sa.select(*_columns(table)).select_from(found), table, limit)


def _matching(table: sa.FromClause, wanted: Filter, after: tuple[int, str] | None) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = []
    if wanted.app_id is not None:
        conditions.append(table.c.app_id == wanted.app_id)
    if wanted.runtime is not None:
        conditions.append(table.c.runtime == wanted.runtime)
    if wanted.verified is not None:
        conditions.append(table.c.verified == wanted.verified)
    if wanted.digest_prefix:
        # a range, which an index serves whatever the collation makes of LIKE; "g" follows every hex digit
        conditions += [table.c.digest >= wanted.digest_prefix, table.c.digest < wanted.digest_prefix + "g"]
    if wanted.since is not None:
        conditions.append(table.c.created_at >= wanted.since)
    if wanted.before is not None:
        conditions.append(table.c.created_at < wanted.before)
    if after is not None:
        conditions.append(sa.tuple_(table.c.created_at, table.c.id) < sa.tuple_(*map(sa.literal, after)))
    return conditions


async def count(tx: AsyncConnection) -> int:
    query = sa.select(sa.func.count()).select_from(artifacts).where(artifacts.c.status == "stored")
    return int(await tx.scalar(query) or 0)


async def by_id(tx: AsyncConnection, artifact_id: str) -> Artifact | None:
    row = (await tx.execute(_ARTIFACTS.where(artifacts.c.id == artifact_id))).one_or_none()
    return None if row is None else _artifact(row)


# --- changing


async def add_artifact(tx: AsyncConnection, upload: Upload, verified_by: str | None, now: int) -> Artifact:
    """Insert the artifact that `upload` became, under the lock of its app. Raises IntegrityError when there is a row
    of it."""
    row: dict[str, Any] = {
        "id": new_id(),
        "app_id": upload.app_id,
        "digest": upload.digest,
        **_values(upload, verified_by, now),
    }
    row["idempotency_key"] = upload.idempotency_key
    await tx.execute(_INSERT, row)
    kept = {field.name: row[field.name] for field in fields(Artifact) if field.name in row}
    return Artifact(app=upload.app, **kept)


async def revive(tx: AsyncConnection, upload: Upload, verified_by: str | None, now: int) -> bool:
    """Make the row of a deleted artifact that of the one that `upload` became; False when it is stored."""
    same = (artifacts.c.app_id == upload.app_id, artifacts.c.digest == upload.digest)
    status = await tx.scalar(sa.select(artifacts.c.status).where(*same).with_for_update())
    if status == "stored":
        return False
    await tx.execute(sa.update(artifacts).where(*same).values(_values(upload, verified_by, now)))
    return True


def _values(upload: Upload, verified_by: str | None, now: int) -> dict[str, Any]:
    return {
        "content_digest": upload.content_digest,
        "runtime": upload.runtime,
        "size_bytes": upload.size_bytes,
        "status": "stored",
        "storage_key": storage_key(upload.app, upload.digest),
        "signature": upload.signature,
        "verified": verified_by is not None,
        "verified_by": verified_by,
        "upload_id": upload.id,
        "multipart_id": upload.multipart_id,
        "created_at": now,
        "deleted_at": None,
        "purged_at": None,
    }


async def remember_key(tx: AsyncConnection, artifact: Artifact, key: str | None) -> None:
    """Note the idempotency key of the completion that made the artifact."""
    if key is not None and artifact.idempotency_key is None:
        await tx.execute(sa.update(artifacts).where(artifacts.c.id == artifact.id).values(idempotency_key=key))


async def sign(tx: AsyncConnection, artifact: Artifact, signature: str, verified_by: str | None) -> None:
    values = {"signature": signature, "verified": verified_by is not None, "verified_by": verified_by}
    await tx.execute(sa.update(artifacts).where(artifacts.c.id == artifact.id).values(values))


async def set_values(tx: AsyncConnection, artifact_id: str, **values: Any) -> None:
    await tx.execute(sa.update(artifacts).where(artifacts.c.id == artifact_id).values(values))


async def purge(tx: AsyncConnection, artifact_id: str, now: int) -> bool:
    """Record that the bytes of a tombstoned artifact go, and its documents; False when it is needed again or its
    bytes are gone."""
    done = await tx.execute(
        sa.update(artifacts)
        .where(artifacts.c.id == artifact_id, artifacts.c.status == "deleted", artifacts.c.purged_at.is_(None))
        .values(purged_at=now, replacing=None, **dict.fromkeys((f"{kind}_digest" for kind in DOCUMENTS), None))
    )
    return done.rowcount == 1
