"""What an app's instances wrote, as one stream in the order of time: the past, then the present as it comes.

A follower stays with the app, not with an instance: instances of later rollouts and restarts join by themselves,
woken by the broadcast. It is read as fast as its reader takes it and no faster: what waits stays on disk, and where
rotation overtook the reader, a record says how much is missing. Values of the app's secrets are masked on the way.
Where the lines are kept is the runtime's.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, Mapping

import sqlalchemy as sa
import structlog

from aether.apps.broadcast import Broadcast
from aether.apps.ledger import LIVE_INSTANCES
from aether.apps.log_merge import LogLine, Source, Tap, due, fill
from aether.apps.masking import Masker
from aether.apps.ports import Runtime
from aether.apps.records import find_app
from aether.apps.vault import Vault
from aether.model.database import DatabasePort
from aether.model.errors import AetherError
from aether.stores.database.tables import applications, configs, deployments, instances, runs

HEARTBEAT_SECS = 15.0
_UNSTARTED_SECS = 0.2
"""How soon to look again for an instance that is recorded and not started yet."""
RUN = "run"
"""What lines of one-off runs have as their process type."""
_log = structlog.stdlib.get_logger("aether.logs")


class Logs:
    def __init__(
        self,
        database: DatabasePort,
        broadcast: Broadcast,
        runtime: Runtime,
        vault: Vault,
        heartbeat_secs: float = HEARTBEAT_SECS,
    ) -> None:
        self._database = database
        self._broadcast = broadcast
        self._runtime = runtime
        self._vault = vault
        self._heartbeat_secs = heartbeat_secs

    async def read(
        self,
        app_name: str,
        *,
        tail: int | None = 100,
        since_ns: int = 0,
        after: Mapping[str, int] | None = None,
        follow: bool = False,
        process: str | None = None,
    ) -> AsyncGenerator[list[LogLine]]:
        """Lines since `since_ns` (nanoseconds since the epoch), the newest `tail` of them; of an instance named in
        `after`, those behind that record, whatever the time. With `follow` goes on until it is closed or the app is
        deleted, yielding an empty list at every heartbeat of silence. `process` is the one process type to read,
        None means all. Raises NotFound."""
        async with self._database.read() as tx:
            app_id = (await find_app(tx, app_name)).id
        with self._broadcast.subscribe(app_id) as changed:
            sources = await self._sources(app_id, process)
            masker = await self._masker(app_id)
            if tail:
                since_ns = await self._cut(app_name, sources, since_ns, tail)
            stream = _Stream(self._runtime, app_name, since_ns, tail, after or {}, follow)
            try:
                await stream.add(sources)
                while batch := await stream.next():
                    yield _masked(batch, masker)
                if not follow:
                    return
                waiting = asyncio.create_task(changed.wait())
                try:
                    while True:
                        grown = asyncio.create_task(stream.grew.wait())
                        pause = _UNSTARTED_SECS if stream.unstarted else self._heartbeat_secs
                        done, _ = await asyncio.wait(
                            (grown, waiting), timeout=pause, return_when=asyncio.FIRST_COMPLETED
                        )
                        grown.cancel()
                        stream.grew.clear()
                        if waiting in done:
                            changed.clear()
                            waiting = asyncio.create_task(changed.wait())
                            sources = await self._sources(app_id, process)
                            masker = await self._masker(app_id)
                            if not await self._exists(app_id):
                                return
                            await stream.add(sources, new=True)
                        elif stream.unstarted:
                            await stream.add({}, new=True)
                        while batch := await stream.next():
                            yield _masked(batch, masker)
                        if not done:
                            yield []
                finally:
                    waiting.cancel()
            finally:
                stream.close()

    async def release_began_us(self, app_name: str) -> int:
        """When the app's active release, or else its newest deployment, began; 0 without any. Raises NotFound."""
        async with self._database.read() as tx:
            app = await find_app(tx, app_name)
            began = sa.func.coalesce(deployments.c.rollout_started_at, deployments.c.created_at)
            active = sa.select(applications.c.active_deployment_id).where(applications.c.id == app.id)
            found = await tx.execute(
                sa.select(began)
                .where(deployments.c.app_id == app.id)
                .order_by((deployments.c.id == active.scalar_subquery()).desc(), deployments.c.created_at.desc())
                .limit(1)
            )
            return int(found.scalar() or 0)

    async def _cut(self, app: str, sources: Mapping[str, Source], since_ns: int, tail: int) -> int:
        """From which moment on there are `tail` lines."""
        stream = _Stream(self._runtime, app, since_ns, tail, {}, follow=False)
        times = array("q")
        try:
            await stream.add(sources)
            while batch := await stream.next():
                times.extend([line.record.time_ns for line in batch])
        finally:
            stream.close()
        return since_ns if len(times) < tail else times[-tail]

    async def _sources(self, app_id: str, process: str | None) -> dict[str, Source]:
        query = (
            sa.select(
                instances.c.id, deployments.c.id, deployments.c.digest, deployments.c.release,
                instances.c.status.in_(LIVE_INSTANCES), instances.c.process,
            )
            .join(deployments, deployments.c.id == instances.c.deployment_id)
            .where(instances.c.app_id == app_id)
            .order_by(instances.c.created_at, instances.c.id)
        )  # fmt: skip
        if process is not None:
            query = query.where(instances.c.process == process)
        one_off = (
            sa.select(
                runs.c.id, deployments.c.id, deployments.c.digest, deployments.c.release,
                runs.c.ended_at.is_(None), sa.literal(RUN),
            )
            .join(deployments, deployments.c.id == runs.c.deployment_id)
            .where(runs.c.app_id == app_id, sa.literal(process in (None, RUN)))
            .order_by(runs.c.created_at, runs.c.id)
        )  # fmt: skip
        async with self._database.read() as tx:
            found = [*await tx.execute(query), *await tx.execute(one_off)]
            return {row[0]: Source(*row) for row in found}

    async def _masker(self, app_id: str) -> Masker:
        """Knows the secrets of every release whose instances may have written something. Raises
        ServiceUnavailable when they cannot be opened: then nothing is shown."""
        async with self._database.read() as tx:
            found = await tx.execute(
                sa.select(configs.c.version, configs.c.env).where(
                    configs.c.app_id == app_id,
                    sa.exists().where(
                        deployments.c.app_id == app_id,
                        deployments.c.config_version == configs.c.version,
                        instances.c.deployment_id == deployments.c.id,
                    ),
                )
            )
            opened = [self._vault.open_config(app_id, row.version, row.env) for row in found]
        return Masker(value for variables in opened for value in variables.hidden())

    async def _exists(self, app_id: str) -> bool:
        async with self._database.read() as tx:
            found = await tx.execute(
                sa.select(applications.c.id).where(applications.c.id == app_id, applications.c.deleting_at.is_(None))
            )
            return found.one_or_none() is not None


