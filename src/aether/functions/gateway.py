"""What a gateway does for functions: keeps the edge's routes as the board says, and tells what it has heeded.

A worker stops an instance only when every living gateway has acknowledged that it sends nothing there any more
(`aether.functions.instance_state`). Whose instances there should be is decided in `scaler`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from aether.coordination.kept import KeptLease
from aether.functions.board import GATEWAYS, Acknowledged, Board, Entry, Stage
from aether.functions.ports import FunctionRouter, FunctionVersion, RouteRules, ServingInstance
from aether.functions.versions import Versions
from aether.model.errors import AetherError
from aether.model.kv import KV

_AGAIN_SECS = 0.2
_log = structlog.stdlib.get_logger("aether.functions")

Reach = Callable[[Entry], Callable[[], Awaitable[socket.socket]] | None]
"""How an instance is connected to from here; None when it cannot be."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Bounds of the line in front of one function."""

    secs: float = 60.0
    most: int = 2000


class Gateway:
    def __init__(
        self, name: str, kv: KV, board: Board, versions: Versions, router: FunctionRouter, reach: Reach,
        waiting: Waiting = Waiting(),
    ) -> None:  # fmt: skip
        self._key = GATEWAYS + name
        self._kv = kv
        self._board = board
        self._versions = versions
        self._router = router
        self._reach = reach
        self._waiting = waiting
        self._look = asyncio.Event()
        self._suspects: dict[str, str] = {}
        """Functions by instances that took no connection and that nobody has looked at since."""
        self._served: set[str] = set()
        self.routed = asyncio.Event()
        """Routes are as the versions and the board were at some time."""
        self.on_suspect: Callable[[str, str], None] = lambda _function, _instance: None
        self.on_hung: Callable[[str, str], None] = lambda _function, _instance: None
        router.on_unreachable = self._suspect
        router.on_hung = self._hung
        router.on_drained = lambda _function, _instance: self._look.set()

    def cleared(self, instance_id: str) -> None:
        """Somebody has looked at a suspect: it takes connections."""
        if self._suspects.pop(instance_id, None) is not None:
            self._look.set()

    async def run(self, lease: KeptLease) -> None:
        """Until cancelled. The lease is that of this gateway's key."""
        told: Acknowledged | None = None
        with self._board.subscribe() as changed, self._versions.subscribe() as newer:
            await self._board.opened()
            while True:
                for event in (changed, newer, self._look):
                    event.clear()
                self._route()
                self.routed.set()
                wanted = Acknowledged(self._board.withdrawn_at, self._busy())
                if wanted != told:
                    try:
                        await self._kv.put(self._key, wanted.encode(), lease=lease.id)
                        told = wanted
                    except AetherError as error:
                        _log.warning("a gateway could not tell what it has seen", error=error.message)
                        await asyncio.sleep(_AGAIN_SECS)
                        continue
                await _either(changed, newer, self._look)

    def _suspect(self, function_id: str, instance_id: str) -> None:
        self._suspects[instance_id] = function_id
        self.on_suspect(function_id, instance_id)

    def _hung(self, function_id: str, instance_id: str) -> None:
        self._suspects[instance_id] = function_id
        self.on_hung(function_id, instance_id)

    def _route(self) -> None:
        current = self._versions.current
        for function_id, version in current.items():
            self._router.serve(function_id, self._rules(version), self._serving(function_id))
        for function_id in self._served - current.keys():
            self._router.drop(function_id)
        self._served = set(current)
        there = {name for instances in self._board.instances.values() for name in instances}
        self._suspects = {name: of for name, of in self._suspects.items() if name in there}

    def _serving(self, function_id: str) -> list[ServingInstance]:
        found: list[ServingInstance] = []
        for entry in self._board.of(function_id).values():
            record = entry.record
            if record.stage is not Stage.SERVING or record.id in self._suspects:
                continue
            if (dial := self._reach(entry)) is not None:
                found.append(ServingInstance(record.id, record.version, record.start, dial))
        return found

    def _rules(self, version: FunctionVersion) -> RouteRules:
        definition = version.definition
        return RouteRules(
            definition.name, version.version, definition.concurrency, definition.timeout_secs, self._waiting.secs,
            self._waiting.most,
        )  # fmt: skip

    def _busy(self) -> dict[str, int]:
        """Requests that instances still have which are not to get new ones."""
        found: dict[str, int] = {}
        for function_id, instances in self._board.instances.items():
            drawn = [entry.record.id for entry in instances.values() if entry.record.stage is not Stage.SERVING]
            if drawn:
                in_flight = self._router.load(function_id).in_flight
                found |= {name: in_flight[name] for name in drawn if in_flight.get(name)}
        return found


async def _either(*events: asyncio.Event) -> None:
    tasks = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
