"""Shapes of apps, deployments and releases in answers, and how they are made from what the services return."""

from __future__ import annotations

import msgspec

from aether.api.services import Services
from aether.apps.catalogue import AppView as AppState
from aether.apps.records import DeploymentRow
from aether.apps.services import AppServices
from aether.model.errors import ServiceUnavailable
from aether.model.times import to_iso, to_iso_or_none


class ReleaseRef(msgspec.Struct):
    version: int
    digest: str
    deployment_id: str
    created_at: str


class InstanceCount(msgspec.Struct):
    desired: int
    ready: int


class App(msgspec.Struct):
    """`status` is running, starting, degraded, stopped, failed or empty; `release` is the active one."""

    id: str
    name: str
    owner: str
    created_at: str
    url: str
    status: str
    release: ReleaseRef | None
    instances: InstanceCount


class DeploymentErrorView(msgspec.Struct):
    """Why it failed; `log_tail` are the app's own last lines."""

    code: str
    message: str
    log_tail: list[str]


class Deployment(msgspec.Struct):
    """`longest_secs` is what its rollout may take in all."""

    id: str
    app: str
    digest: str
    content_digest: str | None
    runtime: str | None
    command: str
    status: str
    strategy: str
    longest_secs: float
    release: int | None
    description: str
    rollback_of: str | None
    config_version: int
    created_by: str
    created_at: str
    rollout_started_at: str | None
    rollout_completed_at: str | None
    url: str
    trace_id: str | None
    error: DeploymentErrorView | None


class Release(msgspec.Struct):
    """A deployment that was active once; `version` counts from 1 per app."""

    version: int
    deployment_id: str
    digest: str
    content_digest: str | None
    runtime: str | None
    status: str
    description: str
    config_version: int
    created_by: str
    created_at: str
    rollback_of: str | None


def apps_of(services: Services) -> AppServices:
    """Raises ServiceUnavailable on a server that runs no apps."""
    if services.apps is None:
        raise ServiceUnavailable("this server runs no apps")
    return services.apps


def app_view(state: AppState, apps: AppServices) -> App:
    release = state.release
    return App(
        id=state.id,
        name=state.name,
        owner=state.owner,
        created_at=to_iso(state.created_at),
        url=apps.url_of(state.name),
        status=state.status,
        release=None
        if release is None
        else ReleaseRef(release.version, release.digest, release.deployment_id, to_iso(release.created_at)),
        instances=InstanceCount(state.desired, state.ready),
    )


def deployment_view(row: DeploymentRow, apps: AppServices) -> Deployment:
    error = row.error
    return Deployment(
        id=row.id,
        app=row.app,
        digest=row.digest,
        content_digest=row.content_digest,
        runtime=row.runtime,
        command=row.command,
        status=row.status.value,
        strategy=row.strategy,
        longest_secs=row.longest_secs,
        release=row.release,
        description=row.description,
        rollback_of=row.rollback_of,
        config_version=row.config_version,
        created_by=row.created_by,
        created_at=to_iso(row.created_at),
        rollout_started_at=to_iso_or_none(row.rollout_started_at),
        rollout_completed_at=to_iso_or_none(row.rollout_completed_at),
        url=apps.url_of(row.app),
        trace_id=row.trace_id,
        error=None if error is None else DeploymentErrorView(error.code, error.message, list(error.log_tail)),
    )


def release_view(row: DeploymentRow) -> Release:
    return Release(
        version=row.release or 0,
        deployment_id=row.id,
        digest=row.digest,
        content_digest=row.content_digest,
        runtime=row.runtime,
        status=row.status.value,
        description=row.description,
        config_version=row.config_version,
        created_by=row.created_by,
        created_at=to_iso(row.rollout_completed_at or row.created_at),
        rollback_of=row.rollback_of,
    )
