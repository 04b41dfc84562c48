"""Rows of apps and deployments as typed values, and the queries that more than one service needs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.model import volumes
from aether.model.deployment import UNDER_WAY, DeploymentStatus
from aether.model.errors import NotFound
from aether.model.instance import Volume
from aether.model.processes import ProcessTypes
from aether.rollout.gates import Shift
from aether.rollout.machine import Strategy
from aether.stores.database.tables import applications, artifacts, configs, deployments, formations

UNDER_WAY_VALUES = sorted(status.value for status in UNDER_WAY)


@dataclass(frozen=True, slots=True)
class AppRow:
    id: str
    name: str
    owner: str
    created_at: int
    active_deployment_id: str | None
    last_release: int
    deleting_at: int | None


@dataclass(frozen=True, slots=True)
class Health:
    """How a deployment wants to be probed; None means the default (see `aether.rollout.health`)."""

    path: str | None = None
    port: int | None = None

    def to_json(self) -> str:
        return json.dumps({"path": self.path, "port": self.port}, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Health:
        values: dict[str, Any] = json.loads(text)
        return Health(values.get("path"), values.get("port"))


@dataclass(frozen=True, slots=True)
class DeploymentError:
    """Why a deployment failed, with the app's own last lines."""

    code: str
    message: str
    log_tail: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps({"code": self.code, "message": self.message, "log_tail": list(self.log_tail)})

    @staticmethod
    def from_json(text: str) -> DeploymentError:
        values: dict[str, Any] = json.loads(text)
        return DeploymentError(values["code"], values["message"], tuple(values.get("log_tail", ())))


@dataclass(frozen=True, slots=True)
class CommandRun:
    """A deployment's release command as it is on record, from before it starts. `ok` is None until it has ended."""

    instance_id: str
    started_at: int
    ended_at: int | None = None
    ok: bool | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @property
    def took_secs(self) -> float:
        return 0.0 if self.ended_at is None else max(0.0, (self.ended_at - self.started_at) / 1e6)


@dataclass(frozen=True, slots=True)
class DeploymentRow:
    """One deployment; times in microseconds since the epoch."""

    id: str
    app_id: str
    app: str
    artifact_id: str
    digest: str
    content_digest: str | None
    config_version: int
    release: int | None
    status: DeploymentStatus
    strategy: str
    runtime: str | None
    command: str
    sealed_env: str
    """The variables that came with the deployment; `aether.apps.vault` opens them."""
    health: Health
    timeout_secs: float
    processes: ProcessTypes
    """What runs besides web, and the release command."""
    release_command: CommandRun | None
    """How that went, once it has begun."""
    volumes: tuple[Volume, ...]
    rollout: Shift
    rollout_step: int
    """The newest step in which traffic was moved, counted from 1."""
    description: str
    rollback_of: str | None
    idempotency_key: str | None
    created_by: str
    trace_id: str | None
    error: DeploymentError | None
    epoch: int
    created_at: int
    rollout_started_at: int | None
    rollout_completed_at: int | None

    @property
    def shift(self) -> Shift | None:
        """How traffic moves, None for a strategy that does not move it in steps."""
        return self.rollout.for_strategy(Strategy(self.strategy))

    @property
    def longest_secs(self) -> float:
        """What the rollout may take in all: its timeout, the release command's, and the steps twice, since a new
        server repeats one."""
        shift, release = self.shift, self.processes.release
        command = 0.0 if release is None else release.timeout_secs
        return self.timeout_secs + command + (0.0 if shift is None else 2 * shift.total_secs)


_DEPLOYMENT = (
    deployments.c.id, deployments.c.app_id, applications.c.name.label("app"), deployments.c.artifact_id,
    deployments.c.digest, artifacts.c.content_digest, deployments.c.config_version, deployments.c.release,
    deployments.c.status, deployments.c.strategy, deployments.c.runtime, deployments.c.command,
    deployments.c.env.label("sealed_env"),
    deployments.c.health, deployments.c.processes, deployments.c.release_command,
    deployments.c.timeout_secs, deployments.c.rollout, deployments.c.volumes,
    deployments.c.rollout_step, deployments.c.description, deployments.c.rollback_of, deployments.c.idempotency_key,
    deployments.c.created_by, deployments.c.trace_id, deployments.c.error,
    deployments.c.epoch, deployments.c.created_at, deployments.c.rollout_started_at,
    deployments.c.rollout_completed_at,
)  # fmt: skip


def under_way(app_id: str) -> sa.Select[*tuple[Any, ...]]:
    """The deployments of an app that are under way, locked one after the other: their status is about to change."""
    query = select_deployments().where(deployments.c.app_id == app_id, deployments.c.status.in_(UNDER_WAY_VALUES))
    return query.order_by(deployments.c.id).with_for_update(of=deployments, key_share=True)


def select_deployments() -> sa.Select[*tuple[Any, ...]]:
    """Deployments with their app's name and their artifact's content digest, to be narrowed by the caller."""
    return (
        sa.select(*_DEPLOYMENT)
        .join(applications, applications.c.id == deployments.c.app_id)
        .join(artifacts, artifacts.c.id == deployments.c.artifact_id)
    )


def deployment_of(row: sa.Row[Any]) -> DeploymentRow:
    values = dict(row._mapping)  # pyright: ignore[reportPrivateUsage]
    values["status"] = DeploymentStatus(values["status"])
    values["rollout"] = Shift.from_json(values["rollout"])
    values["volumes"] = volumes.from_json(values["volumes"])
    values["processes"] = ProcessTypes.from_json(values["processes"])
    values["release_command"] = command_run(values["release_command"])
    values["health"] = Health.from_json(values["health"])
    values["error"] = DeploymentError.from_json(values["error"]) if values["error"] else None
    return DeploymentRow(**values)


def command_run(text: str | None) -> CommandRun | None:
    return CommandRun(**json.loads(text)) if text else None


def app_of(row: sa.Row[Any]) -> AppRow:
    return AppRow(**dict(row._mapping))  # pyright: ignore[reportPrivateUsage]


async def find_app(tx: AsyncConnection, name: str, *, lock: bool = False) -> AppRow:
    """Raise NotFound unless `name` is an app that is not being deleted. With `lock` nobody else changes the app, its
    deployments, sizes, config or runs until the transaction ends."""
    query = sa.select(applications).where(applications.c.name == name)
    if lock:
        query = query.with_for_update(key_share=True)
    row = (await tx.execute(query)).one_or_none()
    if row is None or row.deleting_at is not None:
        raise NotFound(f"there is no app '{name}'")
    return app_of(row)


async def find_deployment(tx: AsyncConnection, deployment_id: str, *, lock: bool = False) -> DeploymentRow:
    """Raise NotFound. With `lock` its status stays what it is until the transaction ends."""
    query = select_deployments().where(deployments.c.id == deployment_id)
    if lock:
        query = query.with_for_update(of=deployments, key_share=True)
    row = (await tx.execute(query)).one_or_none()
    if row is None:
        raise NotFound(f"there is no deployment '{deployment_id}'")
    return deployment_of(row)


async def sizes_of(tx: AsyncConnection, app_id: str) -> dict[str, int]:
    """How many instances of each process type the app wants; one of those that nobody has said anything of."""
    found = await tx.execute(
        sa.select(formations.c.process, formations.c.quantity).where(formations.c.app_id == app_id)
    )
    return {row.process: row.quantity for row in found}


async def newest_config_version(tx: AsyncConnection, app_id: str) -> int:
    found = await tx.execute(sa.select(sa.func.max(configs.c.version)).where(configs.c.app_id == app_id))
    return found.scalar_one_or_none() or 0
