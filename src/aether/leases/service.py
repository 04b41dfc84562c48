"""The leases of one server: claimed by compare-and-swap, renewed together, confirmed inside writes.

Two guards, and both are needed. A write confirms its lease in its own transaction, so a holder that was overtaken is
refused whatever it believes. An effect outside the database asks `holds` first: a holder that could not renew in
time, frozen or cut off, stops by its own clock before anybody else may begin, and goes on once it has renewed.

A server that has the database to itself (`alone`: the lock of its data folder says so) claims at once what an earlier
server left, and does not stop while the database is away, for nobody else could take over.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.leases.rules import RENEW_AFTER, Held, Seen, Step, look, of_holder, of_observer
from aether.model.database import DatabasePort
from aether.model.errors import AetherError
from aether.model.times import now_us
from aether.stores.database.tables import leases

TTL_SECS = 15.0
_AGAIN = 1 / 15
"""A renewal that failed is tried again after this part of the lease."""
_RENEWALS = 1 << 30
"""Half of what the column holds; at one renewal in five seconds the rest lasts for centuries."""
_CONFIRM = (
    sa.select(leases.c.epoch)
    .where(leases.c.name == sa.bindparam("called"), leases.c.owner == sa.bindparam("mine"))
    .with_for_update(read=True)
)
_log = structlog.stdlib.get_logger("aether.leases")


async def hold(tx: AsyncConnection, name: str) -> None:
    """Be the only one to hold `name` until the transaction ends: for what there is no row to lock."""
    if tx.dialect.name == "postgresql":
        await tx.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(name, 0))))


class LeaseLost(Exception):
    """Another server holds the lease: leave everything as it is, that server goes on with it."""


def clock() -> float:
    """Seconds on a clock that never jumps and goes on while the machine sleeps, where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Lease:
    """One lease in this server's hands. It never comes back once it is `lost`; claiming it again makes a new one."""

    def __init__(
        self, name: str, owner: str, epoch: int, held: Held, *, alone: bool, now: Callable[[], float]
    ) -> None:
        self.name = name
        self.owner = owner
        self.epoch = epoch
        self.lost = False
        self._held = held
        self._alone = alone
        self._now = now
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"<Lease {self.name} epoch {self.epoch}>"

    @property
    def holds(self) -> bool:
        """Whether its work may be done at this moment."""
        if self.lost:
            return False
        return self._alone or of_holder(self._held, self._now()) is not Step.FENCE

    async def until_holds(self) -> None:
        """Return when the work may be done. Raises LeaseLost."""
        while not self.holds:
            if self.lost:
                raise LeaseLost(f"{self.name} has been taken over by another server")
            self._changed.clear()
            await self._changed.wait()

    async def confirm(self, tx: AsyncConnection) -> None:
        """Make the transaction one of this lease: it commits before anybody else claims it, or raises LeaseLost."""
        found = await tx.execute(_CONFIRM, {"called": self.name, "mine": self.owner})
        if found.scalar_one_or_none() != self.epoch:
            self.lose()
            raise LeaseLost(f"{self.name} is no longer held by this server under epoch {self.epoch}")

    def when_lost(self, call: Callable[[], None]) -> None:
        self._listeners.append(call)

    def renewed(self, sent_at: float) -> None:
        self._held = Held(sent_at, self._held.ttl)
        self._changed.set()

    def lose(self) -> None:
        if not self.lost:
            self.lost = True
            self._changed.set()
            for call in self._listeners:
                call()


