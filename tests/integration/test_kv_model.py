"""Any sequence of calls on a key-value store, by two clients of it, against a model that fits on a page."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from aether.model.errors import Compacted, LeaseGone
from aether.model.kv import KV, Change, Compare, Delete, Event, Field, Get, Is, KeyValue, Operation, Put
from support.kv import KINDS, stores

KEYS = st.sampled_from(["a", "a/1", "a/2", "b", "ä"])
PREFIXES = st.sampled_from(["", "a", "a/", "ä", "c"])
VALUES = st.binary(max_size=3)
CLIENTS = st.integers(0, 1)


class Model:
    """The whole history: every state and every event."""

    def __init__(self, revision: int) -> None:
        self.first = self.compacted = self.revision = revision
        self.states: dict[int, dict[str, KeyValue]] = {revision: {}}
        self.events: list[Event] = []
        self.leases: set[int] = set()

    @property
    def state(self) -> dict[str, KeyValue]:
        return self.states[self.revision]

    def under(self, key: str, prefix: bool, state: dict[str, KeyValue]) -> list[KeyValue]:
        found = [kv for name, kv in state.items() if name == key or (prefix and name.startswith(key))]
        return sorted(found, key=lambda kv: kv.key.encode())

    def apply(self, operations: list[Operation]) -> list[tuple[KeyValue, ...]]:
        revision, state, events = self.revision + 1, dict(self.state), list[Event]()
        results: list[tuple[KeyValue, ...]] = []
        for operation in operations:
            found = self.under(operation.key, not isinstance(operation, Put) and operation.prefix, state)
            results.append(() if isinstance(operation, Put) else tuple(found))
            if isinstance(operation, Delete):
                for kv in found:
                    del state[kv.key]
                    events.append(Event(Change.DELETE, KeyValue(kv.key, b"", 0, revision, 0)))
            elif isinstance(operation, Put):
                old = state.get(operation.key) or KeyValue(operation.key, b"", revision, revision, 0)
                new = KeyValue(
                    operation.key, operation.value, old.create_revision, revision, old.version + 1, operation.lease
                )
                state[operation.key] = new
                events.append(Event(Change.PUT, new))
        if events:
            self.revision, self.states[revision] = revision, state
            self.events += events
        return results

    def holds(self, condition: Compare) -> bool:
        kv = self.state.get(condition.key)
        if condition.field is Field.VALUE and kv is None:
            return False
        actual: Any = getattr(kv or KeyValue("", b"", 0, 0, 0), condition.field)
        return {"=": actual == condition.target, "!=": actual != condition.target,
                "<": actual < condition.target, ">": actual > condition.target}[condition.relation]  # fmt: skip


class Machine(RuleBasedStateMachine):
    kind = ""

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._run(self._open())

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)

    async def _open(self) -> None:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        made = await self._stack.enter_async_context(stores(self.kind, Path(folder)))
        self.clients = [await made.open(), await made.open()]
        self.model = Model((await self.clients[0].list("")).revision)

    def teardown(self) -> None:
        self._run(self._stack.aclose())
        self._runner.close()

    def _revision(self, share: float) -> int:
        """A revision of all there were; those that are compacted among them."""
        return self.model.first + round(share * (self.model.revision - self.model.first))

    @rule(client=CLIENTS, key=KEYS, value=VALUES, leased=st.booleans())
    def put(self, client: int, key: str, value: bytes, leased: bool) -> None:
        lease = max(self.model.leases, default=0) if leased else 0
        self.model.apply([Put(key, value, lease)])
        assert self._run(self.clients[client].put(key, value, lease=lease)) == self.model.revision

    @rule(client=CLIENTS, key=KEYS)
    def delete(self, client: int, key: str) -> None:
        (found,) = self.model.apply([Delete(key)])
        assert self._run(self.clients[client].delete(key)) is bool(found)

    @rule(client=CLIENTS, prefix=PREFIXES)
    def delete_prefix(self, client: int, prefix: str) -> None:
        (found,) = self.model.apply([Delete(prefix, prefix=True)])
        assert self._run(self.clients[client].delete_prefix(prefix)) == len(found)

    @rule(
        client=CLIENTS, key=KEYS, field=st.sampled_from(Field), relation=st.sampled_from(Is), value=VALUES,
        share=st.floats(0, 1), other=KEYS, prefix=PREFIXES,
    )  # fmt: skip
    def transact(
        self, client: int, key: str, field: Field, relation: Is, value: bytes, share: float, other: str, prefix: str
    ) -> None:
        number = {Field.VERSION: len(value)}.get(field, self._revision(share) if share > 0.1 else 0)
        condition = Compare(key, field, relation, value if field is Field.VALUE else number)
        then: list[Operation] = [Get(key), Put(key, value), Get(prefix, prefix=True)]
        otherwise: list[Operation] = [Delete(prefix, prefix=True), Get("", prefix=True), Delete(other)]
        wanted = self.model.holds(condition)
        results = self.model.apply(then if wanted else otherwise)
        done = self._run(self.clients[client].transact([condition], then, otherwise))
        assert (done.succeeded, done.revision, list(done.results)) == (wanted, self.model.revision, results)

    @rule(client=CLIENTS)
    def grant(self, client: int) -> None:
        self.model.leases.add(self._run(self.clients[client].grant(3600)))

    @precondition(lambda self: self.model.leases)
    @rule(client=CLIENTS)
    def revoke(self, client: int) -> None:
        lease = max(self.model.leases)
        keys = [kv.key for kv in self.model.under("", True, self.model.state) if kv.lease == lease]
        assert self._run(self.clients[client].lease(lease)).keys == tuple(keys)
        self._run(self.clients[client].revoke(lease))
        self.model.apply([Delete(key) for key in keys])
        self.model.leases.remove(lease)
        with pytest.raises(LeaseGone):
            self._run(self.clients[1 - client].keep_alive(lease))

    @rule(client=CLIENTS, share=st.floats(0, 1))
    def compact(self, client: int, share: float) -> None:
        revision = self._revision(share)
        if revision > self.model.compacted:
            self._run(self.clients[client].compact(revision))
            self.model.compacted = revision

    @rule(client=CLIENTS, prefix=PREFIXES, share=st.floats(0, 1), limit=st.integers(0, 2))
    def look_back(self, client: int, prefix: str, share: float, limit: int) -> None:
        revision = self._revision(share)
        look = self.clients[client].list(prefix, revision=revision, limit=limit)
        if revision < self.model.compacted:
            with pytest.raises(Compacted):
                self._run(look)
            return
        wanted = self.model.under(prefix, True, self.model.states[revision])
        found = self._run(look)
        assert list(found.items) == (wanted[:limit] if limit else wanted)
        assert found.more is (0 < limit < len(wanted))

    @rule(client=CLIENTS, prefix=PREFIXES, share=st.floats(0, 1))
    def watch(self, client: int, prefix: str, share: float) -> None:
        since = self._revision(share)
        if since < self.model.compacted:
            with pytest.raises(Compacted):
                self._run(replay(self.clients[client], prefix, since, self.model.revision))
            return
        wanted = [e for e in self.model.events if e.kv.mod_revision >= since and e.kv.key.startswith(prefix)]
        assert self._run(replay(self.clients[client], prefix, since, self.model.revision)) == wanted

    @invariant()
    def both_clients_see_the_newest_state(self) -> None:
        wanted = self.model.under("", True, self.model.state)
        for client in self.clients:
            found = self._run(client.list(""))
            assert (list(found.items), found.revision) == (wanted, self.model.revision)


async def replay(kv: KV, prefix: str, since: int, until: int) -> list[Event]:
    found: list[Event] = []
    async with asyncio.timeout(20), kv.watch(prefix, from_revision=since, progress_secs=0.001) as watch:
        while True:
            batch = await anext(watch)
            found += batch.events
            if batch.revision >= until:
                return found


@pytest.mark.parametrize("kind", KINDS)
def test_any_sequence_of_calls_does_what_the_model_does(kind: str) -> None:
    machine = type("Machine", (Machine,), {"kind": kind})
    run_state_machine_as_test(machine, settings=settings(max_examples=20, stateful_step_count=20))