def _masked(lines: list[LogLine], masker: Masker) -> list[LogLine]:
    if not masker.knows_any:
        return lines
    return [LogLine(line.record._replace(text=masker.mask(line.record.text)), line.source) for line in lines]


class _Stream:
    """The taps of one reader."""

    def __init__(
        self,
        runtime: Runtime,
        app: str,
        since_ns: int,
        tail: int | None,
        after: Mapping[str, int],
        follow: bool,
    ) -> None:
        self.grew = asyncio.Event()
        """Set when some log may have more."""
        self._runtime = runtime
        self._app = app
        self._since_ns = since_ns
        self._tail = tail
        self._after = after
        self._follow = follow
        self._taps: dict[str, Tap] = {}
        self._done: set[str] = set()

    @property
    def unstarted(self) -> bool:
        """Whether an instance is recorded whose log cannot be watched yet."""
        return self._follow and any(tap.log is None for tap in self._taps.values())

    async def add(self, sources: Mapping[str, Source], *, new: bool = False) -> None:
        """Open the logs that are not open yet; of `new` instances everything is wanted."""
        if sources:
            self._done &= sources.keys()
        for instance_id, source in sources.items():
            tap = self._taps.get(instance_id)
            if tap is not None:
                tap.source = source
            elif instance_id not in self._done:
                self._taps[instance_id] = Tap(source)
        for tap in [tap for tap in self._taps.values() if tap.log is None]:
            await self._open(tap, new)

    async def next(self) -> list[LogLine]:
        """The next lines; empty when there are none for now."""
        while True:
            wanting = [tap for tap in self._taps.values() if tap.more and not tap.lines and tap.log is not None]
            if wanting:
                await asyncio.to_thread(self._fill, wanting)
            batch = due(list(self._taps.values()))
            for tap in [tap for tap in self._taps.values() if tap.over and not tap.lines]:
                self._leave(tap)
            if batch or not any(tap.more and tap.log is not None for tap in self._taps.values()):
                return batch

    def close(self) -> None:
        for tap in self._taps.values():
            if tap.log is not None:
                tap.log.close()

    async def _open(self, tap: Tap, new: bool) -> None:
        source = tap.source
        instance_id = source.instance_id

        def grew() -> None:
            tap.more = True
            self.grew.set()

        after = self._after.get(instance_id)
        wanted_all = new or after is not None
        try:
            log = await self._runtime.open_log(
                instance_id,
                self._app,
                since_ns=0 if wanted_all else self._since_ns,
                tail=None if wanted_all else self._tail,
                after=after,
                grew=grew if self._follow else None,
            )
        except (AetherError, OSError) as error:
            _log.warning("a log cannot be read", instance=instance_id, error=str(error))
            self._leave(tap)
            return
        if self._follow and source.live and log.ended:
            log.close()  # recorded, and not started yet
            return
        tap.log = log

    def _fill(self, taps: list[Tap]) -> None:
        for tap in taps:
            try:
                fill((tap,))
            except OSError as error:
                _log.warning("a log cannot be read", instance=tap.source.instance_id, error=str(error))
                tap.over = True

    def _leave(self, tap: Tap) -> None:
        if tap.log is not None:
            tap.log.close()
        self._taps.pop(tap.source.instance_id, None)
        self._done.add(tap.source.instance_id)
