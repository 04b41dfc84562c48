"""The servers' own Ed25519 keys, with which they sign provenance that they have verified.

They are in the database that the servers share, the private halves sealed under the keys that are outside it, so that
every server signs with the same ones. Two may sign at once: during a rotation whoever checks can know either. A
retired key signs no more and stays listed, because what it signed stays signed.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.artifact import signature
from aether.model.database import DatabasePort
from aether.model.errors import Conflict, NotFound
from aether.model.times import now_us
from aether.observability.logging import logger
from aether.registry.events import SERVER
from aether.registry.ports import Sealer
from aether.stores.database.tables import attestation_keys

_PLACES = (1, 2)
_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class AttestationKey:
    id: str
    public_key_hex: str
    active: bool
    created_by: str
    created_at: int
    retired_at: int | None


def identity(key_id: str) -> str:
    """The row that a sealed key is bound to."""
    return f"attestation_keys/{key_id}"


class AttestationKeys:
    def __init__(self, database: DatabasePort, sealer: Sealer) -> None:
        self._database = database
        self._sealer = sealer

    async def ensure(self) -> None:
        """Make the first key; servers that start at once agree on one."""
        async with self._database.read() as tx:
            if await self._active(tx):
                return
        try:
            await self._make(_PLACES[0], SERVER)
        except IntegrityError:
            _log.debug("another server has made the first key")

    async def list(self) -> Sequence[AttestationKey]:
        """All of them, the newest first."""
        query = sa.select(attestation_keys)
        async with self._database.read() as tx:
            rows = await tx.execute(
                query.order_by(attestation_keys.c.created_at.desc(), attestation_keys.c.id.desc())
            )
            return [_key(row) for row in rows]

    async def rotate(self, actor: str) -> AttestationKey:
        """Make one more, which signs beside the one there is. Raises Conflict when two sign already."""
        async with self._database.read() as tx:
            taken = {row.place for row in await self._active(tx)}
        free = [place for place in _PLACES if place not in taken]
        try:
            if free:
                return await self._make(free[0], actor)
        except IntegrityError:
            _log.debug("another server has made a key at this moment")
        raise Conflict("two keys sign already: retire one first")

    async def retire(self, key_id: str) -> AttestationKey:
        """Let a key sign no more. Idempotent. Raises NotFound, and Conflict for the last one."""
        async with self._database.write() as tx:
            query = sa.select(attestation_keys).order_by(attestation_keys.c.id)
            rows = {row.id: row for row in await tx.execute(query.with_for_update())}
            row = rows.get(key_id)
            if row is None:
                raise NotFound(f"the server has no key '{key_id[:16]}'")
            if row.place is not None:
                if sum(one.place is not None for one in rows.values()) == 1:
                    raise Conflict("this is the only key that signs: make another one first")
                values = {"place": None, "retired_at": now_us()}
                await tx.execute(sa.update(attestation_keys).where(attestation_keys.c.id == key_id).values(values))
            changed = (await tx.execute(query.where(attestation_keys.c.id == key_id))).one()
        return _key(changed)

    async def seeds(self) -> Sequence[bytes]:
        """The private halves of the keys that sign. Raises ServiceUnavailable when they cannot be opened."""
        async with self._database.read() as tx:
            rows = await self._active(tx)
        return [self._sealer.unseal(row.sealed, identity(row.id)) for row in rows]

    async def _make(self, place: int, actor: str) -> AttestationKey:
        seed = secrets.token_bytes(signature.SEED_BYTES)
        public = signature.public_key(seed)
        key_id = signature.key_id(public)
        made = AttestationKey(key_id, public, True, actor, now_us(), None)
        async with self._database.write() as tx:
            await tx.execute(
                sa.insert(attestation_keys).values(
                    id=key_id, public_key_hex=public, sealed=self._sealer.seal(seed, identity(key_id)), place=place,
                    created_by=actor, created_at=made.created_at,
                )
            )  # fmt: skip
        return made

    async def _active(self, tx: AsyncConnection) -> Sequence[sa.Row[*tuple[Any, ...]]]:
        query = sa.select(attestation_keys).where(attestation_keys.c.place.is_not(None))
        return (await tx.execute(query.order_by(attestation_keys.c.place))).all()


def _key(row: Any) -> AttestationKey:
    return AttestationKey(
        row.id, row.public_key_hex, row.place is not None, row.created_by, row.created_at, row.retired_at
    )  # fmt: skip
