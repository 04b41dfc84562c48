"""Functions on this machine: gateway, scaler and worker around one runtime, and what the API asks of them.

Each of the three knows the others only through the key-value store, the queue and the edge's routes, so that they
may as well be processes of their own. Here they share a process, a board and the load.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

import structlog

from aether.coordination.kept import kept_lease
from aether.functions.board import FUNCTIONS, GATEWAYS, WORKERS, Board, Entry
from aether.functions.gateway import Gateway, Reach, Waiting
from aether.functions.ledger import InvocationLedger
from aether.functions.ports import FunctionRouter, FunctionRuntime, FunctionSource, InvocationSink
from aether.functions.scaler import Scaler
from aether.functions.scaling import Rules
from aether.functions.versions import Versions
from aether.functions.worker import Worker, WorkerOptions
from aether.model.errors import AetherError, NotFound
from aether.model.function_instance import FunctionLogRecord, FunctionState, InstanceState
from aether.model.kv import KV
from aether.model.queue import Queue

_LEASE_SECS = 10
_AGAIN_SECS = 1.0
_ENDED_LOGS = 20
"""Instances that have ended and whose logs are still shown."""
_TRIM_EVERY_SECS = 600.0
_CODE_UNUSED_SECS = 86_400.0
"""What was made of code is made again from its archive, which the catalogue keeps."""
_LOGS_KEPT = 500
"""Of ended instances, of all functions."""
_log = structlog.stdlib.get_logger("aether.functions")


@dataclass(frozen=True, slots=True)
class FunctionOptions:
    name: str = "local"
    """Of this machine's gateway and worker; stays the same over restarts."""
    waiting: Waiting = field(default_factory=Waiting)
    rules: Rules = field(default_factory=Rules)
    worker: WorkerOptions = field(default_factory=lambda: WorkerOptions("local"))


