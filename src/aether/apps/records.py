"""Rows of apps and deployments as typed values, and the queries that more than one service needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.model.deployment import UNDER_WAY, DeploymentStatus
from aether.model.errors import NotFound
from aether.rollout.gates import Shift
from aether.rollout.machine import Strategy
from aether.stores.database.tables import applications, artifacts, configs, deployments, formations

WEB = "web"
"""The process type that the edge sends requests to."""
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
    env: Mapping[str, str]
    health: Health
    timeout_secs: float
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
        """What the rollout may take in all: its timeout, and the steps twice, since a new server repeats one."""
        shift = self.shift
        return self.timeout_secs + (0.0 if shift is None else 2 * shift.total_secs)


_DEPLOYMENT = (
    deployments.c.id, deployments.c.app_id, applications.c.name.label("app"), deployments.c.artifact_id,
    deployments.c.digest, artifacts.c.content_digest, deployments.c.config_version, deployments.c.release,
    deployments.c.status, deployments.c.strategy, deployments.c.runtime, deployments.c.command, deployments.c.env,
    deployments.c.health, deployments.c.timeout_secs, deployments.c.rollout, deployments.c.rollout_step,
    deployments.c.description, deployments.c.rollback_of,
    deployments.c.idempotency_key, deployments.c.created_by, deployments.c.trace_id, deployments.c.error,
    deployments.c.epoch, deployments.c.created_at, deployments.c.rollout_started_at,
    deployments.c.rollout_completed_at,
)  # fmt: skip


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
    values["env"] = json.loads(values["env"])
    values["rollout"] = Shift.from_json(values["rollout"])
    values["health"] = Health.from_json(values["health"])
    values["error"] = DeploymentError.from_json(values["error"]) if values["error"] else None
    return DeploymentRow(**values)


def app_of(row: sa.Row[Any]) -> AppRow:
    return AppRow(**dict(row._mapping))  # pyright: ignore[reportPrivateUsage]


async def find_app(tx: AsyncConnection, name: str) -> AppRow:
    """Raise NotFound unless `name` is an app that is not being deleted."""
    row = (await tx.execute(sa.select(applications).where(applications.c.name == name))).one_or_none()
    if row is None or row.deleting_at is not None:
        raise NotFound(f"there is no app '{name}'")
    return app_of(row)


async def find_deployment(tx: AsyncConnection, deployment_id: str) -> DeploymentRow:
    row = (await tx.execute(select_deployments().where(deployments.c.id == deployment_id))).one_or_none()
    if row is None:
        raise NotFound(f"there is no deployment '{deployment_id}'")
    return deployment_of(row)


async def config_env(tx: AsyncConnection, app_id: str, version: int) -> dict[str, str]:
    """The variables of one config version; version 0 is the empty one that every app begins with."""
    found = await tx.execute(
        sa.select(configs.c.env).where(configs.c.app_id == app_id, configs.c.version == version)
    )  # fmt: skip
    text = found.scalar_one_or_none()
    return json.loads(text) if text else {}


async def quantity(tx: AsyncConnection, app_id: str, process: str = WEB) -> int:
    """How many instances of a process type the app wants; one until somebody has said."""
    found = await tx.execute(
        sa.select(formations.c.quantity).where(formations.c.app_id == app_id, formations.c.process == process)
    )
    wanted = found.scalar_one_or_none()
    return 1 if wanted is None else wanted


async def newest_config_version(tx: AsyncConnection, app_id: str) -> int:
    found = await tx.execute(sa.select(sa.func.max(configs.c.version)).where(configs.c.app_id == app_id))
    return found.scalar_one_or_none() or 0
