"""The key-value store of one machine: a SQLite file that every process there opens for itself.

What is decided is in `aether.stores.kv.history`, how changes reach watches in `aether.stores.kv.watching`, how
processes share the file in `aether.stores.local.file`. This is the port over them, the clock of the leases, and the
bound of the history.

A lease counts on a clock that nobody can set, under the name of the machine's current boot: a clock that jumps ends
nothing, and a machine that was started anew ends all. Any process that has the file open ends what is over, so a
process that is killed takes its keys with it as long as one other lives, or when the next one opens the file.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import structlog

from aether.model import kv
from aether.model.errors import ServiceUnavailable
from aether.stores.kv import history
from aether.stores.kv.watching import Tail, Watch
from aether.stores.local.file import SqliteFile
from aether.stores.local.uptime import boot_id, uptime

if TYPE_CHECKING:
    import sqlite3

HISTORY_REVISIONS = 10_000
HISTORY_BYTES = 64 << 20
_LOOK_SECS = 1.0
"""No lease is shorter, so one that was granted elsewhere after a look is not over before the next."""
_T = TypeVar("_T")
_log = structlog.stdlib.get_logger("aether.kv")


class SqliteKV:
    """A driver of `aether.model.kv.KV`. `boot` and `now` are the clock of its leases."""

    def __init__(
        self,
        path: Path,
        *,
        history_revisions: int = HISTORY_REVISIONS,
        history_bytes: int = HISTORY_BYTES,
        patience_secs: float = 5.0,
        boot: Callable[[], str] = boot_id,
        now: Callable[[], float] = uptime,
    ) -> None:
        self._file = SqliteFile(path, history.LAYOUT, history.VERSION, patience_secs=patience_secs)
        self._tail = Tail(self._file)
        self._revisions = history_revisions
        self._bytes = history_bytes
        self._boot = boot
        self._now = now
        self._expiring: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Raises ServiceUnavailable."""
        await self._file.open()
        try:
            await self.expire()
        except BaseException:
            await self._file.close()
            raise
        self._expiring = asyncio.create_task(self._keep_expiring(), name="kv leases")

    async def close(self) -> None:
        """Leases go on: they belong to whoever keeps them alive, not to this process."""
        if self._expiring is not None:
            self._expiring.cancel()
            await asyncio.wait((self._expiring,))
        await self._tail.close()
        await self._file.close()

    # --- reading

    async def get(self, key: str, *, revision: int = 0) -> kv.KeyValue | None:
        encoded = kv.check_key(key)
        kv.check_revision(revision)
        return await self._file.read(lambda db: history.get(db, encoded, revision))

    async def list(self, prefix: str, *, revision: int = 0, after: str = "", limit: int = 0) -> kv.Listing:
        start, behind = kv.check_prefix(prefix), kv.check_prefix(after)
        kv.check_revision(revision)
        return await self._file.read(lambda db: history.listing(db, start, revision, behind, limit))

    @asynccontextmanager
    async def watch(
        self, prefix: str, *, from_revision: int = 0, progress_secs: float = 0.0
    ) -> AsyncGenerator[Watch]:
        kv.check_prefix(prefix)
        kv.check_revision(from_revision)
        watch = Watch(self._file, self._tail, prefix, from_revision, progress_secs)
        try:
            await watch.open()
            yield watch
        finally:
            await watch.close()

    # --- changing

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        return (await self.transact((), (kv.Put(key, value, lease),))).revision

    async def delete(self, key: str) -> bool:
        return bool((await self.transact((), (kv.Delete(key),))).results[0])

    async def delete_prefix(self, prefix: str) -> int:
        return len((await self.transact((), (kv.Delete(prefix, prefix=True),))).results[0])

    async def transact(
        self,
        when: Sequence[kv.Compare],
        then: Sequence[kv.Operation] = (),
        otherwise: Sequence[kv.Operation] = (),
    ) -> kv.Outcome:
        kv.check_transaction(when, then, otherwise)

        def work(db: sqlite3.Connection, clock: history.Clock) -> kv.Outcome:
            outcome = history.transact(db, clock, when, then, otherwise)
            history.bound(db, self._revisions, self._bytes)
            return outcome

        return await self._write(work)

    async def compact(self, revision: int) -> None:
        kv.check_revision(revision)
        await self._file.write(lambda db: history.compact(db, revision))

    # --- leases

    async def grant(self, ttl_secs: int) -> int:
        kv.check_ttl(ttl_secs)
        lease = secrets.randbelow((1 << 63) - 1) + 1
        await self._write(lambda db, clock: history.grant(db, clock, lease, ttl_secs))
        return lease

    async def keep_alive(self, lease: int) -> int:
        return await self._write(lambda db, clock: history.keep_alive(db, clock, lease))

    async def revoke(self, lease: int) -> None:
        await self._write(lambda db, clock: history.revoke(db, clock, lease))

    async def lease(self, lease: int) -> kv.LeaseInfo:
        return await self._file.read(lambda db: history.lease_info(db, self._clock(), lease))

    async def expire(self) -> int:
        """End the leases that are over by now; returns how many. Done by itself, too."""
        return await self._write(history.expire)

    async def _keep_expiring(self) -> None:
        while True:
            pause = _LOOK_SECS
            try:
                deadline = await self._file.read(lambda db: history.next_deadline(db, self._boot()))
                if deadline is not None:
                    pause = min(pause, deadline - self._now())
                    if pause <= 0:
                        await self.expire()
                        continue
            except ServiceUnavailable as error:
                _log.warning("leases cannot be looked at", error=error.message)
            await asyncio.sleep(pause)

    # ---

    async def _write(self, work: Callable[[sqlite3.Connection, history.Clock], _T]) -> _T:
        # the clock is looked at once the transaction is the only one, not before its turn has come
        return await self._file.write(lambda db: work(db, self._clock()))

    def _clock(self) -> history.Clock:
        return history.Clock(self._boot(), self._now())
