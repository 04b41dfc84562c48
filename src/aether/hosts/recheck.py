"""Looks again, in the background, for the proofs of hosts that could not be proven when they were claimed.

When is due is a rule of `aether.hosts.plan`; the look itself is the one of `aether hosts verify`. A claim is looked
for as soon as it is made, and the first pause is a minute, so looking at the record once a minute misses none.
"""

from __future__ import annotations

import asyncio
import contextlib

import structlog
from sqlalchemy.exc import SQLAlchemyError

from aether.hosts.plan import MINUTE_US, next_check
from aether.hosts.service import HostRow, Hosts
from aether.model.errors import AetherError
from aether.model.times import now_us

_AT_ONCE = 2
"""Fewer than the prover does: whoever asks with 'aether hosts verify' need not wait for all of these."""
_log = structlog.stdlib.get_logger("aether.hosts")


class Rechecker:
    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MINUTE_US / 1_000_000):
                    await stop.wait()
                    return
            try:
                await self.look(now_us())
            except (AetherError, SQLAlchemyError) as error:
                _log.warning("pending hosts could not be looked at", error=str(error))

    async def look(self, now: int) -> None:
        """Look for the proof of every pending host that is due."""
        turns = asyncio.Semaphore(_AT_ONCE)

        async def one(row: HostRow) -> None:
            async with turns:
                try:
                    await self._hosts.verify(row.app, row.host)
                except AetherError as error:
                    _log.info("a pending host stays pending", app=row.app, host=row.host, reason=error.message)

        due = [row for row in await self._hosts.pending() if _is_due(row, now)]
        await asyncio.gather(*(one(row) for row in due))


def _is_due(row: HostRow, now: int) -> bool:
    at = next_check(row.created_at, row.checked_at)
    return at is not None and at <= now
