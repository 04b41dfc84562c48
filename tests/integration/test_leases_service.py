"""Leases of two servers on one database, with clocks that the test moves."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from aether.leases import Lease, LeaseLost, Leases
from aether.stores.database.engine import Database
from aether.stores.database.tables import leases

TTL = 9.0


class Clock:
    def __init__(self, at: float) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


class Pair:
    """Two servers whose clocks have nothing to do with each other."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.clocks = Clock(1000.0), Clock(77_000.0)
        self.one, self.two = (
            Leases(database, name, ttl_secs=TTL, now=clock)
            for name, clock in zip(("one", "two"), self.clocks, strict=True)
        )

    def pass_time(self, secs: float) -> None:
        for clock in self.clocks:
            clock.at += secs


@pytest.fixture
def pair(database: Database) -> Pair:
    return Pair(database)


async def claimed(leases: Leases, name: str = "gc") -> Lease:
    lease = await leases.claim(name)
    assert lease is not None
    return lease


async def test_one_server_has_it_and_the_other_waits(pair: Pair) -> None:
    lease = await claimed(pair.one)
    assert lease.holds
    assert await pair.one.claim("gc") is lease
    for _ in range(5):
        assert await pair.two.claim("gc") is None
        pair.pass_time(TTL / 3)
        await pair.one.renew()
    assert lease.holds


async def test_a_server_that_stopped_renewing_is_overtaken_and_then_refused(pair: Pair) -> None:
    lease = await claimed(pair.one)
    assert await pair.two.claim("gc") is None
    pair.pass_time(TTL * 0.7)
    assert not lease.holds, "it stops before another may begin"
    assert await pair.two.claim("gc") is None
    pair.pass_time(TTL * 0.3)
    successor = await claimed(pair.two)
    assert successor.epoch == lease.epoch + 1
    with pytest.raises(LeaseLost):
        async with pair.database.write() as tx:
            await lease.confirm(tx)
    assert lease.lost
    with pytest.raises(LeaseLost):
        await lease.until_holds()
    async with pair.database.write() as tx:
        await successor.confirm(tx)


async def test_a_late_renewal_takes_nothing_back(pair: Pair) -> None:
    lease = await claimed(pair.one)
    told: list[str] = []
    lease.when_lost(lambda: told.append("lost"))
    await pair.two.claim("gc")
    pair.pass_time(TTL)
    await claimed(pair.two)
    await pair.one.renew()
    assert (lease.lost, told) == (True, ["lost"])
    assert await pair.one.claim("gc") is None


async def test_a_holder_that_was_late_but_not_overtaken_goes_on(pair: Pair) -> None:
    lease = await claimed(pair.one)
    pair.pass_time(10 * TTL)
    assert not lease.holds
    await pair.one.renew()
    assert lease.holds
    await lease.until_holds()


async def test_what_is_given_back_can_be_had_at_once(pair: Pair) -> None:
    lease = await claimed(pair.one)
    await pair.one.release("gc")
    assert lease.lost
    assert (await claimed(pair.two)).epoch == 2
    await pair.two.close()
    assert (await claimed(pair.one)).epoch == 3


async def test_a_wall_clock_that_jumps_moves_nothing(pair: Pair) -> None:
    await claimed(pair.one)
    async with pair.database.write() as tx:
        await tx.execute(sa.update(leases).values(expires_at=1))
    assert await pair.two.claim("gc") is None
    async with pair.database.write() as tx:
        await tx.execute(sa.update(leases).values(expires_at=1 << 62))
    pair.pass_time(TTL)
    assert await pair.two.claim("gc") is not None


async def test_two_that_claim_at_once_are_not_both_served(pair: Pair) -> None:
    await claimed(pair.one)
    third = Leases(pair.database, "three", ttl_secs=TTL, now=pair.clocks[1])
    assert await pair.two.claim("gc") is None
    assert await third.claim("gc") is None
    pair.pass_time(TTL)
    got = [await pair.two.claim("gc"), await third.claim("gc")]
    assert [lease is not None for lease in got] == [True, False]


async def test_alone_an_earlier_server_s_leases_are_taken_at_once_and_never_lapse(pair: Pair) -> None:
    await claimed(pair.one)
    successor = Leases(pair.database, "successor", ttl_secs=TTL, alone=True, now=pair.clocks[0])
    lease = await claimed(successor)
    pair.pass_time(100 * TTL)
    assert lease.holds, "nobody else could take over, so an outage of the database stops nothing"


async def test_a_lease_is_begun_and_ended_with_what_it_is_for(pair: Pair) -> None:
    async with pair.database.write() as tx:
        lease = await pair.one.begin_in(tx, "app/1")
    pair.one.keep(lease)
    assert pair.one.held("app/1") is lease
    assert await pair.two.claim("app/1") is None
    async with pair.database.write() as tx:
        await pair.one.end_in(tx, "app/1")
    pair.one.forget("app/1")
    assert lease.lost
    assert (await claimed(pair.two, "app/1")).epoch == 1
