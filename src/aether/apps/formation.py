"""The process types of apps as their users see them: how many of each are wanted and ready, by the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.apps.cron_records import CronRun, last_runs
from aether.apps.records import UNDER_WAY_VALUES, sizes_of
from aether.model.errors import BadRequest
from aether.model.processes import WEB, Cron, ProcessTypes
from aether.model.schedule import Schedule
from aether.model.times import now_us
from aether.stores.database.tables import applications, deployments, formations, instances

MAX_INSTANCES = 50
"""Of one process type of one app."""


@dataclass(frozen=True, slots=True)
class ProcessState:
    """One process type of an app's active release. Of a cron process `desired` is 1, or 0 while it is paused, and
    `ready` is 1 while it runs."""

    name: str
    kind: str
    command: str
    desired: int
    ready: int
    schedule: str | None = None
    timezone: str | None = None
    next_run: int | None = None
    """In microseconds since the epoch; None while it is paused."""
    last_run: CronRun | None = None


async def process_states(tx: AsyncConnection, app_ids: Sequence[str]) -> Mapping[str, Sequence[ProcessState]]:
    """By app; an app without a release has none."""
    active = (
        await tx.execute(
            sa.select(applications.c.id, deployments.c.command, deployments.c.processes)
            .join(deployments, deployments.c.id == applications.c.active_deployment_id)
            .where(applications.c.id.in_(app_ids))
        )
    ).all()
    sizes: dict[tuple[str, str], int] = {}
    for row in await tx.execute(sa.select(formations).where(formations.c.app_id.in_(app_ids))):
        sizes[row.app_id, row.process] = row.quantity
    ready: dict[tuple[str, str], int] = {}
    counted = await tx.execute(
        sa.select(instances.c.app_id, instances.c.process, sa.func.count())
        .join(applications, applications.c.active_deployment_id == instances.c.deployment_id)
        .where(instances.c.app_id.in_(app_ids), instances.c.status == "ready")
        .group_by(instances.c.app_id, instances.c.process)
    )
    for app_id, process, count in counted:
        ready[app_id, process] = count
    last = await last_runs(tx, app_ids)
    now = now_us()
    found: dict[str, Sequence[ProcessState]] = {}
    for row in active:
        types = ProcessTypes.from_json(row.processes)
        states: list[ProcessState] = []
        for name in types.names:
            key = row.id, name
            cron = types.crons.get(name)
            one = cron or types.workers.get(name)
            states.append(
                ProcessState(
                    name,
                    types.kind_of(name) or WEB,
                    row.command if one is None else one.command,
                    sizes.get(key, 1),
                    ready.get(key, 0),
                    None if cron is None else cron.schedule,
                    None if cron is None else cron.timezone,
                    None if cron is None or not sizes.get(key, 1) else _next(cron, now),
                    last.get(key),
                )
            )
        found[row.id] = states
    return found


def _next(cron: Cron, now: int) -> int | None:
    return Schedule(cron.schedule, cron.timezone).following(now)


async def set_sizes(tx: AsyncConnection, app_id: str, sizes: Mapping[str, int]) -> None:
    """Record how many instances of each process type the app wants. Raises BadRequest naming the one that neither the
    active release nor the one under way has, or that is out of bounds."""
    check_sizes(sizes, await _kinds(tx, app_id))
    before = await sizes_of(tx, app_id)
    for process, wanted in sizes.items():
        row = formations.c.app_id == app_id, formations.c.process == process
        if process in before:
            await tx.execute(sa.update(formations).where(*row).values(quantity=wanted))
        else:
            await tx.execute(sa.insert(formations).values(app_id=app_id, process=process, quantity=wanted))


async def _kinds(tx: AsyncConnection, app_id: str) -> Mapping[str, str]:
    """The app's process types, by name, and of which kind each is."""
    found = await tx.execute(
        sa.select(deployments.c.processes)
        .join(applications, applications.c.id == deployments.c.app_id)
        .where(
            deployments.c.app_id == app_id,
            sa.or_(
                deployments.c.status.in_(UNDER_WAY_VALUES),
                deployments.c.id == applications.c.active_deployment_id,
            ),
        )
    )
    kinds = {WEB: WEB}
    for text in found.scalars():
        types = ProcessTypes.from_json(text)
        kinds |= {name: types.kind_of(name) or WEB for name in types.names}
    return kinds


def check_sizes(sizes: Mapping[str, int], kinds: Mapping[str, str]) -> None:
    """Raise BadRequest naming the process type that is unknown or out of bounds."""
    if not sizes:
        raise BadRequest('say how many, as in {"web": 3}')
    for process, wanted in sizes.items():
        if process not in kinds:
            raise BadRequest(
                f"there is no process type '{process[:40]}'; there is {', '.join(kinds)}", {"field": process[:40]}
            )
        most = 1 if kinds[process] == "cron" else MAX_INSTANCES
        if not 0 <= wanted <= most:
            why = " (a cron process has one run at a time; 0 pauses it)" if most == 1 else ""
            raise BadRequest(f"{process} must be 0 to {most}, not {wanted}{why}", {"field": process})