class FunctionEngine:
    """Implements `FunctionControl`. The caller owns the runtime, the stores and the router, and closes them after."""

    def __init__(
        self, kv: KV, queue: Queue, source: FunctionSource, sink: InvocationSink, runtime: FunctionRuntime,
        router: FunctionRouter, options: FunctionOptions = FunctionOptions(),
    ) -> None:  # fmt: skip
        self._kv = kv
        self._queue = queue
        self._runtime = runtime
        self._router = router
        self._options = options
        self.board = Board(kv)
        self.versions = Versions(source)
        self.ledger = InvocationLedger(sink)
        worker = replace(options.worker, name=options.name)
        self.worker = Worker(worker, kv, queue, self.board, self.versions, source, runtime)
        self.scaler = Scaler(kv, queue, self.board, self.versions, router, options.rules)
        self.gateway = Gateway(options.name, kv, self.board, self.versions, router, self._reach(), options.waiting)
        self.gateway.on_suspect = lambda _function, instance: self.worker.suspect(instance)
        self.gateway.on_hung = lambda _function, instance: self.worker.hung(instance)
        self.worker.on_cleared = self.gateway.cleared
        router.on_invocation = self.ledger.add
        self._ended: dict[str, list[str]] = {}

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Run functions inside the context; every instance is ended at its end. Raises ServiceUnavailable."""
        await self._take_over()
        await self.versions.look()
        tasks = [
            asyncio.create_task(work, name=name)
            for name, work in (
                ("function board", self.board.run()),
                ("function versions", self.versions.run()),
                ("function gateway", self._gateway()),
                ("function worker", self._work()),
                ("function preparations", self.worker.prepare()),
                ("function invocations", self.ledger.run()),
                ("function logs", self._remember()),
                ("function leftovers", self._trim()),
            )
        ]
        for task in tasks:
            task.add_done_callback(_tell)
        try:
            async with asyncio.timeout(_LEASE_SECS):
                await self.gateway.routed.wait()
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.ledger.flush()

    # --- FunctionControl

    def changed(self) -> None:
        self.versions.changed()

    async def warm(self, function_id: str) -> None:
        await self.versions.look()
        if function_id not in self.versions.current:
            raise NotFound("the function has no code yet, or is gone")
        self.scaler.warm(function_id)

    async def state(self, function_id: str) -> FunctionState:
        load = self._router.load(function_id)
        failure = self.board.failures.get(function_id)
        failures, retry_at = self.scaler.retry_at(function_id)
        instances = tuple(
            InstanceState(
                id=record.id,
                version=record.version,
                stage=record.stage.value,
                in_flight=load.in_flight.get(record.id, 0),
                since=record.asked_at,
                ready_ms=record.ready_ms,
                worker=record.worker,
            )
            for record in (entry.record for entry in self.board.of(function_id).values())
        )
        return FunctionState(instances, load.waiting, failures, retry_at, None if failure is None else failure.last)

    async def gone(self, function_id: str) -> None:
        await self.versions.look()
        self.scaler.changed()
        with self.board.subscribe() as changed:
            while self.board.of(function_id):
                await changed.wait()
                changed.clear()
        await self.worker.ended(function_id)
        self._ended.pop(function_id, None)
        await self._kv.delete_prefix(f"{FUNCTIONS}{function_id}/")

    async def log(self, function_id: str, tail: int = 100) -> Sequence[FunctionLogRecord]:
        names = list(dict.fromkeys([*self._ended.get(function_id, ()), *self.board.of(function_id)]))
        found = [FunctionLogRecord(name, record) for name in names for record in await self._runtime.log(name, tail)]
        return sorted(found, key=lambda each: each.record.time_ns)[-tail:]

    def waiting(self) -> int:
        """Calls that wait for an instance, of all functions."""
        return sum(self._router.load(function_id).waiting for function_id in self.versions.current)

    # --- inside

    def _reach(self) -> Reach:
        def reach(entry: Entry):
            if entry.record.worker != self._options.name:
                return None
            name = entry.record.id
            return lambda: self._connect(name)

        return reach

    async def _connect(self, instance_id: str):
        try:
            return await self._runtime.connect(instance_id)
        except NotFound as error:
            raise ConnectionRefusedError(error.message) from error

    async def _take_over(self) -> None:
        """End what an earlier process of this name has left: its records and what runs of it."""
        left = await self._runtime.sweep()
        if left:
            _log.warning("instances of an earlier server were ended", instances=list(left))
        for key in (WORKERS + self._options.name, GATEWAYS + self._options.name):
            kv = await self._kv.get(key)
            if kv is not None and kv.lease:
                with suppress(NotFound):
                    await self._kv.revoke(kv.lease)

    async def _gateway(self) -> None:
        async def both() -> None:
            async with kept_lease(self._kv, _LEASE_SECS) as lease, asyncio.TaskGroup() as group:
                group.create_task(self.gateway.run(lease))
                group.create_task(self.scaler.run(lease))
                group.create_task(_when_lost(lease.lost))

        await self._again("a gateway", both)

    async def _work(self) -> None:
        async def work() -> None:
            async with kept_lease(self._kv, _LEASE_SECS) as lease:
                await self.worker.run(lease)

        await self._again("a worker", work)

    async def _again(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Begin anew with another lease whenever one was lost or the store was away."""
        while True:
            try:
                await work()
            except* (AetherError, TimeoutError) as group:
                _log.warning(f"{what} begins anew", errors=[str(error) for error in group.exceptions])
            await asyncio.sleep(_AGAIN_SECS)

    async def _trim(self) -> None:
        """Now and then, for ever: what is left of code and instances that are long gone."""
        while True:
            await asyncio.sleep(_TRIM_EVERY_SECS)
            try:
                await self._runtime.trim(_CODE_UNUSED_SECS, _LOGS_KEPT)
            except OSError as error:
                _log.warning("leftovers of functions could not be removed", error=str(error))

    async def _remember(self) -> None:
        """Keep the names of instances that have ended, for their logs."""
        there: dict[str, str] = {}
        with self.board.subscribe() as changed:
            while True:
                changed.clear()
                now = {name: function for function, each in self.board.instances.items() for name in each}
                for name, function_id in there.items():
                    if name not in now:
                        ended = self._ended.setdefault(function_id, [])
                        ended.append(name)
                        del ended[:-_ENDED_LOGS]
                there = now
                await changed.wait()


async def _when_lost(lost: asyncio.Event) -> None:
    await lost.wait()
    raise TimeoutError("its lease is lost")


def _tell(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("a part of functions has ended", part=task.get_name(), exc_info=error)
