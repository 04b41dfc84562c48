"""Variables as they rest in the database: sealed, each set bound to its row, and opened only where needed.

Three kinds of rows hold variables: config versions (`configs.env`), what came with one deployment (`deployments.env`)
and versions of functions (`function_versions.env`). The keys and the cipher are the sealer's; who may see a value is
the API's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import sqlalchemy as sa

from aether.leases import hold
from aether.model.times import now_us
from aether.stores.database.tables import configs, secret_keys

KEY_NAMES = "secret keys"
"""Held while a key is named."""

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from aether.apps.records import DeploymentRow


class Sealer(Protocol):
    """Authenticated encryption under keys that are not in the database."""

    @property
    def newest(self) -> str:
        """Id of the key that seals."""
        ...

    @property
    def mark(self) -> str:
        """What every text sealed with the newest key, and no other, begins with."""
        ...

    def seal(self, plain: bytes, about: str) -> str: ...

    def unseal(self, text: str, about: str) -> bytes:
        """Raises ServiceUnavailable when the key is missing, or the text altered or made for something else."""
        ...


@dataclass(frozen=True, slots=True)
class Variables:
    """An environment and which of its names are secrets: those are never shown again."""

    env: Mapping[str, str]
    secrets: frozenset[str] = frozenset()

    def keeping(self, secrets: Collection[str]) -> Variables:
        """The same variables, with those of `secrets` that are among them secret too."""
        return Variables(self.env, self.secrets | (frozenset(secrets) & self.env.keys()))

    def hidden(self) -> list[str]:
        """The values of the secrets."""
        return [self.env[name] for name in sorted(self.secrets)]


NO_VARIABLES = Variables({})


class Vault:
    """Seals and opens the variables of apps and functions."""

    def __init__(self, sealer: Sealer) -> None:
        self.sealer = sealer

    async def name_key(self, tx: AsyncConnection) -> None:
        """Have the sealing key named until the transaction ends, before something that it seals is written: another
        server that uses a newer one may be about to take it off (see `aether.apps.sealing`)."""
        query = sa.select(secret_keys.c.id).where(secret_keys.c.id == self.sealer.newest).with_for_update(read=True)
        if await tx.scalar(query) is not None:
            return
        await hold(tx, KEY_NAMES)
        if await tx.scalar(query) is None:
            await tx.execute(sa.insert(secret_keys).values(id=self.sealer.newest, created_at=now_us()))

    def seal_config(self, app_id: str, version: int, variables: Variables) -> str:
        document = {"env": dict(variables.env), "secrets": sorted(variables.secrets)}
        return self.sealer.seal(_compact(document), config_identity(app_id, version))

    def open_config(self, app_id: str, version: int, text: str) -> Variables:
        """Raises ServiceUnavailable; never answers with less than what was sealed."""
        document: dict[str, Any] = json.loads(self.sealer.unseal(text, config_identity(app_id, version)))
        return Variables(document["env"], frozenset(document["secrets"]))

    def seal_env(self, app_id: str, deployment_id: str, env: Mapping[str, str]) -> str:
        return self.sealer.seal(_compact(dict(env)), deployment_identity(app_id, deployment_id))

    def open_env(self, row: DeploymentRow) -> dict[str, str]:
        """The variables that came with a deployment. Raises ServiceUnavailable."""
        return json.loads(self.sealer.unseal(row.sealed_env, deployment_identity(row.app_id, row.id)))

    def seal_function(self, function_id: str, version: int, env: Mapping[str, str]) -> str:
        return self.sealer.seal(_compact(dict(env)), function_identity(function_id, version))

    def open_function(self, function_id: str, version: int, text: str) -> dict[str, str]:
        """The variables of one version of a function. Raises ServiceUnavailable."""
        return json.loads(self.sealer.unseal(text, function_identity(function_id, version)))

    async def config(self, tx: AsyncConnection, app_id: str, version: int) -> Variables:
        """The variables of one config version; version 0 is the empty one that every app begins with.
        Raises ServiceUnavailable."""
        found = await tx.execute(
            sa.select(configs.c.env).where(configs.c.app_id == app_id, configs.c.version == version)
        )
        text = found.scalar_one_or_none()
        return NO_VARIABLES if text is None else self.open_config(app_id, version, text)

    async def variables_of(self, tx: AsyncConnection, row: DeploymentRow) -> Variables:
        """Everything a deployment's instances are given: its config version, and over it what came with itself."""
        config = await self.config(tx, row.app_id, row.config_version)
        given = self.open_env(row)
        return Variables({**config.env, **given}, config.secrets)


def config_identity(app_id: str, version: int) -> str:
    """The row a text of `configs` is bound to."""
    return f"configs/{app_id}/{version}"


def deployment_identity(app_id: str, deployment_id: str) -> str:
    """The row a text of `deployments` is bound to."""
    return f"deployments/{app_id}/{deployment_id}"


def function_identity(function_id: str, version: int) -> str:
    """The row a text of `function_versions` is bound to."""
    return f"functions/{function_id}/{version}"


def _compact(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
