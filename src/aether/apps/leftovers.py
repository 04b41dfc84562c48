"""Files of what is gone: logs of instances that no row tells of, and unpacked releases of apps that are no more.

Both are listed before the rows are read, so that what begins meanwhile is not among them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

import sqlalchemy as sa

from aether.apps.ledger import app_files
from aether.apps.ports import ArtifactSource, Runtime
from aether.leases import hold
from aether.model.database import DatabasePort
from aether.model.instance import KeptLog
from aether.retention import Swept
from aether.stores.database.tables import applications, cron_runs, instances, runs


def unclaimed(kept: Sequence[KeptLog], known: Collection[str], before: float) -> list[KeptLog]:
    """The logs that nothing known has written and that nobody has written to since `before`."""
    return [log for log in kept if log.instance_id not in known and log.changed_at < before]


class LogSweeper:
    """The chore `logs`. `clock` returns seconds since the epoch; what is younger than `grace_secs` stays."""

    name = "logs"

    def __init__(
        self, database: DatabasePort, runtime: Runtime, grace_secs: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._runtime = runtime
        self._grace = grace_secs
        self._clock = clock

    async def sweep(self, *, dry_run: bool) -> Swept:
        kept = await self._runtime.kept_logs()
        # an app comes back without a row while the database is away: its instance is known to the runtime
        known = set(await self._runtime.known())
        async with self._database.read() as tx:
            for table in (instances, runs, cron_runs):
                known.update((await tx.execute(sa.select(table.c.id))).scalars())
        gone = unclaimed(kept, known, self._clock() - self._grace)
        if not dry_run:
            for log in gone:
                await self._runtime.drop_logs(log.instance_id, log.app)
        return Swept(len(gone), sum(log.bytes for log in gone))


class StrandedSweeper:
    """The chore `stranded`: unpacked releases of apps that no row tells of."""

    name = "stranded"

    def __init__(self, database: DatabasePort, source: ArtifactSource) -> None:
        self._database = database
        self._source = source

    async def sweep(self, *, dry_run: bool) -> Swept:
        found = await self._source.apps()
        async with self._database.read() as tx:
            known = set((await tx.execute(sa.select(applications.c.name))).scalars())
        gone = 0
        for app in found:
            if app not in known and (dry_run or await self._discard(app)):
                gone += 1
        return Swept(gone)

    async def _discard(self, app: str) -> bool:
        """No app of that name is made and unpacked while its folder is put aside."""
        async with self._database.write() as tx:
            await hold(tx, app_files(app))
            if await tx.scalar(sa.select(applications.c.id).where(applications.c.name == app)) is not None:
                return False
            aside = await self._source.put_aside(app)
        await self._source.destroy(aside)
        return True
