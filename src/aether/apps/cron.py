"""Runs the cron processes of the apps of this server: looks when one is due, starts it, awaits and records its end.

Only the schedules of active releases count. What is due is decided in `aether.apps.due`; a moment is claimed by its
row in the record before anything starts, so that neither a restart nor a second server runs it twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import structlog

from aether.apps.cron_records import CronRecords, CronRun
from aether.apps.due import LATE_US, CronState, due, following
from aether.apps.job import Job
from aether.apps.replica import prune_ended
from aether.apps.runner import Runner
from aether.apps.tasks import Tasks
from aether.leases import LeaseLost
from aether.model.errors import AetherError, ServiceUnavailable
from aether.model.instance import InstanceSpec
from aether.model.processes import Cron
from aether.model.schedule import Schedule
from aether.model.times import now_us

LOOK_SECS = 20.0
"""A clock that jumps wakes nobody: look at least so often."""
_SHORTEST_PAUSE_SECS = 0.01
_DATABASE_PAUSE_SECS = 0.5
_log = structlog.stdlib.get_logger("aether.cron")


@dataclass(slots=True)
class _Entry:
    deployment_id: str
    schedule: Schedule
    considered: int


class Crontab:
    """`runners` are the apps of this server by id, as they come and go."""

    def __init__(
        self,
        runners: Mapping[str, Runner],
        records: CronRecords,
        tasks: Tasks,
        clock: Callable[[], int] = now_us,
    ) -> None:
        self._runners = runners
        self._records = records
        self._tasks = tasks
        self._clock = clock
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._running: dict[tuple[str, str], str] = {}
        self._wake = asyncio.Event()

    def changed(self) -> None:
        """Another release, another size, an app more or less: look again."""
        self._wake.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self._wake.clear()
            pause = LOOK_SECS
            try:
                pause = await self._look()
            except ServiceUnavailable as error:
                _log.warning("cron processes wait for the database", error=error.message)
                pause = _DATABASE_PAUSE_SECS
            except Exception as error:  # noqa: BLE001 - one app's trouble must not end the schedules of all
                _log.error("looking at the schedules failed", exc_info=error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()

    def take_up(self, runner: Runner, run: CronRun) -> None:
        """Await the end of a run that an earlier server began, or start it if that one did not get so far just now.

        Of one that is older and has left nothing on this machine it is not known whether it ran."""
        spec, fresh = None, self._clock() - (run.started_at or 0) <= LATE_US
        if fresh and runner.active is not None and runner.active.release.deployment_id == run.deployment_id:
            known = runner.active.release.crons.get(run.process)
            spec = None if known is None else _timed(*known)
        self._carry_out(runner, run, spec)

    async def _look(self) -> float:
        """Start what is due; returns after how many seconds to look again."""
        for key in [key for key in self._entries if key[0] not in self._runners]:
            del self._entries[key]
        next_at: list[int] = []
        for runner in list(self._runners.values()):
            active, lease = runner.active, runner.drivers.lease
            if active is None or runner.held or not lease.holds:
                continue
            for name, (cron, spec) in active.release.crons.items():
                try:
                    at = await self._consider(runner, active.release.deployment_id, name, cron, spec)
                except LeaseLost:
                    break
                if at is not None:
                    next_at.append(at)
        if not next_at:
            return LOOK_SECS
        return max(_SHORTEST_PAUSE_SECS, min(LOOK_SECS, (min(next_at) - self._clock()) / 1e6))

    async def _consider(
        self, runner: Runner, deployment_id: str, name: str, cron: Cron, spec: InstanceSpec
    ) -> int | None:
        key = runner.app_id, name
        entry = await self._entry(key, deployment_id, cron)
        now = self._clock()
        if runner.sizes.get(name, 1) == 0:
            entry.considered = now  # paused: what passes meanwhile is not made up for
            return None
        state = CronState(entry.schedule, entry.considered, key in self._running, cron.missed == "once")
        decision = due(state, now)
        lease, at = runner.drivers.lease, decision.scheduled_at
        if at is not None and decision.skipped:
            await self._records.skip(lease, runner.app_id, deployment_id, name, at, decision.skipped)
            _log.info("a cron run was skipped", app=runner.app, process=name, why=decision.skipped)
        elif at is not None:
            run = await self._records.begin(lease, runner.app_id, deployment_id, name, at)
            if run is not None:
                self._carry_out(runner, run, _timed(cron, spec))
        entry.considered = decision.considered
        return following(replace(state, considered=decision.considered), now)

    async def _entry(self, key: tuple[str, str], deployment_id: str, cron: Cron) -> _Entry:
        entry = self._entries.get(key)
        if entry is not None and entry.deployment_id == deployment_id:
            return entry
        known = entry.schedule if entry is not None else None
        if entry is not None and known is not None and _says(known, cron):
            # the release changed and the schedule did not: what was due between the two is still due
            entry.deployment_id = deployment_id
            return entry
        considered = await self._records.considered(key[0], deployment_id, key[1])
        entry = self._entries[key] = _Entry(deployment_id, Schedule(cron.schedule, cron.timezone), considered)
        return entry

    def _carry_out(self, runner: Runner, run: CronRun, spec: InstanceSpec | None) -> None:
        job = Job(runner.drivers, run.id, spec)
        runner.jobs.add(job)
        self._running[run.app_id, run.process] = run.id
        self._tasks.start(self._await(runner, run, job), f"cron run of {runner.app}")

    async def _await(self, runner: Runner, run: CronRun, job: Job) -> None:
        try:
            end = await job.run()
            _log.info("a cron run ended", app=runner.app, process=run.process, how=str(end))
            while True:
                try:
                    await self._records.end(runner.drivers.lease, run, end)
                    break
                except ServiceUnavailable as error:
                    _log.warning("a cron run waits for the database", app=runner.app, error=error.message)
                    await asyncio.sleep(_DATABASE_PAUSE_SECS)
            runner.jobs.discard(job)
            try:
                await runner.drivers.runtime.remove(run.id)
                await prune_ended(runner.drivers, run.app_id, runner.app, run.process)
            except (AetherError, OSError) as error:
                # the next start's reconciliation takes it away
                _log.warning("an ended instance could not be cleared away", instance=run.id, error=str(error))
        except LeaseLost:
            return  # whoever runs the app now records it
        finally:
            if self._running.get((run.app_id, run.process)) == run.id:
                del self._running[run.app_id, run.process]
            self._wake.set()


def _timed(cron: Cron, spec: InstanceSpec) -> InstanceSpec:
    return replace(spec, timeout_secs=cron.timeout_secs)


def _says(schedule: Schedule, cron: Cron) -> bool:
    return (schedule.expression, schedule.timezone) == (cron.schedule, cron.timezone)
