"""A worker: takes jobs, starts instances, and sees each of them through its life.

An instance belongs to the worker whose lease its record has: a worker that has lost its lease ends all it runs,
because others may have started what takes their place. The steps of one instance are in `keeping`; which machine or
process it is, is the runtime's business.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from aether.coordination.kept import KeptLease
from aether.coordination.views import follow
from aether.functions.board import (
    GATEWAYS,
    WORKERS,
    Acknowledged,
    Board,
    Entry,
    InstanceRecord,
    Stage,
    decode_instance,
)
from aether.functions.instance_state import Limits
from aether.functions.keeping import Keeping
from aether.functions.ports import FunctionRuntime, FunctionSource
from aether.functions.scaler import PROVISION, decode_job
from aether.functions.versions import Versions
from aether.model.errors import AetherError, DeliveryLost, LeaseGone, ServiceUnavailable
from aether.model.function_instance import FunctionSpec
from aether.model.kv import KV, Delete, Put, unchanged
from aether.model.queue import Delivery, Queue

_TAKE_SECS = 2.0
"""How long a take waits before stale deliveries of others are looked for."""
_AGAIN_SECS = 0.5
_START_GRACE_SECS = 15.0
"""For a runtime to make what a start needs, and to give up a start by itself when its time is over."""
_log = structlog.stdlib.get_logger("aether.functions")


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """`parallel_starts` bounds the instances that start at the same time; others wait for their turn."""

    name: str
    parallel_starts: int = 4
    free_mb: Callable[[], int | None] = lambda: None
    """What an instance could still have of this machine's memory, in MB; None where nobody can tell."""
    ready_secs: float = 60.0
    """From an instance's turn to start until it must listen."""
    limits: Limits = field(default_factory=lambda: Limits(start_secs=math.inf))
    """Of what comes after; a start is not timed while it waits for its turn."""


class Gateways:
    """What the living gateways have acknowledged, followed."""

    def __init__(self, kv: KV) -> None:
        self._kv = kv
        self.acknowledged: Mapping[str, Acknowledged] = {}
        self.changed = asyncio.Event()

    async def run(self) -> None:
        views = follow(self._kv, GATEWAYS)
        try:
            async for view in views:
                self.acknowledged = {key: Acknowledged.decode(kv.value) for key, kv in view.items.items()}
                self.changed.set()
                self.changed = asyncio.Event()
        finally:
            await views.aclose()

    def unaware(self, revision: int) -> int:
        return sum(each.revision < revision for each in self.acknowledged.values())

    def in_flight(self, instance_id: str, revision: int) -> int:
        """Requests of an instance withdrawn at `revision`; a gateway that does not know yet may be sending one."""
        return sum(
            1 if each.revision < revision else each.busy.get(instance_id, 0) for each in self.acknowledged.values()
        )


