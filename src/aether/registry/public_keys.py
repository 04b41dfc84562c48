"""Whose signatures count for an app.

A key is added by an admin, or with a signature of a key that is active already; one that was deactivated comes back
by an admin only, because what let it in before could be said again by anybody who heard it. A signature is judged
against the keys that are active at that moment: deactivating one takes `verified` off what rested on it, in the same
transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.artifact import signature
from aether.model.database import DatabasePort
from aether.model.errors import BadRequest, Conflict, Forbidden, NotFound
from aether.model.names import new_id
from aether.model.times import now_us
from aether.registry import events, records
from aether.registry.events import What
from aether.stores.database.tables import artifacts, public_keys

MAX_KEYS = 100
"""Of one app, deactivated ones included."""
_BATCH = 200


@dataclass(frozen=True, slots=True)
class PublicKey:
    id: str
    app_id: str
    public_key_hex: str
    active: bool
    created_by: str
    created_at: int
    deactivated_at: int | None

    @property
    def key_id(self) -> str:
        return signature.key_id(self.public_key_hex)


@dataclass(frozen=True, slots=True)
class Authorization:
    """A new key, signed by one that is active; the latter is named by its id, its key id or itself."""

    key: str
    signature_hex: str


_KEYS = sa.select(
    public_keys.c.id,
    public_keys.c.app_id,
    public_keys.c.public_key_hex,
    public_keys.c.active,
    public_keys.c.created_by,
    public_keys.c.created_at,
    public_keys.c.deactivated_at,
)


def _key(row: Any) -> PublicKey:
    return PublicKey(**row._mapping)


async def active_keys(tx: AsyncConnection, app_id: str, *, lock: bool = False) -> Sequence[PublicKey]:
    """With `lock` none of them is deactivated before the transaction ends."""
    query = _KEYS.where(public_keys.c.app_id == app_id, public_keys.c.active).order_by(public_keys.c.id)
    rows = await tx.execute(query.with_for_update(read=True) if lock else query)
    return [_key(row) for row in rows]


def signer(keys: Sequence[PublicKey], digest: str, signature_hex: str | None) -> PublicKey | None:
    """The key that signed the artifact, None when none of `keys` did."""
    if signature_hex is None:
        return None
    return next((key for key in keys if signature.verify(digest, signature_hex, key.public_key_hex)), None)


class PublicKeys:
    def __init__(self, database: DatabasePort) -> None:
        self._database = database

    async def list(self, app: str) -> Sequence[PublicKey]:
        """The newest first. Raises NotFound."""
        async with self._database.read() as tx:
            app_id = await records.app_id(tx, app)
            query = _KEYS.where(public_keys.c.app_id == app_id)
            rows = await tx.execute(query.order_by(public_keys.c.created_at.desc(), public_keys.c.id.desc()))
            return [_key(row) for row in rows]

    async def add(
        self, app: str, public_key_hex: str, *, trusted: bool, authorization: Authorization | None, actor: str
    ) -> PublicKey:
        """Let a key in; one that is active already stays as it is. `trusted`: the caller needs nobody's word.

        Raises BadRequest (not a key), NotFound, Forbidden (no good authorization), Conflict (too many).
        """
        signature.check_public_key(public_key_hex)
        if authorization is not None:
            signature.check_signature(authorization.signature_hex)
        try:
            async with self._database.write() as tx:
                made = await self._add(tx, app, public_key_hex, trusted, authorization, actor)
        except IntegrityError:  # the same key, by somebody else at this moment
            async with self._database.write() as tx:
                made = await self._add(tx, app, public_key_hex, trusted, authorization, actor)
        await self._recognize(made)
        return made

    async def _add(
        self,
        tx: AsyncConnection,
        app: str,
        public_key_hex: str,
        trusted: bool,
        authorization: Authorization | None,
        actor: str,
    ) -> PublicKey:
        app_id = await records.app_id(tx, app)
        query = _KEYS.where(public_keys.c.app_id == app_id, public_keys.c.public_key_hex == public_key_hex)
        row = (await tx.execute(query.with_for_update())).one_or_none()
        known = None if row is None else _key(row)
        vouching = None
        if not trusted:
            vouching = await self._vouching(tx, app, app_id, public_key_hex, authorization)
            if known is not None and not known.active:
                raise Forbidden("this key was deactivated: an admin may let it in again")
        if known is not None and known.active:
            return known
        now = now_us()
        if known is not None:
            values = {"active": True, "deactivated_at": None, "authorized_by": None, "created_by": actor}
            await tx.execute(sa.update(public_keys).where(public_keys.c.id == known.id).values(values))
            return PublicKey(known.id, app_id, public_key_hex, True, actor, known.created_at, None)
        number = sa.select(sa.func.count()).select_from(public_keys).where(public_keys.c.app_id == app_id)
        if int(await tx.scalar(number) or 0) >= MAX_KEYS:
            raise Conflict(f"an app has at most {MAX_KEYS} public keys")
        made = PublicKey(new_id(), app_id, public_key_hex, True, actor, now, None)
        await tx.execute(
            sa.insert(public_keys).values(
                id=made.id, app_id=app_id, public_key_hex=public_key_hex, active=True, created_by=actor,
                created_at=now, authorized_by=None if vouching is None else vouching.id,
            )
        )  # fmt: skip
        return made

    async def _vouching(
        self, tx: AsyncConnection, app: str, app_id: str, public_key_hex: str, authorization: Authorization | None
    ) -> PublicKey:
        if authorization is None:
            raise Forbidden("a public key is added by an admin, or with `authorization` by an active key of the app")
        keys = await active_keys(tx, app_id, lock=True)
        named = [key for key in keys if authorization.key in (key.id, key.key_id, key.public_key_hex)]
        if not named:
            raise Forbidden("the key that is to vouch for the new one is not an active key of the app")
        if not signature.authorized(app, public_key_hex, authorization.signature_hex, named[0].public_key_hex):
            raise Forbidden("the authorization is not the named key's signature of this app and this new key")
        return named[0]

    async def deactivate(self, app: str, key_id: str) -> PublicKey:
        """From now on nothing it signed counts. Idempotent. Raises NotFound."""
        async with self._database.write() as tx:
            app_id = await records.app_id(tx, app)
            mine = (public_keys.c.app_id == app_id, public_keys.c.id == key_id)
            row = (await tx.execute(_KEYS.where(*mine).with_for_update())).one_or_none()
            if row is None:
                raise NotFound(f"app '{app}' has no public key '{key_id[:64]}'")
            if row.active:
                values = {"active": False, "deactivated_at": now_us()}
                await tx.execute(sa.update(public_keys).where(*mine).values(values))
                rested = (artifacts.c.app_id == app_id, artifacts.c.verified_by == key_id)
                await tx.execute(sa.update(artifacts).where(*rested).values(verified=False, verified_by=None))
            return _key((await tx.execute(_KEYS.where(*mine))).one())

    async def _recognize(self, key: PublicKey) -> None:
        """What the key had signed before it was known counts from now on. Broken off, it is judged where it is
        deployed all the same, and goes on when the key is added again."""
        after = ""
        while True:
            query = (
                sa.select(artifacts.c.id, artifacts.c.digest, artifacts.c.signature)
                .where(
                    artifacts.c.app_id == key.app_id,
                    artifacts.c.status == "stored",
                    artifacts.c.signature.is_not(None),
                    artifacts.c.verified.is_(sa.false()),
                    artifacts.c.id > after,
                )
                .order_by(artifacts.c.id)
                .limit(_BATCH)
            )
            async with self._database.read() as tx:
                rows = (await tx.execute(query)).all()
            if not rows:
                return
            after = rows[-1].id
            good = [row for row in rows if signer([key], row.digest, row.signature)]
            if good:
                await self._mark(key, good)

    async def _mark(self, key: PublicKey, good: Sequence[sa.Row[*tuple[Any, ...]]]) -> None:
        async with self._database.write() as tx:
            if key.id not in {one.id for one in await active_keys(tx, key.app_id, lock=True)}:
                return
            for row in good:
                same = (artifacts.c.id == row.id, artifacts.c.signature == row.signature)
                await tx.execute(sa.update(artifacts).where(*same).values(verified=True, verified_by=key.id))
            rows = [
                events.row(key.app_id, row.digest, What.SIGNED, events.SERVER, key.key_id, artifact_id=row.id)
                for row in good
            ]
            await events.add(tx, *rows)


def authorization(key_id: str | None, public_key_hex: str | None, signature_hex: str) -> Authorization:
    """Raises BadRequest unless exactly one of the two names the key."""
    named = [value for value in (key_id, public_key_hex) if value]
    if len(named) != 1:
        raise BadRequest("authorization names one key, by key_id or by public_key_hex")
    return Authorization(named[0], signature_hex)
