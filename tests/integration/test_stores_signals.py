"""Servers on one PostgreSQL that tell each other of changes: at once, over restarts, and never themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from aether.apps.deployments import Author, DeployRequest
from aether.identity.roles import DEFAULT_TEAM
from aether.stores.database.postgresql import Address
from aether.stores.database.signals import Signals
from support.databases import Databases, LocalServer, opened
from support.plane import DIGEST, plane


class Ear:
    """One server: what it has heard, in order."""

    def __init__(self, url: str) -> None:
        self.heard: list[str | None] = []
        self._came = asyncio.Event()
        self.signals = Signals(Address(url), self._hear)

    def _hear(self, topics: Sequence[str] | None) -> None:
        self.heard += [None] if topics is None else topics
        self._came.set()

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not what():
                self._came.clear()
                await self._came.wait()


@pytest.fixture
async def pair(postgresql: Databases) -> AsyncIterator[tuple[Ear, Ear]]:
    url = postgresql.fresh()
    ears = Ear(url), Ear(url)
    for ear in ears:
        ear.signals.start()
    for ear in ears:
        await ear.until(lambda ear=ear: ear.heard == [None])
    yield ears
    for ear in ears:
        await ear.signals.close()
    postgresql.drop(url)


async def test_others_hear_and_the_teller_does_not(pair: tuple[Ear, Ear]) -> None:
    one, two = pair
    one.signals.tell(["a", "b"])
    await two.until(lambda: two.heard[1:] == ["a", "b"])
    two.signals.tell(["c"])
    await one.until(lambda: one.heard[1:] == ["c"])
    assert one.heard == [None, "c"]


async def test_many_at_once_all_arrive_in_order(pair: tuple[Ear, Ear]) -> None:
    one, two = pair
    topics = [f"{n:036d}" for n in range(1000)]
    for topic in topics:
        one.signals.tell([topic, topic])
    await two.until(lambda: len(two.heard) == 1001)
    assert two.heard[1:] == topics


async def test_what_is_told_while_the_server_is_away_arrives_when_it_is_back(own_postgresql: LocalServer) -> None:
    one, two = Ear(own_postgresql.url), Ear(own_postgresql.url)
    for ear in (one, two):
        ear.signals.start()
        await ear.until(lambda ear=ear: ear.heard == [None])
    await asyncio.to_thread(own_postgresql.stop)
    one.signals.tell(["meanwhile"])
    await asyncio.to_thread(own_postgresql.start)
    # whoever was away is told that anything may have changed, whether or not the topic comes after that
    for ear in (one, two):
        await ear.until(lambda ear=ear: ear.heard.count(None) == 2)
    one.signals.tell(["after"])
    await two.until(lambda: "after" in two.heard)
    for ear in (one, two):
        await ear.signals.close()


async def test_an_owner_hears_at_once_what_was_recorded_at_another_server(
    postgresql: Databases, tmp_path: Path
) -> None:
    """With leases so long that nobody looks by himself in the time of the test."""
    url = postgresql.fresh()
    async with opened(url) as database:
        owner, other = plane(tmp_path, database), plane(tmp_path, database, "two")
        sides = [Signals(Address(url), server.broadcast.heard) for server in (owner, other)]
        looked = asyncio.Event()

        async def look() -> None:
            looked.set()

        owner.engine._look_again = look  # type: ignore[method-assign]
        owner.broadcast.overhear(owner.engine.overheard)
        view = await owner.catalogue.create("it", DEFAULT_TEAM)
        await owner.add_artifact("it")
        owner.engine._runners[view.id] = cast(Any, "of this server")
        for server, signals in zip((owner, other), sides, strict=True):
            server.leases.ttl_secs = 3600.0
            server.broadcast.relay = signals.tell
            signals.start()
        stop = asyncio.Event()
        watching = asyncio.create_task(owner.engine.watch(stop))
        try:
            async with asyncio.timeout(20):
                await looked.wait()  # after it connected
                with owner.broadcast.subscribe(view.id) as following:
                    looked.clear()
                    request = DeployRequest(app="it", digest=DIGEST, command="node server.js")
                    await other.deployments.create(request, Author("ann"))
                    await looked.wait()
                    await following.wait()
        finally:
            stop.set()
            owner.engine._runners.clear()
            await watching
            for signals in sides:
                await signals.close()
    postgresql.drop(url)
