"""A lease of the key-value store in the hands of its holder, who keeps it alive and knows when it may be over.

The holder counts from before it sent its newest renewal, the store from after it got it, each on its own clock: so
the holder's count is the longer one. It should begin nothing more at two thirds of the lease (`holds`), and
takes it for lost when all of it has passed, whether the store answers or not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import structlog

from aether.model.errors import LeaseGone, NotFound, ServiceUnavailable
from aether.model.kv import KV

_RENEW_AFTER = 1 / 3
_FENCE_AFTER = 2 / 3
_AGAIN = 1 / 15
"""A renewal that failed is tried again after this part of the lease."""
_log = structlog.stdlib.get_logger("aether.coordination")


def clock() -> float:
    """Seconds on a clock that never jumps and goes on while the machine sleeps, where there is one: the store may be
    on a machine that does not sleep."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class KeptLease:
    """Once `lost` is set it never comes back; its keys are deleted, or will be."""

    def __init__(self, lease: int, ttl_secs: int, sent_at: float, now: Callable[[], float]) -> None:
        self.id = lease
        self.ttl_secs = ttl_secs
        self.lost = asyncio.Event()
        self._sent_at = sent_at
        self._now = now

    @property
    def holds(self) -> bool:
        """Whether something may be begun that nobody else must do at the same time."""
        return not self.lost.is_set() and self._age() < self.ttl_secs * _FENCE_AFTER

    def _age(self) -> float:
        return self._now() - self._sent_at

    async def keep(self, kv: KV) -> None:
        """Renew until it is lost."""
        pause = self.ttl_secs * _RENEW_AFTER
        while True:
            await asyncio.sleep(max(0.0, min(pause, self.ttl_secs - self._age())))
            sent_at = self._now()
            try:
                # an answer that comes too late is none
                async with asyncio.timeout(max(0.0, self.ttl_secs - self._age())):
                    self.ttl_secs = await kv.keep_alive(self.id)
            except LeaseGone:
                break
            except (ServiceUnavailable, TimeoutError) as error:
                _log.warning("a lease could not be renewed", lease=self.id, error=str(error))
                if self._age() >= self.ttl_secs:
                    break
                pause = self.ttl_secs * _AGAIN
            else:
                self._sent_at = sent_at
                pause = self.ttl_secs * _RENEW_AFTER
        _log.warning("a lease is lost", lease=self.id)
        self.lost.set()


@asynccontextmanager
async def kept_lease(kv: KV, ttl_secs: int, *, now: Callable[[], float] = clock) -> AsyncGenerator[KeptLease]:
    """A new lease, kept alive inside the context and revoked at its end. Raises ServiceUnavailable."""
    sent_at = now()
    lease = KeptLease(await kv.grant(ttl_secs), ttl_secs, sent_at, now)
    keeping = asyncio.create_task(lease.keep(kv), name=f"lease {lease.id:x}")
    try:
        yield lease
    finally:
        keeping.cancel()
        await asyncio.wait((keeping,))
        lease.lost.set()
        try:
            await kv.revoke(lease.id)
        except NotFound:
            _log.debug("a lease was over before it was given back", lease=lease.id)
        except ServiceUnavailable as error:
            _log.warning("a lease could not be given back; it ends by itself", lease=lease.id, error=error.message)
