"""Being alone with one artifact, among the tasks of a server and among the servers that share its database.

Completing, purging and collecting the same artifact take turns. Within a process that is a lock; between processes it
is a lease, which outlives a killed holder by its time and no longer. A holder that was overtaken is refused by
`Hold.confirm` in every write, and by `Hold.check` before it touches the store: what it would delete or replace may
be another server's by now.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Hashable
from contextlib import asynccontextmanager

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.leases import Lease, LeaseLost, Leases
from aether.model.errors import AetherError, ServiceUnavailable
from aether.observability.logging import logger

_FIRST_PAUSE_SECS, _LAST_PAUSE_SECS = 0.02, 0.5
_LAPSE_SECS = 5.0
_OVERTAKEN = "another server has taken this artifact over; try again"
_log = logger(__name__)


class KeyedLocks:
    """One asyncio lock per key, kept only while somebody holds or awaits it."""

    def __init__(self) -> None:
        self._held: dict[Hashable, tuple[asyncio.Lock, int]] = {}

    def is_held(self, key: Hashable) -> bool:
        return key in self._held

    @asynccontextmanager
    async def hold(self, key: Hashable) -> AsyncGenerator[None]:
        lock, users = self._held.get(key, (asyncio.Lock(), 0))
        self._held[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._held[key]
            if users == 1:
                del self._held[key]
            else:
                self._held[key] = (lock, users - 1)


class Hold:
    """The right to work on one artifact, for as long as no other server has taken it over."""

    def __init__(self, lease: Lease | None) -> None:
        self._lease = lease

    async def confirm(self, tx: AsyncConnection) -> None:
        """Make the transaction one of this holder's. Raises ServiceUnavailable when it was overtaken."""
        if self._lease is None:
            return
        try:
            await self._lease.confirm(tx)
        except LeaseLost:
            raise ServiceUnavailable(_OVERTAKEN) from None

    def check(self) -> None:
        """Call right before an effect that must not come late. Raises ServiceUnavailable."""
        if self._lease is not None and not self._lease.holds:
            raise ServiceUnavailable(_OVERTAKEN)


class ArtifactLocks:
    """`leases` None, or alone on its database: only the tasks of this process can meet."""

    def __init__(self, leases: Leases | None = None) -> None:
        self._local = KeyedLocks()
        self._leases = None if leases is None or leases.alone else leases

    @asynccontextmanager
    async def alone_with(self, app_id: str, digest: str) -> AsyncGenerator[Hold]:
        """While it is held nobody else completes, purges or collects this artifact.

        Waits for another server for as long as a killed one would keep it, then raises ServiceUnavailable.
        """
        async with self._local.hold((app_id, digest)):
            if self._leases is None:
                yield Hold(None)
                return
            lease = await self._claim(self._leases, _name(app_id, digest))
            try:
                yield Hold(lease)
            finally:
                await self._end(self._leases, lease)

    @asynccontextmanager
    async def if_free(self, app_id: str, digest: str) -> AsyncGenerator[Hold | None]:
        """The same without waiting: None while somebody works on it. Asked again and again, this sees the lease of a
        dead server lapse."""
        if self._local.is_held((app_id, digest)):
            yield None
            return
        async with self._local.hold((app_id, digest)):
            if self._leases is None:
                yield Hold(None)
                return
            lease = await self._leases.claim(_name(app_id, digest))
            try:
                yield None if lease is None else Hold(lease)
            finally:
                if lease is not None:
                    await self._end(self._leases, lease)

    async def _claim(self, leases: Leases, name: str) -> Lease:
        now = asyncio.get_running_loop().time
        deadline = now() + leases.ttl_secs + _LAPSE_SECS
        pause = _FIRST_PAUSE_SECS
        while (lease := await leases.claim(name)) is None:
            if now() >= deadline:
                raise ServiceUnavailable("another server is working on this artifact; try again")
            await asyncio.sleep(pause)  # nothing tells of what another process gives back
            pause = min(2 * pause, _LAST_PAUSE_SECS)
        return lease

    async def _end(self, leases: Leases, lease: Lease) -> None:
        """What was done under it counts whether or not the lease can be given back; if not, it lapses."""
        try:
            await leases.end(lease)
        except (AetherError, SQLAlchemyError) as error:
            _log.warning("a lease could not be ended; it lapses by itself", lease=lease.name, error=str(error))


def _name(app_id: str, digest: str) -> str:
    return f"artifact/{app_id}/{digest[:48]}"
