"""What an app's instances wrote, as one stream: the past merged by time, the present as it comes.

A follower stays with the app, not with an instance: instances of later rollouts and restarts join by themselves,
woken by the broadcast. Where the lines are kept is the runtime's.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import structlog

from aether.apps.broadcast import Broadcast
from aether.apps.ports import Runtime
from aether.apps.records import find_app
from aether.model.database import DatabasePort
from aether.model.errors import AetherError
from aether.model.instance import LogRecord
from aether.stores.database.tables import applications, deployments, instances

KEEP_ALIVE_SECS = 15.0
_QUEUE_LINES = 1000
_log = structlog.stdlib.get_logger("aether.logs")


@dataclass(frozen=True, slots=True)
class Source:
    """An instance whose log is read."""

    instance_id: str
    deployment_id: str
    digest: str
    release: int | None


@dataclass(frozen=True, slots=True)
class LogLine:
    record: LogRecord
    app: str
    source: Source


@dataclass(slots=True)
class _Position:
    """How far a log was read: the newest time, and how many records carried it."""

    time_ns: int
    at_that_time: int


def position_after(records: Iterable[LogRecord], since_ns: int) -> _Position:
    position = _Position(since_ns, 0)
    for record in records:
        if record.time_ns == position.time_ns:
            position.at_that_time += 1
        else:
            position = _Position(record.time_ns, 1)
    return position


def merge_tail(logs: Sequence[Sequence[LogLine]], tail: int | None) -> list[LogLine]:
    """All lines in the order of their times (each log is in order already), the newest `tail` of them."""
    merged = heapq.merge(*logs, key=lambda line: line.record.time_ns)
    return list(merged if tail is None else deque(merged, maxlen=tail))


class Logs:
    def __init__(self, database: DatabasePort, broadcast: Broadcast, runtime: Runtime) -> None:
        self._database = database
        self._broadcast = broadcast
        self._runtime = runtime

    async def read(
        self, app_name: str, *, tail: int | None = 100, since_ns: int = 0, follow: bool = False
    ) -> AsyncGenerator[LogLine | None]:
        """Lines since `since_ns` (nanoseconds since the epoch), the newest `tail` of them; with `follow` goes on
        until it is closed or the app is deleted, yielding None every 15 s of silence. Raises NotFound."""
        async with self._database.read() as tx:
            app_id = (await find_app(tx, app_name)).id
        with self._broadcast.subscribe(app_id) as changed:
            sources = await self._sources(app_id)
            logs: list[list[LogLine]] = []
            positions: dict[str, _Position] = {}
            wanted = 1 if tail == 0 else tail  # one line is needed to know where to go on
            for source in sources.values():
                records = await self._past(source, app_name, since_ns, wanted)
                positions[source.instance_id] = position_after(records, since_ns)
                logs.append([LogLine(record, app_name, source) for record in records])
            for line in merge_tail(logs, tail):
                yield line
            if follow:
                async with contextlib.aclosing(self._follow(app_id, app_name, sources, positions, changed)) as lines:
                    async for line in lines:
                        yield line

    async def _past(self, source: Source, app: str, since_ns: int, tail: int | None) -> list[LogRecord]:
        found: list[LogRecord] = []
        try:
            async with contextlib.aclosing(
                self._runtime.logs(source.instance_id, app, since_ns=since_ns, tail=tail)
            ) as records:
                async for record in records:
                    found.append(record)
        except (AetherError, OSError) as error:
            _log.warning("a log cannot be read", instance=source.instance_id, error=str(error))
        return found

    async def _follow(
        self,
        app_id: str,
        app: str,
        sources: dict[str, Source],
        positions: dict[str, _Position],
        changed: asyncio.Event,
    ) -> AsyncGenerator[LogLine | None]:
        queue: asyncio.Queue[tuple[str, LogRecord]] = asyncio.Queue(_QUEUE_LINES)
        pumps: dict[str, asyncio.Task[None]] = {}

        def start(instance_id: str) -> None:
            position = positions.get(instance_id, _Position(0, 0))
            pumps[instance_id] = asyncio.create_task(self._pump(instance_id, app, position, queue))

        for instance_id in sources:
            start(instance_id)
        waiting = asyncio.create_task(changed.wait())
        getting = asyncio.create_task(queue.get())
        try:
            while True:
                done, _ = await asyncio.wait(
                    (getting, waiting), timeout=KEEP_ALIVE_SECS, return_when=asyncio.FIRST_COMPLETED
                )
                if waiting in done:
                    changed.clear()
                    waiting = asyncio.create_task(changed.wait())
                    sources = await self._sources(app_id)
                    if not await self._exists(app_id):
                        return
                    for instance_id in sources:
                        if instance_id not in pumps:
                            start(instance_id)
                    for instance_id in [i for i, pump in pumps.items() if pump.done() and i not in sources]:
                        del pumps[instance_id]
                if getting in done:
                    instance_id, record = getting.result()
                    getting = asyncio.create_task(queue.get())
                    if (source := sources.get(instance_id)) is not None:
                        yield LogLine(record, app, source)
                elif not done:
                    yield None
        finally:
            tasks: list[asyncio.Task[Any]] = [waiting, getting, *pumps.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(
        self, instance_id: str, app: str, position: _Position, queue: asyncio.Queue[tuple[str, LogRecord]]
    ) -> None:
        seen = position.at_that_time
        try:
            async with contextlib.aclosing(
                self._runtime.logs(instance_id, app, since_ns=position.time_ns, follow=True)
            ) as records:
                async for record in records:
                    if record.time_ns == position.time_ns and seen:
                        seen -= 1
                        continue
                    await queue.put((instance_id, record))
        except (AetherError, OSError) as error:
            _log.warning("a log cannot be followed", instance=instance_id, error=str(error))

    async def _sources(self, app_id: str) -> dict[str, Source]:
        async with self._database.read() as tx:
            found = await tx.execute(
                sa.select(instances.c.id, deployments.c.id, deployments.c.digest, deployments.c.release)
                .join(deployments, deployments.c.id == instances.c.deployment_id)
                .where(instances.c.app_id == app_id)
                .order_by(instances.c.created_at, instances.c.id)
            )
            return {row[0]: Source(*row) for row in found}

    async def _exists(self, app_id: str) -> bool:
        async with self._database.read() as tx:
            found = await tx.execute(
                sa.select(applications.c.id).where(applications.c.id == app_id, applications.c.deleting_at.is_(None))
            )
            return found.one_or_none() is not None
