"""One instance in the hands of its worker, from its claim until nothing of it is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from aether.functions.board import Entry, Failure, Stage, failure_key
from aether.functions.instance_state import Effect, Seen, advance, begun
from aether.functions.instance_state import Stage as LifeStage
from aether.model.errors import AetherError, NotFound
from aether.model.function_instance import FailedStart, StartKind
from aether.model.instance import InstanceExit
from aether.model.kv import Compare, Delete, Field, Get, Is, Put, created_at

if TYPE_CHECKING:
    from aether.functions.worker import Worker

_LOG_LINES = 40
_LOG_CHARS = 8000
_LOOK_SECS = 1.0
"""Time limits of a life are looked at so often; everything else is told."""
_TRIES = 3
_TRY_SECS = 2.0
_AGAIN_SECS = 0.3
_T = TypeVar("_T")
_log = structlog.stdlib.get_logger("aether.functions")


class Keeping:
    """`entry` is the record as this worker has claimed it."""

    def __init__(self, worker: Worker, entry: Entry) -> None:
        self._worker = worker
        self._record = entry.record
        self._lease = entry.kv.lease
        self._created = entry.kv.create_revision
        self._known_at = entry.kv.mod_revision
        """The board knows of this instance from this revision on."""
        self._withdrawn_at = 0
        self._start: asyncio.Task[float] | None = None
        self._wait: asyncio.Task[InstanceExit] | None = None
        self._stop: asyncio.Task[InstanceExit] | None = None
        self._check: asyncio.Task[bool] | None = None
        self._gone = False
        self._ending = ""
        self._served_since: float | None = None
        self._deaf = False
        self._wake = asyncio.Event()

    def suspect(self) -> None:
        if self._check is None and self._served_since is not None:
            self._check = self._own(self._listens(), "listens")

    def hung(self) -> None:
        self._deaf = True
        self._wake.set()

    async def run(self) -> None:
        """Until it is gone. Cancelled, it ends the instance at once and leaves the record to the lease."""
        record, life = self._record, begun(time.monotonic())
        self._start = self._own(self._worker.start(record), "start")
        try:
            with self._worker.board.subscribe() as changed:
                while life.stage is not LifeStage.GONE:
                    changed.clear()
                    self._wake.clear()
                    gateways = self._worker.gateways.changed
                    self._look()
                    life, effects = advance(life, self._seen(), time.monotonic(), self._worker.options.limits)
                    for effect in effects:
                        await self._surely(effect, life.reason)
                    if not effects:
                        await self._pause(changed, gateways)
        except BaseException:
            await self._end()
            raise

    def _own(self, work: Coroutine[Any, Any, _T], name: str) -> asyncio.Task[_T]:
        task = asyncio.create_task(work, name=f"{name} {self._record.id}")
        task.add_done_callback(lambda _: self._wake.set())
        return task

    def _look(self) -> None:
        """Take up what the own tasks have found out."""
        if self._start is not None and self._start.done():
            task, self._start = self._start, None
            if task.cancelled():
                self._gone = True
            elif (error := task.exception()) is not None:
                self._gone = True
                self._ending = self._why(error)
            else:
                self._record = replace(self._record, ready_ms=task.result())
                self._served_since = time.monotonic()
                self._wait = self._own(self._worker.runtime.wait(self._record.id), "wait for")
        if self._wait is not None and self._wait.done():
            task, self._wait = self._wait, None
            self._gone = True
            if not task.cancelled():
                self._ending = self._why(task.exception()) if task.exception() is not None else f"it {task.result()}"
        if self._stop is not None and self._stop.done():
            self._stop = None
            self._gone = True
        if self._check is not None and self._check.done():
            task, self._check = self._check, None
            self._deaf = self._deaf or task.cancelled() or task.exception() is not None or not task.result()

    def _why(self, error: BaseException | None) -> str:
        if isinstance(error, AetherError):
            return error.message
        _log.error("an instance failed unexpectedly", instance=self._record.id, exc_info=error)
        return f"{type(error).__name__}: {error}"

    def _seen(self) -> Seen:
        board, gateways = self._worker.board, self._worker.gateways
        entry = board.entry(self._record.function_id, self._record.id)
        lost = entry is None and board.revision >= self._known_at
        draining = entry is not None and entry.record.stage is Stage.DRAINING
        if draining and entry is not None and not self._withdrawn_at:
            self._withdrawn_at = entry.kv.mod_revision
        return Seen(
            wanted=not (lost or draining),
            alive=not self._gone,
            ready=self._served_since is not None and not self._deaf,
            in_flight=gateways.in_flight(self._record.id, self._withdrawn_at) if self._withdrawn_at else 0,
            unaware=gateways.unaware(self._withdrawn_at),
            ending=self._ending,
        )

    async def _surely(self, effect: Effect, reason: str) -> None:
        """Each effect bears being repeated, and none may be left out."""
        while True:
            try:
                await self._carry_out(effect, reason)
                return
            except (AetherError, TimeoutError) as error:
                _log.warning("an instance waits for the store", instance=self._record.id, error=str(error))
                await asyncio.sleep(_AGAIN_SECS)

    async def _carry_out(self, effect: Effect, reason: str) -> None:
        match effect:
            case Effect.REGISTER:
                await self._write(Stage.SERVING)
            case Effect.DRAIN:
                await self._write(Stage.DRAINING)
            case Effect.UNREGISTER:
                await self._unregister()
            case Effect.STOP:
                self._begin_stop(self._worker.options.limits.stop_secs)
            case Effect.KILL:
                self._begin_stop(0.0)
            case Effect.FORGET:
                await self._forget(reason)

    async def _write(self, stage: Stage) -> None:
        """Record a stage, unless the scaler has withdrawn the instance: that is on the board, or will be."""
        record = self._record
        while True:
            entry = self._worker.board.entry(record.function_id, record.id)
            if entry is not None and entry.record.stage is Stage.DRAINING:
                self._withdrawn_at = self._withdrawn_at or entry.kv.mod_revision
                return
            if stage is Stage.SERVING:
                status = await self._worker.runtime.status(record.id)
                record = replace(record, start=getattr(status, "start", StartKind.COLD))
            self._record = record = record.at(stage)
            key = record.key
            seen = self._known_at if entry is None else max(self._known_at, entry.kv.mod_revision)
            done = await self._worker.kv.transact(
                [Compare(key, Field.MOD, Is.EQUAL, seen)], [Put(key, record.encode(), self._lease)], [Get(key)]
            )
            if done.succeeded:
                self._known_at = done.revision
                if stage is Stage.DRAINING:
                    self._withdrawn_at = done.revision
                await self._worker.board.reached(done.revision)
                return
            if not done.results[0]:
                return  # deleted: the board says so soon
            await self._worker.board.reached(done.results[0][0].mod_revision)

    async def _unregister(self) -> None:
        key = self._record.key
        done = await self._worker.kv.transact([created_at(key, self._created)], [Delete(key)])
        if done.succeeded:
            self._withdrawn_at = self._known_at = done.revision
            await self._worker.board.reached(done.revision)

    def _begin_stop(self, grace_secs: float) -> None:
        if self._start is not None:
            self._start.cancel()
        elif not self._gone:
            self._stop = self._own(self._worker.runtime.stop(self._record.id, grace_secs), "stop")

    async def _forget(self, reason: str) -> None:
        """Nothing is left of it but its log and, where it failed, why."""
        for task in (self._wait, self._check):
            if task is not None:
                task.cancel()
        with suppress(NotFound):
            await self._worker.runtime.stop(self._record.id, 0.0)
        operations: list[Put | Delete] = [Delete(self._record.key)]
        if reason:
            operations.append(Put(failure_key(self._record.function_id), (await self._failure(reason)).encode()))
            _log.warning(
                "an instance failed", function=self._record.function_id, instance=self._record.id, reason=reason
            )
        await self._worker.kv.transact([], operations)

    async def _failure(self, reason: str) -> Failure:
        log = [record.text for record in await self._worker.runtime.log(self._record.id, _LOG_LINES)]
        while sum(map(len, log)) > _LOG_CHARS and len(log) > 1:
            del log[0]
        before = self._worker.board.failures.get(self._record.function_id)
        served = 0.0 if self._served_since is None else time.monotonic() - self._served_since
        last = FailedStart(self._record.version, time.time(), reason, tuple(log))
        return Failure((0 if before is None else before.count) + 1, served, last)

    async def _listens(self) -> bool:
        """Whether the instance takes a connection after all."""
        for _ in range(_TRIES):
            try:
                async with asyncio.timeout(_TRY_SECS):
                    (await self._worker.runtime.connect(self._record.id)).close()
            except (OSError, TimeoutError):
                await asyncio.sleep(_AGAIN_SECS)
            except NotFound:
                return False
            else:
                self._worker.on_cleared(self._record.id)
                return True
        return False

    async def _pause(self, changed: asyncio.Event, gateways: asyncio.Event) -> None:
        tasks = [asyncio.create_task(event.wait()) for event in (changed, gateways, self._wake)]
        try:
            await asyncio.wait(tasks, timeout=_LOOK_SECS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _end(self) -> None:
        """At once and whole."""
        own: tuple[asyncio.Task[Any] | None, ...] = (self._start, self._wait, self._check, self._stop)
        tasks: list[asyncio.Task[Any]] = [task for task in own if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(NotFound):
            await self._worker.runtime.stop(self._record.id, 0.0)
