"""Which keys seal something, first sealing of what older versions left plain, and sealing anew under the newest key.

`secret_keys` names every key that may have sealed a row. A key is named there before it seals anything and taken off
in the transaction that finds no row of it left, so the few rows of that table answer at every start what a missing
key would cost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.apps.vault import KEY_NAMES, Variables, Vault, config_identity, deployment_identity, function_identity
from aether.leases import hold
from aether.model.database import DatabasePort
from aether.model.times import now_us
from aether.registry.attestation_keys import identity as attestation_key_identity
from aether.stores.database.tables import attestation_keys, configs, deployments, function_versions, secret_keys

_BATCH = 200
_log = structlog.stdlib.get_logger("aether.sealing")
_Row = sa.Row[*tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class _Kind:
    """One table with sealed rows."""

    table: sa.Table
    sealed: sa.Column[Any]
    identity: Callable[[_Row], str]
    columns: Sequence[sa.Column[Any]] = ()


_KINDS = (
    _Kind(
        configs,
        configs.c.env,
        lambda row: config_identity(row.app_id, row.version),
        (configs.c.app_id, configs.c.version),
    ),
    _Kind(
        deployments, deployments.c.env, lambda row: deployment_identity(row.app_id, row.id), (deployments.c.app_id,)
    ),
    _Kind(
        function_versions,
        function_versions.c.env,
        lambda row: function_identity(row.function_id, row.version),
        (function_versions.c.function_id, function_versions.c.version),
    ),
    _Kind(attestation_keys, attestation_keys.c.sealed, lambda row: attestation_key_identity(row.id)),
)


async def keys_in_use(database: DatabasePort) -> set[str]:
    """Ids of the keys that may have sealed something here."""
    async with database.read() as tx:
        return set((await tx.execute(sa.select(secret_keys.c.id))).scalars())


async def adopt(database: DatabasePort, vault: Vault) -> int:
    """Name the sealing key and, where no key was ever named, seal every row that is still plain: all or nothing.

    Returns how many rows were sealed. Call it before anything else touches variables.
    """
    newest = vault.sealer.newest
    sealed = 0
    async with database.write() as tx:
        await hold(tx, KEY_NAMES)
        named = set((await tx.execute(sa.select(secret_keys.c.id))).scalars())
        if not named:
            sealed = await _seal_plain(tx, vault)
        if newest not in named:
            await tx.execute(sa.insert(secret_keys).values(id=newest, created_at=now_us()))
    if sealed:
        _log.info("configuration that an older version kept in clear is sealed now", rows=sealed)
    return sealed


async def _seal_plain(tx: AsyncConnection, vault: Vault) -> int:
    sealed = 0
    for row in (await tx.execute(sa.select(configs))).all():
        text = vault.seal_config(row.app_id, row.version, Variables(json.loads(row.env)))
        await tx.execute(sa.update(configs).where(configs.c.id == row.id).values(env=text))
        sealed += 1
    found = await tx.execute(sa.select(deployments.c.id, deployments.c.app_id, deployments.c.env))
    for row in found.all():
        text = vault.seal_env(row.app_id, row.id, json.loads(row.env))
        await tx.execute(sa.update(deployments).where(deployments.c.id == row.id).values(env=text))
        sealed += 1
    return sealed


async def reseal(database: DatabasePort, vault: Vault) -> tuple[int, list[str]]:
    """Seal every row that an older key sealed under the newest one, some at a time, and take the older keys off.

    Returns how many rows were sealed anew and the ids taken off. May be broken off and called again at any time.
    """
    newest = vault.sealer.newest
    sealed = 0
    for kind in _KINDS:
        after = ""
        while True:
            async with database.write() as tx:
                query = _stale(kind, vault.sealer.mark, after).limit(_BATCH).with_for_update(key_share=True)
                rows = (await tx.execute(query)).all()
                for row in rows:
                    about = kind.identity(row)
                    text = vault.sealer.seal(vault.sealer.unseal(row.sealed, about), about)
                    query = sa.update(kind.table).where(kind.table.c.id == row.id)
                    await tx.execute(query.values({kind.sealed: text}))
            if not rows:
                break
            sealed += len(rows)
            after = rows[-1].id
    async with database.write() as tx:
        # whoever seals something with an older key meanwhile holds or awaits the name of that key
        await tx.execute(sa.select(secret_keys.c.id).order_by(secret_keys.c.id).with_for_update())
        for kind in _KINDS:
            if (await tx.execute(_stale(kind, vault.sealer.mark, "").limit(1))).first() is not None:
                return sealed, []  # a row that another server sealed meanwhile; the next call takes it
        old = (await tx.execute(sa.select(secret_keys.c.id).where(secret_keys.c.id != newest))).scalars().all()
        await tx.execute(sa.delete(secret_keys).where(secret_keys.c.id.in_(old)))
    if sealed or old:
        _log.info("everything is sealed with the newest key", key=newest, rows=sealed, no_longer_used=list(old))
    return sealed, list(old)


def _stale(kind: _Kind, mark: str, after: str) -> sa.Select[*tuple[Any, ...]]:
    table = kind.table
    query = sa.select(table.c.id, kind.sealed.label("sealed"), *kind.columns)
    current = kind.sealed.startswith(mark, autoescape=True)
    return query.where(table.c.id > after, sa.not_(current)).order_by(table.c.id)
