"""The loop that runs the chores, under one lease for all of them.

What a chore takes away is its capability's business, as is doing so safely beside everything else and again after a
kill. A chore that fails is told of and leaves the others alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
from sqlalchemy.exc import SQLAlchemyError

from aether.leases import LeaseLost, Leases
from aether.model.errors import AetherError, Conflict
from aether.observability.metrics import Metrics

LEASE = "retention"
JITTER = 0.1
"""Of the interval, so that servers and backups do not meet every hour."""
FIRST_SECS = 60.0
"""After the start, when the apps are up again."""
_log = structlog.stdlib.get_logger("aether.retention")


@dataclass(frozen=True, slots=True)
class Swept:
    """What a chore took away, or would."""

    deleted: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    chore: str
    swept: Swept
    error: str | None = None


class Chore(Protocol):
    @property
    def name(self) -> str: ...

    async def sweep(self, *, dry_run: bool) -> Swept:
        """Take away what is due; with `dry_run` only say what that is."""
        ...


class Retention:
    def __init__(self, leases: Leases, chores: Sequence[Chore], interval_secs: float, metrics: Metrics) -> None:
        self._leases = leases
        self._chores = chores
        self._interval = interval_secs
        self._metrics = metrics
        self._sweeping = asyncio.Lock()

    async def run(self, stop: asyncio.Event) -> None:
        """Sweep now and then until `stop` is set; an interval of 0 leaves it to `aether gc`."""
        pause = min(FIRST_SECS, self._interval)
        while self._interval and not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await stop.wait()
                    return
            pause = self._interval * random.uniform(1 - JITTER, 1 + JITTER)
            try:
                await self.sweep(dry_run=False)
            except Conflict:
                _log.debug("another server takes away what is due")
            except (AetherError, SQLAlchemyError) as error:
                _log.warning("what is due could not be taken away", error=str(error))

    async def sweep(self, *, dry_run: bool) -> Sequence[Result]:
        """Every chore once. Raises Conflict while another server does this, ServiceUnavailable."""
        async with self._sweeping:
            lease = await self._leases.claim(LEASE)
            if lease is None:
                raise Conflict("another server is taking away what is due; try again in a minute")
            results: list[Result] = []
            for chore in self._chores:
                await lease.until_holds()
                results.append(await self._one(chore, dry_run=dry_run))
            if not dry_run:
                self._metrics.retention_runs.inc()
            return results

    async def _one(self, chore: Chore, *, dry_run: bool) -> Result:
        try:
            swept = await chore.sweep(dry_run=dry_run)
        except (AetherError, SQLAlchemyError, OSError, LeaseLost) as error:
            _log.warning("a chore failed and is tried again the next time", chore=chore.name, error=str(error))
            return Result(chore.name, Swept(), str(error))
        if swept.deleted and not dry_run:
            self._metrics.retention_deleted.labels(chore.name).inc(swept.deleted)
            self._metrics.retention_bytes.labels(chore.name).inc(swept.bytes)
            _log.info("taken away", chore=chore.name, deleted=swept.deleted, bytes=swept.bytes)
        return Result(chore.name, swept)
