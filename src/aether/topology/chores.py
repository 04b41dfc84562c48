"""The background tasks of a server; those that one server at a time does, under leases.

A chore that needs a lease waits until it has it, runs while it holds it, and waits again when another server has
taken it over. What a chore does is its own module's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from aether.leases import Lease, Leases
from aether.model.errors import AetherError
from aether.observability.logging import logger

_LOOKS_PER_LEASE = 3
_log = logger(__name__)

Work = Callable[[asyncio.Event], Coroutine[Any, Any, None]]
"""Runs until the event is set, or until it is done."""
Look = Callable[[], Awaitable[None] | None]


class Chores:
    """`stop` is set when the server begins to end; `close` ends what does not end by itself."""

    def __init__(self, leases: Leases, stop: asyncio.Event) -> None:
        self._leases = leases
        self._stop = stop
        self._tasks: list[asyncio.Task[None]] = []

    def add(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Every server does this one."""
        self._tasks.append(asyncio.create_task(work, name=name))

    def leased(self, name: str, work: Work) -> None:
        """One server at a time does this one."""
        self.add(name, self._under_lease(f"chore/{name.replace(' ', '-')}", work))

    def every(self, secs: float, name: str, look: Look, *, when: asyncio.Event | None = None) -> None:
        """Every server looks again and again, at once `when` is set; an outage is told of and outlived."""
        self.add(name, self._again(secs, name, look, self._stop, when))

    def leased_every(self, secs: float, name: str, look: Look) -> None:
        self.leased(name, lambda stop: self._again(secs, name, look, stop))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _under_lease(self, lease_name: str, work: Work) -> None:
        while not self._stop.is_set():
            lease = await self._claim(lease_name)
            if lease is None:
                await _pause(self._leases.ttl_secs / _LOOKS_PER_LEASE, self._stop)
                continue
            lost = asyncio.Event()
            lease.when_lost(lost.set)
            if await _while_held(work, lost, self._stop):
                return

    async def _claim(self, name: str) -> Lease | None:
        try:
            return await self._leases.claim(name)
        except (AetherError, SQLAlchemyError) as error:
            _log.warning("a chore waits for the database", chore=name, error=str(error))
            return None

    async def _again(
        self, secs: float, name: str, look: Look, stop: asyncio.Event, when: asyncio.Event | None = None
    ) -> None:
        while not stop.is_set():
            await _pause(secs, stop, when)
            if stop.is_set():
                return
            try:
                if (looking := look()) is not None:
                    await looking
            except (AetherError, SQLAlchemyError) as error:
                _log.warning("a chore failed and is tried again", chore=name, error=str(error))


async def _while_held(work: Work, lost: asyncio.Event, stop: asyncio.Event) -> bool:
    """Run `work` until it is done, the server ends, or the lease is lost (False)."""
    end = asyncio.Event()
    task = asyncio.create_task(work(end))
    watchers = [asyncio.create_task(lost.wait()), asyncio.create_task(stop.wait())]
    try:
        await asyncio.wait([task, *watchers], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        end.set()
        if lost.is_set():
            task.cancel()
        await asyncio.wait([task])
        return not lost.is_set()
    finally:
        for other in (task, *watchers):
            other.cancel()
        await asyncio.gather(task, *watchers, return_exceptions=True)


async def _pause(secs: float, stop: asyncio.Event, when: asyncio.Event | None = None) -> None:
    """Until the time is over, or `stop` or `when` is set, which is cleared then."""
    waiting = [asyncio.ensure_future(event.wait()) for event in (stop, when) if event is not None]
    try:
        await asyncio.wait(waiting, timeout=secs, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
    if when is not None:
        when.clear()
