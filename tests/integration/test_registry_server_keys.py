"""The servers' own keys at rest: one for servers that start at once, sealed anew with a new key of the secrets."""

from __future__ import annotations

import asyncio
import os

import sqlalchemy as sa

from aether.apps import sealing
from aether.apps.vault import Vault
from aether.artifact import signature
from aether.registry.attestation_keys import AttestationKeys
from aether.stores.database.engine import Database
from aether.stores.database.tables import attestation_keys
from aether.stores.keys.keyring import Keyring, Source

SOURCE = Source("test", None)


async def test_servers_that_start_at_once_agree_on_one_key(database: Database) -> None:
    ring = Keyring([os.urandom(32)], SOURCE)
    await asyncio.gather(*(AttestationKeys(database, ring).ensure() for _ in range(5)))
    (key,) = await AttestationKeys(database, ring).list()
    (seed,) = await AttestationKeys(database, ring).seeds()
    assert signature.public_key(seed) == key.public_key_hex


async def test_they_are_sealed_anew_with_a_new_key(database: Database) -> None:
    old, new = os.urandom(32), os.urandom(32)
    first = Keyring([old], SOURCE)
    await sealing.adopt(database, Vault(first))
    keys = AttestationKeys(database, first)
    await keys.ensure()
    (seed,) = await keys.seeds()
    async with database.read() as tx:
        sealed = await tx.scalar(sa.select(attestation_keys.c.sealed))
    assert seed.hex() not in sealed
    both = Keyring([new, old], SOURCE)
    await sealing.adopt(database, Vault(both))
    count, gone = await sealing.reseal(database, Vault(both))
    assert (count, gone) == (1, first.ids)
    only_new = AttestationKeys(database, Keyring([new], SOURCE))
    assert await only_new.seeds() == [seed]