class Leases:
    """See the module. `start` renews; without it every lease lapses."""

    def __init__(
        self,
        database: DatabasePort,
        owner: str,
        *,
        ttl_secs: float = TTL_SECS,
        alone: bool = False,
        now: Callable[[], float] = clock,
    ) -> None:
        self._database = database
        self.owner = owner
        """Names this server process."""
        self.ttl_secs = ttl_secs
        self.alone = alone
        self._now = now
        self._held: dict[str, Lease] = {}
        self._seen: dict[str, Seen] = {}
        self._renewing: asyncio.Task[None] | None = None

    def held(self, name: str) -> Lease | None:
        return self._held.get(name)

    async def claim(self, name: str) -> Lease | None:
        """The lease, if it is this server's or could be made so; None while another server has it."""
        return (await self.claim_all([name])).get(name)

    async def claim_all(self, names: Sequence[str]) -> Mapping[str, Lease]:
        """Those of the leases that are this server's now. Raises ServiceUnavailable."""
        wanted = {name for name in names if name not in self._held}
        if wanted:
            claimed: list[Lease] = []
            try:
                if await self._any_claimable(wanted):
                    async with self._database.write(brief=len(wanted) == 1) as tx:
                        claimed = await self._claim_in(tx, wanted)
            except IntegrityError:
                _log.info("a lease was claimed by another server at the same moment")
                claimed = []
            for lease in claimed:
                self.keep(lease)
        return {name: self._held[name] for name in names if name in self._held}

    async def begin_in(self, tx: AsyncConnection, name: str) -> Lease:
        """Claim a lease that nobody can have yet; it counts once the transaction is committed, after `keep`."""
        lease = self._made(name, 1, self._now())
        await tx.execute(sa.insert(leases).values(name=name, **self._values(1)))
        return lease

    def keep(self, lease: Lease) -> None:
        """Renew the lease from now on."""
        self._held[lease.name] = lease
        lease.when_lost(lambda: self._drop(lease))

    async def end_in(self, tx: AsyncConnection, name: str) -> None:
        """What the lease was for is gone for good; call `forget` once the transaction is committed."""
        await tx.execute(sa.delete(leases).where(leases.c.name == name))

    def forget(self, name: str) -> None:
        if (lease := self._held.get(name)) is not None:
            lease.lose()

    def start(self) -> None:
        """Renew from now on, until `close`."""
        self._renewing = asyncio.create_task(self._keep_renewing(), name="leases")

    async def close(self) -> None:
        """Renew no more and give everything back, so that no other server has to wait."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait((self._renewing,))
        try:
            await self.release_all()
        except (AetherError, SQLAlchemyError) as error:
            _log.warning("leases could not be given back; they lapse by themselves", error=str(error))

    async def _keep_renewing(self) -> None:
        pause = self.ttl_secs * RENEW_AFTER
        while True:
            await asyncio.sleep(pause)
            pause = self.ttl_secs * (RENEW_AFTER if await self._renewed() else _AGAIN)

    async def _renewed(self) -> bool:
        try:
            await self.renew()
        except (AetherError, SQLAlchemyError) as error:
            _log.warning("leases could not be renewed", leases=len(self._held), error=str(error))
            return False
        return True

    async def renew(self) -> None:
        """Renew every lease of this server and find out which it has lost. Raises ServiceUnavailable."""
        before = dict(self._held)
        if not before:
            return
        sent_at = self._now()
        async with self._database.write() as tx:
            # those alone: what was claimed in a write whose answer was lost, or could not be given back, must lapse
            mine = sa.and_(leases.c.owner == self.owner, leases.c.name.in_(sorted(before)))
            await tx.execute(sa.select(leases.c.name).where(mine).order_by(leases.c.name).with_for_update())
            await tx.execute(
                sa.update(leases).where(mine).values(renewals=leases.c.renewals + 1, expires_at=self._expiry())
            )
            found = await tx.execute(sa.select(leases.c.name, leases.c.epoch).where(leases.c.owner == self.owner))
            epochs = {row.name: row.epoch for row in found}
        for name, lease in before.items():
            if epochs.get(name) == lease.epoch:
                lease.renewed(sent_at)
            else:
                _log.warning("a lease was lost to another server", lease=name, epoch=lease.epoch)
                lease.lose()

    async def release(self, name: str) -> None:
        """Give a lease back, so that another server need not wait for its end."""
        lease = self._held.get(name)
        if lease is None:
            return
        lease.lose()
        async with self._database.write() as tx:
            await self._free(tx, leases.c.name == name, leases.c.epoch == lease.epoch)

    async def end(self, lease: Lease) -> None:
        """Give a lease back whose work is done and leave nothing of it; for names that come and go."""
        lease.lose()
        async with self._database.write(brief=True) as tx:
            await tx.execute(
                sa.delete(leases).where(
                    leases.c.name == lease.name, leases.c.owner == self.owner, leases.c.epoch == lease.epoch
                )
            )

    async def release_all(self) -> None:
        """Give everything back: this server is about to end."""
        for lease in list(self._held.values()):
            lease.lose()
        async with self._database.write() as tx:
            await self._free(tx)

    async def _free(self, tx: AsyncConnection, *conditions: sa.ColumnElement[bool]) -> None:
        await tx.execute(sa.update(leases).where(leases.c.owner == self.owner, *conditions).values(owner=None))

    # --- claiming

    async def _any_claimable(self, names: set[str]) -> bool:
        """Look without taking the write lock; a server that waits for others does so most of the time."""
        async with self._database.read(brief=len(names) == 1) as tx:
            rows = await self._rows(tx, names)
        return len(rows) < len(names) or any(self._may_claim(row) for row in rows)

    async def _claim_in(self, tx: AsyncConnection, names: set[str]) -> list[Lease]:
        sent_at = self._now()
        known = {row.name: row for row in await self._rows(tx, names)}
        claimed: list[Lease] = []
        for name in sorted(names):
            row = known.get(name)
            if row is None:
                claimed.append(self._made(name, 1, sent_at))
                await tx.execute(sa.insert(leases).values(name=name, **self._values(1)))
            elif self._may_claim(row):
                epoch = row.epoch + 1
                done = await tx.execute(
                    sa.update(leases)
                    .where(leases.c.name == name, leases.c.epoch == row.epoch, leases.c.renewals == row.renewals)
                    .values(**self._values(epoch))
                )
                if done.rowcount == 1:
                    claimed.append(self._made(name, epoch, sent_at))
        return claimed

    async def _rows(self, tx: AsyncConnection, names: Iterable[str]) -> Sequence[sa.Row[Any]]:
        return (await tx.execute(sa.select(leases).where(leases.c.name.in_(sorted(names))))).all()

    def _may_claim(self, row: sa.Row[Any]) -> bool:
        """A lease of this server itself that it does not know of was claimed in a write whose answer was lost."""
        if row.owner is None or row.owner == self.owner or self.alone:
            return True
        now = self._now()
        seen = self._seen[row.name] = look(self._seen.get(row.name), row.epoch, row.renewals, row.ttl_secs, now)
        return of_observer(seen, now) is Step.CLAIM

    def _made(self, name: str, epoch: int, sent_at: float) -> Lease:
        held = Held(sent_at, self.ttl_secs)
        return Lease(name, self.owner, epoch, held, alone=self.alone, now=self._now)

    def _values(self, epoch: int) -> dict[str, Any]:
        return {
            "owner": self.owner,
            "epoch": epoch,
            # not 0: a name that was ended and begun anew has the epoch 1 again, and must not look to those who wait
            # as if it had been held all the time
            "renewals": secrets.randbelow(_RENEWALS),
            "ttl_secs": self.ttl_secs,
            "expires_at": self._expiry(),
        }

    def _expiry(self) -> int:
        """For people: nothing is decided by it."""
        return now_us() + int(self.ttl_secs * 1_000_000)

    def _drop(self, lease: Lease) -> None:
        if self._held.get(lease.name) is lease:
            del self._held[lease.name]
        self._seen.pop(lease.name, None)
