"""Any sequence of calls on a queue, by two clients of it, against a model that fits on a page."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from aether.model.errors import QueueFull
from aether.model.queue import Delivery, Lengths
from support.queues import KINDS, LIMITS, queues


@dataclass
class Known:
    body: bytes
    dedupe: str
    state: str
    number: int = 0
    stale: bool = False


class AnySequence(RuleBasedStateMachine):
    """Two clients and three consumers; `deliveries` are all there ever were, among them late ones."""

    kind = ""

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self.known: dict[str, Known] = {}
        self.deliveries: list[Delivery] = []
        self._run(self._open())

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)

    async def _open(self) -> None:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        made = await self._stack.enter_async_context(queues(self.kind, Path(folder)))
        self.clients = [await made.open(), await made.open()]

    def teardown(self) -> None:
        self._run(self._stack.aclose())
        self._runner.close()

    def _in(self, *states: str) -> list[str]:
        return [name for name, it in sorted(self.known.items(), key=lambda kv: int(kv[0])) if it.state in states]

    def _is_current(self, delivery: Delivery) -> bool:
        it = self.known[delivery.message.id]
        return it.state == "taken" and it.number == delivery.number

    @rule(client=st.integers(0, 1), body=st.binary(max_size=2), dedupe=st.sampled_from(["", "x", "y"]))
    def enqueue(self, client: int, body: bytes, dedupe: str) -> None:
        live = self._in("waiting", "taken")
        same = [name for name in live if dedupe and self.known[name].dedupe == dedupe]
        if not same and len(live) >= LIMITS.max_length:
            with pytest.raises(QueueFull):
                self._run(self.clients[client].enqueue("jobs", body, dedupe=dedupe))
            return
        done = self._run(self.clients[client].enqueue("jobs", body, dedupe=dedupe))
        assert done.duplicate is bool(same)
        if same:
            assert done.id == same[0]
        else:
            assert done.id not in self.known
            self.known[done.id] = Known(body, dedupe, "waiting")

    @rule(client=st.integers(0, 1), consumer=st.sampled_from("abc"), limit=st.integers(1, 3))
    def take(self, client: int, consumer: str, limit: int) -> None:
        wanted = self._in("waiting")[:limit]
        self._deliver(self._run(self.clients[client].take("jobs", consumer, limit=limit)), wanted, consumer)

    @rule(client=st.integers(0, 1), consumer=st.sampled_from("abc"), limit=st.integers(1, 3))
    def claim(self, client: int, consumer: str, limit: int) -> None:
        wanted: list[str] = []
        for name in self._in("taken"):
            it = self.known[name]
            if it.stale and len(wanted) < limit:
                if it.number >= LIMITS.max_deliveries:
                    self._die(name)
                else:
                    wanted.append(name)
        self._deliver(self._run(self.clients[client].claim_stale("jobs", consumer, limit=limit)), wanted, consumer)

    def _deliver(self, found: list[Delivery], wanted: list[str], consumer: str) -> None:
        assert [delivery.message.id for delivery in found] == wanted
        for delivery in found:
            it = self.known[delivery.message.id]
            it.state, it.number, it.stale = "taken", it.number + 1, False
            assert (delivery.message.body, delivery.number, delivery.consumer) == (it.body, it.number, consumer)
        self.deliveries += found

    def _die(self, name: str) -> None:
        self.known[name].state = "dead"
        for old in self._in("dead")[: -LIMITS.max_dead]:
            self.known[old].state = "gone"

    @precondition(lambda self: self.deliveries)
    @rule(client=st.integers(0, 1), data=st.data(), how=st.sampled_from(["acknowledge", "give_back", "bury"]))
    def settle(self, client: int, data: st.DataObject, how: str) -> None:
        delivery = data.draw(st.sampled_from(self.deliveries))
        current = self._is_current(delivery)
        queue = self.clients[client]
        match how:
            case "acknowledge":
                assert self._run(queue.acknowledge(delivery)) is current
                if current:
                    self.known[delivery.message.id].state = "gone"
            case "give_back":
                assert self._run(queue.give_back(delivery)) is current
                self.known[delivery.message.id].stale |= current
            case _:
                assert self._run(queue.bury(delivery, "why")) is current
                if current:
                    self._die(delivery.message.id)

    @precondition(lambda self: self._in("dead"))
    @rule(client=st.integers(0, 1), discards=st.booleans())
    def raise_or_forget(self, client: int, discards: bool) -> None:
        name = self._in("dead")[0]
        if discards:
            assert self._run(self.clients[client].discard("jobs", name))
            self.known[name].state = "gone"
            return
        it = self.known[name]
        live = self._in("waiting", "taken")
        same = [other for other in live if it.dedupe and self.known[other].dedupe == it.dedupe]
        if not same and len(live) >= LIMITS.max_length:
            with pytest.raises(QueueFull):
                self._run(self.clients[client].redrive("jobs", name))
            return
        done = self._run(self.clients[client].redrive("jobs", name))
        it.state = "gone"
        assert done.duplicate is bool(same)
        if not same:
            self.known[done.id] = Known(it.body, it.dedupe, "waiting")

    @invariant()
    def the_lengths_and_the_letters_are_those_of_the_model(self) -> None:
        wanted = Lengths(*(len(self._in(state)) for state in ("waiting", "taken", "dead")))
        for client in self.clients:
            assert self._run(client.lengths("jobs")) == wanted
        assert [letter.message.id for letter in self._run(self.clients[0].dead("jobs"))] == self._in("dead")


@pytest.mark.parametrize("kind", KINDS)
def test_any_sequence_of_calls_does_what_the_model_does(kind: str) -> None:
    machine = type("AnySequence", (AnySequence,), {"kind": kind})
    run_state_machine_as_test(machine, settings=settings(max_examples=12, stateful_step_count=25))
