"""What every queue does, whichever it is: the whole port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from aether.model.errors import BadRequest, DeliveryLost, NotFound, PayloadTooLarge, QueueFull
from aether.model.queue import MAX_BODY_BYTES, Delivery, Lengths, Queue
from support.queues import KINDS, LIMITS, Queues, queues


@pytest.fixture(params=KINDS)
async def shared(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Queues]:
    async with queues(request.param, tmp_path) as made:
        yield made


@pytest.fixture
async def queue(shared: Queues) -> Queue:
    return await shared.open()


async def took(queue: Queue, consumer: str = "one") -> Delivery:
    (delivery,) = await queue.take("jobs", consumer, wait_secs=20)
    return delivery


async def claimed(queue: Queue, consumer: str) -> Delivery:
    (delivery,) = await queue.claim_stale("jobs", consumer)
    return delivery


# --- from waiting to done


async def test_messages_are_taken_in_order_each_by_one_consumer_and_done_once(shared: Queues) -> None:
    one, two = await shared.open(), await shared.open()
    ids = [(await one.enqueue("jobs", b"%d" % n)).id for n in range(5)]
    await one.enqueue("other", b"x")
    assert len(set(ids)) == 5
    first = await took(one)
    rest = [*await two.take("jobs", "two", limit=3), *await one.take("jobs", "one", limit=3)]
    assert await two.take("jobs", "two") == []
    assert [d.message.id for d in (first, *rest)] == ids
    assert (first.message.body, first.message.topic, first.number, first.consumer) == (b"0", "jobs", 1, "one")
    assert await one.lengths("jobs") == Lengths(waiting=0, taken=5, dead=0)
    for delivery in (first, *rest):
        assert await two.acknowledge(delivery)
        assert not await two.acknowledge(delivery), "it is done already"
    assert await two.lengths("jobs") == Lengths(0, 0, 0)
    assert await two.lengths("other") == Lengths(1, 0, 0)


async def test_whoever_waits_is_woken_by_a_message_of_another_client(shared: Queues) -> None:
    one, two = await shared.open(), await shared.open()
    waiting = [asyncio.create_task(took(one, f"c{n}")) for n in range(3)]
    await asyncio.sleep(0)
    for n in range(3):
        await two.enqueue("jobs", b"%d" % n)
    done = await asyncio.gather(*waiting)
    assert sorted(delivery.message.body for delivery in done) == [b"0", b"1", b"2"]
    assert (await two.lengths("jobs")).taken == 3


async def test_waiting_ends_with_nothing_when_nothing_comes(queue: Queue) -> None:
    async with asyncio.timeout(20):
        waiting = [queue.take("jobs", f"c{n}", wait_secs=0.05) for n in range(3)]
        assert await asyncio.gather(*waiting, queue.take("jobs", "c")) == [[], [], [], []]


async def test_a_take_that_is_cancelled_takes_nothing_with_it(queue: Queue) -> None:
    for n in range(8):
        await queue.enqueue("jobs", b"%d" % n)
        taking = asyncio.create_task(queue.take("jobs", "gone"))
        for _ in range(n):
            await asyncio.sleep(0)
        taking.cancel()
        await asyncio.wait((taking,))
        if not taking.cancelled():
            continue
        async with asyncio.timeout(20):
            delivery = await took(queue)
            while delivery.message.body != b"%d" % n:
                delivery = await took(queue)
        assert delivery.number == 1
        assert await queue.acknowledge(delivery)


# --- keys, bounds


async def test_a_dedupe_key_admits_one_message_until_that_is_done(shared: Queues) -> None:
    one, two = await shared.open(), await shared.open()
    first = await one.enqueue("jobs", b"a", dedupe="f1")
    assert not first.duplicate
    assert await two.enqueue("jobs", b"b", dedupe="f1") == (first.id, True)
    assert not (await two.enqueue("jobs", b"c", dedupe="f2")).duplicate
    assert not (await two.enqueue("others", b"c", dedupe="f1")).duplicate
    delivery = await took(one)
    assert (delivery.message.body, delivery.message.dedupe) == (b"a", "f1")
    assert (await two.enqueue("jobs", b"b", dedupe="f1")).duplicate, "while it is taken, too"
    await one.acknowledge(delivery)
    assert not (await two.enqueue("jobs", b"b", dedupe="f1")).duplicate
    assert [(await took(two)).message.body for _ in range(2)] == [b"c", b"b"]


async def test_of_many_that_enqueue_one_key_at_once_one_does(shared: Queues) -> None:
    clients = [await shared.open(), await shared.open()]
    done = await asyncio.gather(*(clients[n % 2].enqueue("jobs", b"", dedupe="key") for n in range(20)))
    assert sum(not enqueued.duplicate for enqueued in done) == 1
    assert len({enqueued.id for enqueued in done}) == 1


async def test_a_full_queue_says_so_and_takes_more_when_something_is_done(queue: Queue) -> None:
    for n in range(LIMITS.max_length):
        await queue.enqueue("jobs", b"", dedupe=f"{n}")
    with pytest.raises(QueueFull) as refused:
        await queue.enqueue("jobs", b"")
    assert (refused.value.code, refused.value.status) == ("queue_full", 503)
    delivery = await took(queue)
    with pytest.raises(QueueFull):
        await queue.enqueue("jobs", b"")
    assert (await queue.enqueue("jobs", b"", dedupe="0")).duplicate, "what is there already needs no room"
    await queue.enqueue("others", b"")
    await queue.acknowledge(delivery)
    await queue.enqueue("jobs", b"")


async def test_what_cannot_be_enqueued_or_asked_is_refused(queue: Queue) -> None:
    with pytest.raises(PayloadTooLarge):
        await queue.enqueue("jobs", bytes(MAX_BODY_BYTES + 1))
    await queue.enqueue("jobs", bytes(MAX_BODY_BYTES))
    for wrong in ("", "a\nb", "x" * 201):
        with pytest.raises(BadRequest):
            await queue.enqueue(wrong, b"")
        with pytest.raises(BadRequest):
            await queue.take("jobs", wrong)
        with pytest.raises(BadRequest):
            await queue.redrive("jobs", wrong)
    with pytest.raises(BadRequest):
        await queue.take("jobs", "one", limit=0)


# --- leases of deliveries


async def test_a_delivery_is_its_consumer_s_until_its_time_is_over(shared: Queues) -> None:
    queue, other = await shared.open(), await shared.open()
    await queue.enqueue("jobs", b"a")
    first = await took(queue, "one")
    assert await other.claim_stale("jobs", "two") == []
    assert await queue.give_back(first)
    second = await claimed(other, "two")
    assert (second.message, second.consumer, second.number) == (first.message, "two", 2)
    with pytest.raises(DeliveryLost):
        await queue.extend(first)
    assert not await queue.acknowledge(first)
    assert not await queue.give_back(first)
    assert not await queue.bury(first, "late")
    await other.extend(second)
    assert await queue.claim_stale("jobs", "one") == []
    assert await other.acknowledge(second)
    with pytest.raises(DeliveryLost):
        await other.extend(second)


async def test_time_alone_makes_a_delivery_stale_and_extending_begins_it_anew(shared: Queues) -> None:
    queue = await shared.open(replace(LIMITS, visibility_secs=0.3))
    await queue.enqueue("jobs", b"a")
    first = await took(queue)
    async with asyncio.timeout(30):
        while not (found := await queue.claim_stale("jobs", "two")):
            await asyncio.sleep(0.02)
    assert (found[0].number, found[0].message) == (2, first.message)
    patient = await shared.open()
    await patient.extend(found[0])
    await asyncio.sleep(0.4)
    assert await patient.claim_stale("jobs", "three") == [], "a longer time was begun"


async def test_an_overtaken_consumer_of_the_same_name_is_told_from_its_successor(queue: Queue) -> None:
    await queue.enqueue("jobs", b"a")
    first = await took(queue, "worker")
    await queue.give_back(first)
    second = await claimed(queue, "worker")
    assert not await queue.acknowledge(first)
    assert await queue.acknowledge(second)


async def test_a_consumer_that_is_known_to_be_dead_forfeits_what_it_has_at_once(queue: Queue) -> None:
    for n in range(4):
        await queue.enqueue("jobs", b"%d" % n)
    await queue.take("jobs", "dead", limit=3)
    await took(queue, "alive")
    assert await queue.forfeit("jobs", "dead") == 3
    assert await queue.forfeit("jobs", "nobody") == 0
    found = [*await queue.claim_stale("jobs", "alive", limit=2), *await queue.claim_stale("jobs", "alive", limit=2)]
    assert [(delivery.message.body, delivery.number) for delivery in found] == [(b"0", 2), (b"1", 2), (b"2", 2)]
    assert await queue.claim_stale("jobs", "alive") == []


async def test_of_many_that_claim_at_once_one_gets_it(shared: Queues) -> None:
    clients = [await shared.open(), await shared.open()]
    await clients[0].enqueue("jobs", b"a")
    await clients[0].give_back(await took(clients[0]))
    done = await asyncio.gather(*(clients[n % 2].claim_stale("jobs", f"c{n}") for n in range(10)))
    assert sum(len(found) for found in done) == 1


# --- dead letters


async def test_after_so_many_deliveries_a_message_is_a_dead_letter_with_a_reason(queue: Queue) -> None:
    enqueued = await queue.enqueue("jobs", b"a", dedupe="key")
    await queue.enqueue("jobs", b"b")
    delivery = await took(queue)
    for number in range(2, LIMITS.max_deliveries + 1):
        await queue.give_back(delivery)
        delivery = await claimed(queue, f"c{number}")
        assert delivery.number == number
    await queue.give_back(delivery)
    await queue.give_back(await took(queue))
    assert (await claimed(queue, "last")).message.body == b"b", "what is dead does not take the place of what lives"
    (letter,) = await queue.dead("jobs")
    assert letter.message == delivery.message
    assert letter.message.id == enqueued.id
    assert (letter.deliveries, letter.consumer) == (3, "c3")
    assert "3 times" in letter.reason
    assert await queue.lengths("jobs") == Lengths(waiting=0, taken=1, dead=1)
    assert not await queue.acknowledge(delivery)
    assert not (await queue.enqueue("jobs", b"c", dedupe="key")).duplicate, "the key of a dead letter is free"


async def test_what_can_never_succeed_is_buried_and_what_is_dead_can_be_redriven_or_discarded(queue: Queue) -> None:
    for n in range(2):
        await queue.enqueue("jobs", b"%d" % n, dedupe=f"{n}")
    first, second = await took(queue), await took(queue)
    assert await queue.bury(first, "no such function")
    assert await queue.bury(second, "broken " * 1000)
    assert not await queue.bury(first, "again")
    letters = await queue.dead("jobs")
    assert [letter.message.body for letter in letters] == [b"0", b"1"]
    assert letters[0].reason == "no such function"
    assert len(letters[1].reason) <= 2000
    assert await queue.dead("jobs", limit=1) == letters[:1]
    assert await queue.dead("jobs", after=letters[0].message.id) == letters[1:]
    again = await queue.redrive("jobs", letters[0].message.id)
    assert not again.duplicate
    assert again.id != letters[0].message.id
    delivery = await took(queue)
    assert (delivery.message.id, delivery.message.body, delivery.message.dedupe) == (again.id, b"0", "0")
    assert delivery.number == 1
    live = await queue.enqueue("jobs", b"x", dedupe="1")
    assert await queue.redrive("jobs", letters[1].message.id) == (live.id, True)
    assert await queue.dead("jobs") == []
    with pytest.raises(NotFound):
        await queue.redrive("jobs", letters[0].message.id)
    await queue.bury(delivery, "once more")
    assert not await queue.discard("others", again.id)
    assert await queue.discard("jobs", again.id)
    assert not await queue.discard("jobs", again.id)


async def test_a_letter_stays_when_there_is_no_room_to_redrive_it(queue: Queue) -> None:
    await queue.enqueue("jobs", b"a")
    await queue.bury(await took(queue), "why")
    for _ in range(LIMITS.max_length):
        await queue.enqueue("jobs", b"")
    (letter,) = await queue.dead("jobs")
    with pytest.raises(QueueFull):
        await queue.redrive("jobs", letter.message.id)
    assert await queue.dead("jobs") == [letter]


async def test_the_oldest_letters_make_room_for_new_ones(queue: Queue) -> None:
    for n in range(LIMITS.max_dead + 2):
        await queue.enqueue("jobs", b"%d" % n)
        await queue.bury(await took(queue), "why")
    assert [letter.message.body for letter in await queue.dead("jobs")] == [b"2", b"3", b"4"]
