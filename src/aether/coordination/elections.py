"""One leader among many candidates: the candidate whose key is the oldest leads until the key is gone.

The recipe is that of etcd's `concurrency` package: a candidate's key ends with its lease, so a leader that is killed
is followed by the next candidate after the time of its lease, one that resigns at once. The create revision of the
key is the leader's term. A leader's changes carry its `guard`, so that one that was overtaken unawares is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from aether.coordination.kept import KeptLease
from aether.coordination.views import follow
from aether.model.errors import LeaseGone, ServiceUnavailable
from aether.model.kv import KV, Compare, Delete, Get, KeyValue, Put, absent, created_at

_AGAIN_SECS = 0.2


@dataclass(frozen=True, slots=True)
class Leader:
    """Whom an election has chosen, and what it said of itself."""

    key: str
    value: bytes
    term: int
    """Grows from one leader to the next."""


class Leadership:
    """This process leads, as long as `lease` holds and nobody has deleted the key."""

    def __init__(self, kv: KV, key: str, term: int, lease: KeptLease) -> None:
        self._kv = kv
        self.key = key
        self.term = term
        self.lease = lease

    @property
    def guard(self) -> Compare:
        """A condition for every change that only the leader may make."""
        return created_at(self.key, self.term)

    async def resign(self) -> None:
        """Let the next candidate lead at once; nothing happens where this one leads no more.

        Raises ServiceUnavailable."""
        await self._kv.transact((self.guard,), (Delete(self.key),))


class Election:
    """`name` is the prefix of the candidates' keys, without a slash at its end."""

    def __init__(self, kv: KV, name: str) -> None:
        self._kv = kv
        self._prefix = f"{name}/"

    async def campaign(self, value: bytes, lease: KeptLease) -> Leadership:
        """Return once this candidate leads. Raises LeaseGone when it lost its lease before that.

        A candidate that is cancelled withdraws, so that the others do not wait for its lease. One lease has one place
        in an election; asked again with another value it keeps its first one.
        """
        key = f"{self._prefix}{lease.id:016x}"
        campaigning = asyncio.create_task(self._lead(key, value, lease), name=f"campaign {key}")
        lost = asyncio.create_task(lease.lost.wait(), name=f"lease of {key}")
        try:
            await asyncio.wait((campaigning, lost), return_when=asyncio.FIRST_COMPLETED)
            if campaigning.done() and campaigning.exception() is None:
                return campaigning.result()
        finally:
            for task in (campaigning, lost):
                task.cancel()
            await asyncio.wait((campaigning, lost))
            if campaigning.cancelled() or campaigning.exception() is not None:
                with suppress(ServiceUnavailable):
                    await self._kv.delete(key)
        if campaigning.cancelled():
            raise LeaseGone(f"the lease of candidate {key} was lost before it was elected")
        return campaigning.result()

    async def leader(self) -> Leader | None:
        """Who leads now. Raises ServiceUnavailable."""
        return _leader({kv.key: kv for kv in (await self._kv.list(self._prefix)).items})

    async def observe(self) -> AsyncGenerator[Leader | None]:
        """Who leads, now and after every change; while the store is away, nothing new."""
        first, before = True, None
        views = follow(self._kv, self._prefix)
        try:
            async for view in views:
                leader = _leader(view.items)
                if first or leader != before:
                    first, before = False, leader
                    yield leader
        finally:
            await views.aclose()

    async def _lead(self, key: str, value: bytes, lease: KeptLease) -> Leadership:
        term = await self._enter(key, value, lease)
        views = follow(self._kv, self._prefix)
        try:
            async for view in views:
                mine = view.items.get(key)
                if mine is None or mine.create_revision != term:
                    raise LeaseGone(f"candidate {key} is no longer in the election")
                if (leader := _leader(view.items)) is not None and leader.key == key:
                    return Leadership(self._kv, key, term, lease)
        finally:
            await views.aclose()
        raise AssertionError("a view never ends by itself")

    async def _enter(self, key: str, value: bytes, lease: KeptLease) -> int:
        """Returns the create revision of the candidate's key; safe to repeat when an answer was lost."""
        while True:
            try:
                done = await self._kv.transact((absent(key),), (Put(key, value, lease.id),), (Get(key),))
            except ServiceUnavailable:
                await asyncio.sleep(_AGAIN_SECS)
                continue
            return done.revision if done.succeeded else done.results[0][0].create_revision


def _leader(candidates: Mapping[str, KeyValue]) -> Leader | None:
    oldest = min(candidates.values(), key=lambda kv: kv.create_revision, default=None)
    return None if oldest is None else Leader(oldest.key, oldest.value, oldest.create_revision)
