"""Shapes of apps, deployments and releases in answers, and how they are made from what the services return."""

from __future__ import annotations

import msgspec

from aether.api.services import Services
from aether.apps.catalogue import AppView as AppState
from aether.apps.formation import ProcessState
from aether.apps.records import DeploymentRow
from aether.apps.services import AppServices
from aether.model.deployment import DeploymentStatus
from aether.model.errors import ServiceUnavailable
from aether.model.processes import ProcessTypes
from aether.model.times import to_iso, to_iso_or_none


class ReleaseRef(msgspec.Struct):
    version: int
    digest: str
    deployment_id: str
    created_at: str


class InstanceCount(msgspec.Struct):
    desired: int
    ready: int


class CronRunView(msgspec.Struct):
    """A moment of a schedule: `status` is running, succeeded, failed, timed_out or skipped; `message` says why."""

    scheduled_at: str
    status: str
    message: str
    exit_code: int | None
    started_at: str | None
    ended_at: str | None


class ProcessView(msgspec.Struct):
    """A process type of the active release; `kind` is web, worker or cron. A cron process is wanted once, or not
    while it is paused, and ready while it runs."""

    name: str
    kind: str
    command: str
    desired: int
    ready: int
    schedule: str | None
    timezone: str | None
    next_run: str | None
    last_run: CronRunView | None


class App(msgspec.Struct):
    """`status` is running, starting, degraded, stopped, failed or empty; `release` is the active one, `instances` are
    those of web."""

    id: str
    name: str
    owner: str
    created_at: str
    url: str
    status: str
    release: ReleaseRef | None
    instances: InstanceCount
    processes: list[ProcessView]


class DeploymentErrorView(msgspec.Struct):
    """Why it failed; `log_tail` are the app's own last lines."""

    code: str
    message: str
    log_tail: list[str]


class ProcessTypeView(msgspec.Struct, omit_defaults=True):
    """`kind` is worker or cron; what belongs to the other kind is left out."""

    kind: str
    command: str
    schedule: str | None = None
    timezone: str | None = None
    timeout_secs: float | None = None
    missed: str | None = None
    settle_secs: float | None = None


class ReleaseCommandView(msgspec.Struct):
    command: str
    timeout_secs: float


class RolloutStep(msgspec.Struct):
    """How far a canary or bluegreen rollout has come; `percent` of the requests go to the new release."""

    number: int
    of: int
    percent: int


class Deployment(msgspec.Struct):
    """`longest_secs` is what its rollout may take in all."""

    id: str
    app: str
    digest: str
    content_digest: str | None
    runtime: str | None
    command: str
    processes: dict[str, ProcessTypeView]
    release_command: ReleaseCommandView | None
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
    step: RolloutStep | None


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
        processes=[process_view(process) for process in state.processes],
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
        processes=process_views(row.processes),
        release_command=None
        if row.processes.release is None
        else ReleaseCommandView(row.processes.release.command, row.processes.release.timeout_secs),
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
        step=_step(row),
    )


def _step(row: DeploymentRow) -> RolloutStep | None:
    """None while the old release gets every request, and once the rollout is over."""
    shift = row.shift
    if shift is None or not row.rollout_step or row.status is not DeploymentStatus.ROLLING_OUT:
        return None
    return RolloutStep(row.rollout_step, len(shift.steps), shift.steps[row.rollout_step - 1])


def process_view(state: ProcessState) -> ProcessView:
    run = state.last_run
    return ProcessView(
        name=state.name,
        kind=state.kind,
        command=state.command,
        desired=state.desired,
        ready=state.ready,
        schedule=state.schedule,
        timezone=state.timezone,
        next_run=to_iso_or_none(state.next_run),
        last_run=None
        if run is None
        else CronRunView(
            to_iso(run.scheduled_at),
            run.status.value,
            run.message,
            run.exit_code,
            to_iso_or_none(run.started_at),
            to_iso_or_none(run.ended_at),
        ),
    )


def process_views(types: ProcessTypes) -> dict[str, ProcessTypeView]:
    workers = {
        name: ProcessTypeView("worker", one.command, settle_secs=one.settle_secs)
        for name, one in types.workers.items()
    }
    crons = {
        name: ProcessTypeView("cron", one.command, one.schedule, one.timezone, one.timeout_secs, one.missed)
        for name, one in types.crons.items()
    }
    return workers | crons


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
