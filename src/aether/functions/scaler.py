"""How many instances there are: measures, asks `scaling.decide`, and records what it wants.

What is wanted is in the store before anybody acts on it: an instance is a record first (`asked`), then a job for the
workers, and an instance that must go is a record that says so. A scaler that is killed leaves nothing half-done: its
records end with its lease.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from aether.coordination.kept import KeptLease
from aether.functions import scaling
from aether.functions.backoff import GOOD_RUN_SECS, Backoff
from aether.functions.board import Board, Entry, InstanceRecord, Stage
from aether.functions.load import Load
from aether.functions.ports import FunctionRouter, FunctionVersion, RouteLoad
from aether.functions.scaling import Drain, InstanceView, Memory, Phase, Rules, Start, State
from aether.functions.versions import Versions
from aether.model.errors import AetherError
from aether.model.kv import KV, Delete, Put, absent, unchanged
from aether.model.queue import Queue

PROVISION = "functions/provision"
"""The topic of jobs for workers: start these instances."""
SAMPLE_SECS = 0.1
_ASK_AGAIN_SECS = 10.0
"""An instance that was asked for and that no worker has taken up since is asked for once more."""
_LARGEST_WAVE = 100
_log = structlog.stdlib.get_logger("aether.functions")
_PHASES = {
    Stage.ASKED: Phase.STARTING,
    Stage.STARTING: Phase.STARTING,
    Stage.SERVING: Phase.READY,
    Stage.DRAINING: Phase.DRAINING,
}


def encode_job(function_id: str, instance_ids: list[str]) -> bytes:
    return json.dumps({"function_id": function_id, "instances": instance_ids}).encode()


def decode_job(body: bytes) -> tuple[str, list[str]]:
    fields = json.loads(body)
    return str(fields["function_id"]), [str(name) for name in fields["instances"]]


@dataclass(slots=True)
class _Watched:
    """What the scaler remembers of a function that has instances, callers or a minimum."""

    memory: Memory = field(default_factory=Memory)
    load: Load = field(default_factory=Load)
    backoff: Backoff = field(default_factory=Backoff)
    samples: list[float] = field(default_factory=list[float])
    version: int = 0
    failures: int = -1
    """How many failures have been heeded; -1 before the first look."""
    asked_again: dict[str, float] = field(default_factory=dict[str, float])


class Scaler:
    """`rules` gives what does not belong to the function itself: target and times."""

    def __init__(
        self, kv: KV, queue: Queue, board: Board, versions: Versions, router: FunctionRouter,
        rules: Rules = Rules(), *, now: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._kv = kv
        self._queue = queue
        self._board = board
        self._versions = versions
        self._router = router
        self._rules = rules
        self._now = now
        self._watched: dict[str, _Watched] = {}
        self._called = asyncio.Event()
        self._callers: set[str] = set()
        self._warm: set[str] = set()
        router.on_wait = self._wait

    def changed(self) -> None:
        """Look at all functions now."""
        self._callers.update(self._versions.current)
        self._called.set()

    def warm(self, function_id: str) -> None:
        """Want one instance of the newest version, until there is one or it has failed."""
        self._warm.add(function_id)
        self._wait(function_id)

    def retry_at(self, function_id: str) -> tuple[int, float | None]:
        """Failures in a row, and the UNIX time before which no instance is started."""
        backoff = self._watched[function_id].backoff if function_id in self._watched else Backoff()
        left = backoff.until - self._now()
        return backoff.failures, time.time() + left if left > 0 else None

    async def run(self, lease: KeptLease) -> None:
        """Until cancelled. What is asked for ends with the lease."""
        await self._board.opened()
        self.changed()
        ticked = sampled = self._now()
        with self._board.subscribe() as changed, self._versions.subscribe() as newer:
            while True:
                await self._pause((self._called, changed, newer), ticked, sampled)
                if newer.is_set():
                    newer.clear()
                    self._callers.update(self._versions.current)
                now = self._now()
                if now - sampled >= SAMPLE_SECS:
                    sampled = now
                    self._sample()
                due, self._callers = self._callers, set()
                if changed.is_set() or now - ticked >= scaling.TICK_SECS:
                    changed.clear()
                    due |= self._active()
                if now - ticked >= scaling.TICK_SECS:
                    ticked = now
                    self._measure(now)
                for function_id in due:
                    await self._look(function_id, lease)

    def _wait(self, function_id: str) -> None:
        self._callers.add(function_id)
        self._called.set()

    async def _pause(self, events: Sequence[asyncio.Event], ticked: float, sampled: float) -> None:
        """Until somebody calls, the board has changed, or it is time to measure or to look."""
        busy = any(self._watched)
        until = sampled + SAMPLE_SECS if busy else ticked + scaling.TICK_SECS
        tasks = [asyncio.create_task(event.wait()) for event in events]
        try:
            await asyncio.wait(tasks, timeout=max(0.0, until - self._now()), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        self._called.clear()

    def _active(self) -> set[str]:
        """Functions whose number of instances can be anything but none."""
        kept = {name for name, version in self._versions.current.items() if version.definition.min_instances}
        return kept | self._board.instances.keys() | self._watched.keys() | self._warm

    def _sample(self) -> None:
        for function_id, watched in self._watched.items():
            watched.samples.append(_requests(self._router.load(function_id)))

    def _measure(self, now: float) -> None:
        for watched in self._watched.values():
            if watched.samples:
                watched.load = watched.load.measured(now, math.fsum(watched.samples) / len(watched.samples))
                watched.samples.clear()

    async def _look(self, function_id: str, lease: KeptLease) -> None:
        try:
            await self._decide(function_id, lease)
        except (AetherError, TimeoutError) as error:
            # what was recorded is on the board by the next look, what was not is decided anew
            _log.warning("the instances of a function could not be changed", function=function_id, error=str(error))

    async def _decide(self, function_id: str, lease: KeptLease) -> None:
        version = self._versions.current.get(function_id)
        entries = self._board.of(function_id)
        if version is None:
            self._watched.pop(function_id, None)
            self._warm.discard(function_id)
            await self._withdraw([it for it in entries.values() if it.record.stage is not Stage.DRAINING])
            return
        now = self._now()
        watched = self._watched.setdefault(function_id, _Watched())
        if not watched.load.seconds:
            watched.load = watched.load.measured(now, _requests(self._router.load(function_id)))
        self._heed_failures(function_id, version, watched, now)
        state = self._state(function_id, version, watched, now)
        decision = scaling.decide(state, now)
        watched.memory = decision.memory
        starts = sum(action.count for action in decision.actions if isinstance(action, Start))
        drains = [entries[action.id] for action in decision.actions if isinstance(action, Drain)]
        await self._withdraw(drains)
        if starts:
            await self._ask(version, min(starts, _LARGEST_WAVE), lease)
        elif decision.backing_off and not any(it.phase is not Phase.DRAINING for it in state.instances):
            self._refuse(function_id, version, watched, now)
        await self._ask_again(function_id, watched, now)
        quiet = not state.instances and not starts and not state.waiting
        if quiet and not decision.backing_off and not watched.backoff.failures:
            self._watched.pop(function_id, None)

    def _heed_failures(self, function_id: str, version: FunctionVersion, watched: _Watched, now: float) -> None:
        if watched.version != version.version:
            # what failed was something else
            watched.version, watched.backoff = version.version, Backoff()
        failure = self._board.failures.get(function_id)
        current = failure is not None and failure.last.version == version.version
        if failure is not None and current and watched.failures not in (-1, failure.count):
            watched.backoff = watched.backoff.ran(failure.ran_secs)
            if failure.ran_secs < GOOD_RUN_SECS:
                watched.backoff = watched.backoff.failed(now)
            self._warm.discard(function_id)
        watched.failures = 0 if failure is None else failure.count
        for entry in self._board.of(function_id).values():
            record = entry.record
            if record.stage is Stage.SERVING and record.version == version.version:
                self._warm.discard(function_id)
                watched.backoff = watched.backoff.ran(time.time() - record.asked_at)

    def _state(self, function_id: str, version: FunctionVersion, watched: _Watched, now: float) -> State:
        definition, load = version.definition, self._router.load(function_id)
        views = [
            InstanceView(
                id=record.id,
                phase=_PHASES[record.stage],
                in_flight=load.in_flight.get(record.id, 0),
                idle_since=None if load.in_flight.get(record.id) else load.idle_since.get(record.id, now),
                outdated=record.version != version.version,
            )
            for record in (entry.record for entry in self._board.of(function_id).values())
        ]
        common = self._rules
        rules = Rules(
            concurrency=definition.concurrency, target=common.target, min_instances=definition.min_instances,
            max_instances=definition.max_instances, stable_secs=common.stable_secs, panic_secs=common.panic_secs,
            panic_ratio=common.panic_ratio, idle_secs=common.idle_secs, last_idle_secs=common.last_idle_secs,
        )  # fmt: skip
        waiting = load.waiting
        if function_id in self._warm and not any(not it.outdated and it.phase is not Phase.DRAINING for it in views):
            waiting = max(waiting, sum(max(0, definition.concurrency - it.in_flight) for it in views) + 1)
        return State(rules, views, waiting, watched.load, watched.backoff, watched.memory)

    async def _ask(self, version: FunctionVersion, count: int, lease: KeptLease) -> None:
        """Record a wave of instances, then tell the workers of it."""
        records = [
            InstanceRecord(version.function_id, uuid.uuid4().hex[:12], version.version, Stage.ASKED, time.time())
            for _ in range(count)
        ]
        done = await self._kv.transact(
            [absent(record.key) for record in records],
            [Put(record.key, record.encode(), lease.id) for record in records],
        )
        ids = [record.id for record in records]
        await self._queue.enqueue(PROVISION, encode_job(version.function_id, ids), dedupe=ids[0])
        await self._board.reached(done.revision)

    async def _ask_again(self, function_id: str, watched: _Watched, now: float) -> None:
        """For instances whose job was lost between the record and the queue, or with a worker."""
        asked = {
            record.id: record
            for record in (entry.record for entry in self._board.of(function_id).values())
            if record.stage is Stage.ASKED
        }
        watched.asked_again = {name: watched.asked_again.get(name, now) for name in asked}
        late = [name for name, since in watched.asked_again.items() if now - since >= _ASK_AGAIN_SECS]
        if late:
            await self._queue.enqueue(PROVISION, encode_job(function_id, late), dedupe=late[0])
            watched.asked_again |= dict.fromkeys(late, now)

    async def _withdraw(self, entries: list[Entry]) -> None:
        """Nothing more for these: one that no worker has is gone at once, any other drains."""
        reached = 0
        for entry in entries:
            record = entry.record
            change = (
                Delete(record.key)
                if record.stage is Stage.ASKED
                else Put(record.key, record.at(Stage.DRAINING).encode(), entry.kv.lease)
            )
            done = await self._kv.transact([unchanged(entry.kv)], [change])
            reached = max(reached, done.revision if done.succeeded else 0)
        if reached:
            await self._board.reached(reached)

    def _refuse(self, function_id: str, version: FunctionVersion, watched: _Watched, now: float) -> None:
        """Nobody need wait for an instance that is not started soon."""
        failure = self._board.failures.get(function_id)
        reason = "" if failure is None else f": {failure.last.reason}"
        wait_secs = max(1, math.ceil(watched.backoff.until - now))
        self._router.fail_waiting(
            function_id, f"function {version.definition.name} could not be started{reason}", wait_secs
        )


def _requests(load: RouteLoad) -> float:
    return float(load.waiting + sum(load.in_flight.values()))