class Worker:
    def __init__(
        self, options: WorkerOptions, kv: KV, queue: Queue, board: Board, versions: Versions,
        source: FunctionSource, runtime: FunctionRuntime,
    ) -> None:  # fmt: skip
        self.options = options
        self.kv = kv
        self.board = board
        self.runtime = runtime
        self.gateways = Gateways(kv)
        self._queue = queue
        self._versions = versions
        self._source = source
        self._turns = asyncio.Semaphore(options.parallel_starts)
        self._keeping: dict[str, Keeping] = {}
        self._tasks: dict[asyncio.Task[None], str] = {}
        """Functions by the tasks that keep an instance."""
        self.on_cleared: Callable[[str], None] = lambda _instance: None
        """A suspect takes connections after all."""

    async def run(self, lease: KeptLease) -> None:
        """Until the lease is lost or it is cancelled; ends its instances then."""
        await self.board.opened()
        await self.kv.put(WORKERS + self.options.name, b"{}", lease=lease.id)
        # jobs that an earlier life of this worker took and did not do
        await self._queue.forfeit(PROVISION, self.options.name)
        gateways = asyncio.create_task(self.gateways.run(), name="gateways")
        taking = asyncio.create_task(self._take(lease), name="provision")
        lost = asyncio.create_task(lease.lost.wait(), name="worker lease")
        try:
            done, _ = await asyncio.wait((gateways, taking, lost), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            own: list[asyncio.Task[Any]] = [gateways, taking, lost, *self._tasks]
            for task in own:
                task.cancel()
            await asyncio.gather(*own, return_exceptions=True)

    def suspect(self, instance_id: str) -> None:
        """A gateway could not connect to an instance of this worker: look at it."""
        keeping = self._keeping.get(instance_id)
        if keeping is not None:
            keeping.suspect()

    def hung(self, instance_id: str) -> None:
        """An instance of this worker takes calls and answers none: replace it."""
        keeping = self._keeping.get(instance_id)
        if keeping is not None:
            keeping.hung()

    async def ended(self, function_id: str) -> None:
        """Return when nothing is left of the instances that it has of a function now."""
        tasks = [task for task, of in self._tasks.items() if of == function_id]
        if tasks:
            await asyncio.wait(tasks)

    async def _take(self, lease: KeptLease) -> None:
        while True:
            try:
                jobs = await self._queue.take(PROVISION, self.options.name, limit=10, wait_secs=_TAKE_SECS)
                jobs = jobs or await self._queue.claim_stale(PROVISION, self.options.name, limit=10)
                await self._do_all(jobs, lease)
            except (AetherError, TimeoutError) as error:
                _log.warning("jobs could not be done", error=str(error))
                if isinstance(error, LeaseGone):
                    lease.lost.set()  # before the next renewal would have found out
                await asyncio.sleep(_AGAIN_SECS)

    async def _do_all(self, jobs: Sequence[Delivery], lease: KeptLease) -> None:
        """Each of them; where one fails it and the rest are left to whoever is next, at once."""
        for number, job in enumerate(jobs):
            try:
                await self._do(job, lease)
            except (AetherError, TimeoutError):
                for left in jobs[number:]:
                    await self._queue.give_back(left)
                raise

    async def _do(self, job: Delivery, lease: KeptLease) -> None:
        """Claim the instances of a job; the job is done when their records say who has them."""
        function_id, names = decode_job(job.message.body)
        for name in names:
            entry = await self._claim(function_id, name, lease)
            if entry is not None:
                self._keep(entry)
        try:
            await self._queue.acknowledge(job)
        except (DeliveryLost, ServiceUnavailable) as error:
            # whoever has it now finds nothing left to claim
            _log.info("a job was not acknowledged", job=job.message.id, error=error.message)

    async def _claim(self, function_id: str, name: str, lease: KeptLease) -> Entry | None:
        """The record as this worker's own; None when there is nothing to start."""
        wanted = InstanceRecord(function_id, name, 0, Stage.ASKED, 0.0)
        kv = await self.kv.get(wanted.key)
        if kv is None:
            return None
        record = decode_instance(kv).record
        if record.stage is not Stage.ASKED:
            return None
        version = self._versions.current.get(function_id)
        if version is None or version.version < record.version:
            await self._versions.look()
            version = self._versions.current.get(function_id)
        if version is None or version.version != record.version:
            # the function has gone on: the scaler asks for what it wants now
            await self.kv.transact([unchanged(kv)], [Delete(wanted.key)])
            return None
        mine = replace(record, stage=Stage.STARTING, worker=self.options.name)
        done = await self.kv.transact([unchanged(kv)], [Put(mine.key, mine.encode(), lease.id)])
        if not done.succeeded:
            return None
        return Entry(mine, replace(kv, value=mine.encode(), mod_revision=done.revision, lease=lease.id))

    def _keep(self, entry: Entry) -> None:
        keeping = self._keeping[entry.record.id] = Keeping(self, entry)
        task = asyncio.create_task(keeping.run(), name=f"instance {entry.record.id}")
        self._tasks[task] = entry.record.function_id

        def done(task: asyncio.Task[None]) -> None:
            del self._tasks[task]
            self._keeping.pop(entry.record.id, None)
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.error("an instance was left", instance=entry.record.id, exc_info=error)

        task.add_done_callback(done)

    async def prepare(self) -> None:
        """For ever: make what starts of the newest versions would have to wait for, as soon as they are known."""
        ready: set[tuple[str, str]] = set()
        with self._versions.subscribe() as changed:
            while True:
                changed.clear()
                for version in list(self._versions.current.values()):
                    what = version.definition.runtime, version.code_digest
                    if what not in ready:
                        ready.add(what)
                        try:
                            await self.runtime.prepare(what[0], await self._source.fetch(version))
                        except AetherError as error:
                            # who calls it is told the same
                            _log.warning("a function cannot be prepared", function=version.definition.name,
                                         error=error.message)  # fmt: skip
                await changed.wait()

    async def start(self, record: InstanceRecord) -> float:
        """Start an instance in its turn and return when it is ready; gives the milliseconds that took.

        Raises what `FunctionRuntime.start` does."""
        version = self._versions.current.get(record.function_id)
        if version is None or version.version != record.version:
            raise ServiceUnavailable("the function has another version by now")
        code = await self._source.fetch(version)
        definition = version.definition
        spec = FunctionSpec(
            instance_id=record.id,
            function=definition.name,
            runtime=definition.runtime,
            code=code,
            entrypoint=definition.entrypoint,
            env=dict(definition.env_vars),
            port=definition.port,
            vcpus=definition.vcpu,
            memory_mb=definition.memory_mb,
            ready_secs=self.options.ready_secs,
            snapshot=definition.snapshot,
        )
        await self.runtime.prepare(definition.runtime, code)
        async with self._turns:
            free_mb = self.options.free_mb()
            if free_mb is not None and free_mb < spec.memory_mb:
                spare = f"this machine has {max(0, free_mb)} MB of memory to spare"
                raise ServiceUnavailable(f"{spare}, and an instance takes {spec.memory_mb}")
            began = time.monotonic()
            try:
                async with asyncio.timeout(spec.ready_secs + _START_GRACE_SECS):
                    await self.runtime.start(spec)
            except TimeoutError:
                raise ServiceUnavailable(f"it was not ready within {spec.ready_secs:g} s") from None
        return (time.monotonic() - began) * 1000
