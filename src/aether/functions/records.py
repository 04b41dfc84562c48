"""Rows of functions and of their versions, and the statements that several modules need.

What may change and when is the catalogue's; how variables are sealed is the vault's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.apps.vault import Vault
from aether.model.errors import NotFound
from aether.model.function import FunctionDefinition, is_function_id
from aether.model.function_instance import CodeForm
from aether.model.names import new_id
from aether.stores.database.tables import function_versions, functions

Row = sa.Row[*tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class StoredCode:
    """An archive in the object store; `digest` is the SHA-256 of its bytes."""

    digest: str
    form: CodeForm
    size_bytes: int
    artifact_id: str | None = None
    """The artifact that it is a copy of; None for an archive that came by itself."""


@dataclass(frozen=True, slots=True)
class Version:
    """What a function was from one change to the next; times in microseconds since the epoch."""

    number: int
    definition: FunctionDefinition
    """With the variables in clear."""
    code: StoredCode | None
    created_by: str
    created_at: int
    rollback_of: int | None = None


@dataclass(frozen=True, slots=True)
class Function:
    """A function as it is now."""

    id: str
    owner: str
    created_at: int
    updated_at: int
    current: Version

    @property
    def name(self) -> str:
        return self.current.definition.name


VERSIONS = sa.select(
    function_versions,
    functions.c.name,
    functions.c.owner,
    functions.c.version.label("newest"),
    functions.c.created_at.label("function_created_at"),
    functions.c.updated_at,
).join(functions, functions.c.id == function_versions.c.function_id)
NOW = VERSIONS.where(function_versions.c.version == functions.c.version, functions.c.deleting_at.is_(None))


def called(ref: str) -> sa.ColumnElement[bool]:
    """The condition on `functions` that one is meant by its id or name."""
    return functions.c.id == ref if is_function_id(ref) else functions.c.name == ref


def unknown(ref: str) -> NotFound:
    return NotFound(f"there is no function '{ref}'")


async def find(tx: AsyncConnection, vault: Vault, ref: str, *, lock: bool = False) -> Function:
    """Raises NotFound for a function that does not exist or is being deleted, ServiceUnavailable without the key of
    its variables."""
    if lock:
        # locked by itself first: what is read afterwards is then what the one before has written
        query = sa.select(functions.c.id).where(called(ref)).with_for_update(key_share=True)
        await tx.execute(query)
    row = (await tx.execute(NOW.where(called(ref)))).one_or_none()
    if row is None:
        raise unknown(ref)
    return function_of(row, vault)


def function_of(row: Row, vault: Vault) -> Function:
    return Function(row.function_id, row.owner, row.function_created_at, row.updated_at, version_of(row, vault))


def version_of(row: Row, vault: Vault) -> Version:
    env = vault.open_function(row.function_id, row.version, row.env)
    code = None
    if row.code_digest is not None:
        code = StoredCode(row.code_digest, CodeForm(row.code_form), row.code_bytes, row.artifact_id)
    definition = replace(FunctionDefinition.from_json(row.definition), env_vars=env)
    return Version(row.version, definition, code, row.created_by, row.created_at, row.rollback_of)


async def insert(tx: AsyncConnection, vault: Vault, function_id: str, version: Version) -> None:
    """Write a version, its variables sealed."""
    await vault.name_key(tx)
    code = version.code
    await tx.execute(
        sa.insert(function_versions).values(
            id=new_id(),
            function_id=function_id,
            version=version.number,
            definition=replace(version.definition, env_vars={}).to_json(),
            env=vault.seal_function(function_id, version.number, version.definition.env_vars),
            code_digest=None if code is None else code.digest,
            code_form=None if code is None else code.form.value,
            code_bytes=None if code is None else code.size_bytes,
            artifact_id=None if code is None else code.artifact_id,
            rollback_of=version.rollback_of,
            created_by=version.created_by,
            created_at=version.created_at,
        )
    )
