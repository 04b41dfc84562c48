"""What every key-value store does, whichever it is: the whole port, and the elections and views built on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aether.coordination.elections import Election
from aether.coordination.kept import kept_lease
from aether.coordination.views import follow
from aether.model.errors import BadRequest, Compacted, LeaseGone, PayloadTooLarge
from aether.model.kv import (
    KV,
    MAX_OPERATIONS,
    MAX_VALUE_BYTES,
    Batch,
    Change,
    Compare,
    Delete,
    Event,
    Field,
    Get,
    Is,
    KeyValue,
    Put,
    absent,
    created_at,
    present,
    unchanged,
)
from support.kv import KINDS, Stores, stores


@pytest.fixture(params=KINDS)
async def shared(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stores]:
    async with stores(request.param, tmp_path) as made:
        yield made


@pytest.fixture
async def kv(shared: Stores) -> KV:
    return await shared.open()


async def told(watch: AsyncIterator[Batch]) -> Batch:
    """The next batch that has something to tell."""
    async with asyncio.timeout(20):
        while True:
            batch = await anext(watch)
            if batch.events:
                return batch


async def events(watch: AsyncIterator[Batch], count: int) -> list[tuple[str, str, int]]:
    found: list[tuple[str, str, int]] = []
    while len(found) < count:
        found += [(event.change, event.kv.key, event.kv.mod_revision) for event in (await told(watch)).events]
    return found


async def keys(kv: KV, prefix: str = "") -> list[str]:
    return [item.key for item in (await kv.list(prefix)).items]


# --- keys and revisions


async def test_a_key_remembers_when_it_came_to_be_and_how_often_it_was_written(kv: KV) -> None:
    assert await kv.get("a") is None
    start = (await kv.list("")).revision
    first = await kv.put("a", b"one")
    second = await kv.put("a", b"two")
    assert (first, second) == (start + 1, start + 2)
    assert await kv.get("a") == KeyValue("a", b"two", first, second, 2)
    assert await kv.delete("a")
    assert not await kv.delete("a")
    assert await kv.get("a") is None
    assert (await kv.list("")).revision == second + 1, "a deletion of nothing is no change"
    again = await kv.put("a", b"")
    assert await kv.get("a") == KeyValue("a", b"", again, again, 1)


async def test_states_of_the_past_can_be_read(kv: KV) -> None:
    first = await kv.put("a", b"one")
    await kv.put("b", b"b")
    await kv.put("a", b"two")
    last = await kv.put("c", b"c")
    await kv.delete("a")
    assert await kv.get("a", revision=first) == KeyValue("a", b"one", first, first, 1)
    assert await kv.get("b", revision=first) is None
    listing = await kv.list("", revision=last)
    assert listing.revision == last
    assert [(item.key, item.value) for item in listing.items] == [("a", b"two"), ("b", b"b"), ("c", b"c")]
    with pytest.raises(BadRequest):
        await kv.get("a", revision=last + 2)
    with pytest.raises(BadRequest):
        await kv.list("", revision=last + 2)


async def test_a_listing_is_by_prefix_in_order_and_in_pages_of_one_state(kv: KV) -> None:
    for key in ("x/b", "x/a", "x", "x/ä", "x/\U0001f600", "x0", "w", "x/c"):
        await kv.put(key, key.encode())
    wanted = ["x/a", "x/b", "x/c", "x/ä", "x/\U0001f600"]
    assert await keys(kv, "x/") == wanted
    assert await keys(kv) == ["w", "x", *wanted, "x0"]
    page = await kv.list("x/", limit=2)
    assert (page.more, [item.key for item in page.items]) == (True, wanted[:2])
    await kv.delete_prefix("x/")
    rest = await kv.list("x/", after="x/b", revision=page.revision, limit=3)
    assert (rest.more, [item.key for item in rest.items]) == (False, wanted[2:])
    assert await keys(kv, "x") == ["x", "x0"]


async def test_a_prefix_is_deleted_at_one_revision(kv: KV) -> None:
    for key in ("a/1", "a/2", "b"):
        await kv.put(key, b"")
    before = (await kv.list("")).revision
    assert await kv.delete_prefix("a/") == 2
    assert await kv.delete_prefix("a/") == 0
    assert (await kv.list("")).revision == before + 1
    assert await keys(kv) == ["b"]


async def test_what_is_no_key_or_too_much_is_refused(kv: KV) -> None:
    for key in ("", "a\0b", "x" * 2000, "\ud800"):
        with pytest.raises(BadRequest):
            await kv.put(key, b"")
        with pytest.raises(BadRequest):
            await kv.get(key)
    with pytest.raises(PayloadTooLarge):
        await kv.put("a", bytes(MAX_VALUE_BYTES + 1))
    await kv.put("a", bytes(MAX_VALUE_BYTES))
    for twice in (
        [Put("a", b""), Put("a", b"")],
        [Put("a", b""), Delete("a")],
        [Delete("", prefix=True), Put("a", b"")],
        [Put(f"k{n}", b"") for n in range(MAX_OPERATIONS + 1)],
    ):
        with pytest.raises(BadRequest):
            await kv.transact([], twice)
    with pytest.raises(BadRequest):
        await kv.transact([Compare("a", Field.VALUE, Is.EQUAL, 1)])
    with pytest.raises(BadRequest):
        await kv.grant(0)
    assert await keys(kv) == ["a"]


# --- transactions


async def test_a_transaction_is_whole_and_has_one_revision(kv: KV) -> None:
    await kv.put("old", b"x")
    done = await kv.transact(
        [absent("a"), present("old")],
        [Put("a", b"1"), Delete("old"), Put("b", b"2"), Get("", prefix=True), Get("old"), Get("a")],
        [Put("never", b"")],
    )
    a = KeyValue("a", b"1", done.revision, done.revision, 1)
    b = KeyValue("b", b"2", done.revision, done.revision, 1)
    old = KeyValue("old", b"x", done.revision - 1, done.revision - 1, 1)
    assert done.succeeded
    assert done.results == ((), (old,), (), (a, b), (), (a,)), "an operation sees those before it"
    other = await kv.transact([absent("a")], [Put("a", b"9")], [Get("a")])
    assert (other.succeeded, other.revision, other.results) == (False, done.revision, ((a,),))
    assert await kv.list("") == await kv.list("", revision=done.revision)


@pytest.mark.parametrize(
    ("field", "target", "holds"),
    [
        (Field.CREATE, 2, ["=", "<"]), (Field.MOD, 0, [">", "!="]), (Field.VERSION, 2, ["="]),
        (Field.VALUE, b"b", ["="]), (Field.VALUE, b"c", ["<", "!="]), (Field.VALUE, b"", [">", "!="]),
    ],
)  # fmt: skip
async def test_conditions_compare(kv: KV, field: Field, target: int | bytes, holds: list[str]) -> None:
    created = await kv.put("a", b"a")
    await kv.put("a", b"b")
    if field is Field.CREATE:
        holds, target = ["="], created
    for relation in Is:
        found = await kv.transact([Compare("a", field, relation, target)])
        assert found.succeeded is (relation in holds), relation


async def test_of_an_absent_key_the_numbers_are_zero_and_no_comparison_of_its_value_holds(kv: KV) -> None:
    for field in (Field.CREATE, Field.MOD, Field.VERSION):
        assert (await kv.transact([Compare("a", field, Is.EQUAL, 0)])).succeeded
        assert (await kv.transact([Compare("a", field, Is.LESS, 1)])).succeeded
    for relation in Is:
        assert not (await kv.transact([Compare("a", Field.VALUE, relation, b"")])).succeeded


async def test_one_of_many_that_compare_and_swap_at_once_wins(shared: Stores) -> None:
    clients = [await shared.open() for _ in range(3)]
    await clients[0].put("a", b"")
    seen = await clients[0].get("a")
    assert seen is not None
    swaps = [clients[n % 3].transact([unchanged(seen)], [Put("a", b"%d" % n)], [Get("a")]) for n in range(30)]
    done = await asyncio.gather(*swaps)
    (winner,) = [n for n, outcome in enumerate(done) if outcome.succeeded]
    assert all(outcome.results[0][0].value == b"%d" % winner for outcome in done if not outcome.succeeded)


async def test_a_cancelled_change_is_made_whole_or_not_at_all(kv: KV) -> None:
    for n in range(20):
        change = asyncio.create_task(kv.transact([], [Put(f"x{n}", b""), Put(f"y{n}", b"")]))
        for _ in range(n % 4):
            await asyncio.sleep(0)
        change.cancel()
        await asyncio.wait((change,))
    found = await keys(kv)
    assert [key[1:] for key in found if key[0] == "x"] == [key[1:] for key in found if key[0] == "y"]


# --- leases


async def test_a_lease_that_is_revoked_takes_its_keys_with_it_at_one_revision(kv: KV) -> None:
    lease = await kv.grant(60)
    await kv.put("a", b"", lease=lease)
    await kv.transact([], [Put("b", b"", lease), Put("stays", b"")])
    await kv.put("c", b"", lease=lease)
    await kv.put("c", b"")
    assert (await kv.get("b")) == KeyValue("b", b"", *[(await kv.list("stays")).items[0].mod_revision] * 2, 1, lease)
    info = await kv.lease(lease)
    assert (info.keys, info.ttl_secs) == (("a", "b"), 60)
    assert 0 < info.remaining_secs <= 60
    async with kv.watch("") as watch:
        await kv.revoke(lease)
        batch = await told(watch)
    assert [(e.change, e.kv.key) for e in batch.events] == [(Change.DELETE, "a"), (Change.DELETE, "b")]
    assert {e.kv.mod_revision for e in batch.events} == {batch.revision}
    assert await keys(kv) == ["c", "stays"], "a key that was written without a lease has left it"


async def test_a_lease_that_nobody_keeps_alive_ends_and_one_that_is_kept_does_not(shared: Stores) -> None:
    kv, other = await shared.open(), await shared.open()
    kept, left = await kv.grant(5), await kv.grant(1)
    await kv.put("kept", b"", lease=kept)
    await kv.put("left", b"", lease=left)
    async with other.watch("") as watch, asyncio.timeout(20):
        over = asyncio.create_task(told(watch))
        while not over.done():
            assert await kv.keep_alive(kept) == 5
            await asyncio.wait((over,), timeout=0.1)
        assert [e.kv.key for e in over.result().events] == ["left"]
    await other.keep_alive(kept)
    with pytest.raises(LeaseGone):
        await other.keep_alive(left)


async def test_what_has_no_lease_any_more_is_refused_whole(kv: KV) -> None:
    lease = await kv.grant(60)
    await kv.revoke(lease)
    for asked in (kv.keep_alive(lease), kv.revoke(lease), kv.lease(lease), kv.put("a", b"", lease=lease)):
        with pytest.raises(LeaseGone):
            await asked
    with pytest.raises(LeaseGone):
        await kv.transact([], [Put("b", b""), Put("a", b"", lease)])
    assert await keys(kv) == []


# --- watches


async def test_a_watch_tells_every_change_of_its_prefix_once_in_order_to_every_client(shared: Stores) -> None:
    one, two = await shared.open(), await shared.open()
    await one.put("a/before", b"")
    async with one.watch("a/") as near, two.watch("a/") as far:
        first = await one.put("a/1", b"v")
        await two.put("b/other", b"")
        await two.put("a/2", b"")
        await one.delete("a/1")
        assert await two.delete_prefix("a/") == 2
        wanted = [
            ("put", "a/1", first), ("put", "a/2", first + 2), ("delete", "a/1", first + 3),
            ("delete", "a/2", first + 4), ("delete", "a/before", first + 4),
        ]  # fmt: skip
        assert await events(near, 5) == wanted
        assert await events(far, 5) == wanted
    async with two.watch("a/", from_revision=first) as replay:
        batch = await told(replay)
    assert batch.events[0] == Event(Change.PUT, KeyValue("a/1", b"v", first, first, 1))
    assert batch.events[2] == Event(Change.DELETE, KeyValue("a/1", b"", 0, first + 3, 0))


async def test_a_watch_that_is_resumed_after_any_batch_misses_and_doubles_nothing(kv: KV) -> None:
    start = (await kv.list("")).revision
    for n in range(12):
        await kv.transact([], [Put(f"a{n % 4}", b""), Put(f"b{n % 3}", b"")])
    found: list[Event] = []
    position = start + 1
    while len(found) < 24:
        async with kv.watch("", from_revision=position) as watch:
            batch = await told(watch)
        position = batch.revision + 1
        found += batch.events
    revisions = [event.kv.mod_revision for event in found]
    assert revisions == [start + 1 + n // 2 for n in range(24)]


async def test_changes_while_a_watch_catches_up_come_after_those_of_the_past(shared: Stores) -> None:
    kv, other = await shared.open(), await shared.open()
    start = await kv.put("n", b"0")

    async def write(client: KV, numbers: range) -> None:
        for n in numbers:
            await client.put("n", b"%d" % n)

    await write(kv, range(1, 100))
    async with kv.watch("n", from_revision=start) as watch:
        writing = asyncio.gather(write(kv, range(100)), write(other, range(100)))
        found = await events(watch, 300)
        await writing
    assert [revision for _, _, revision in found] == list(range(start, start + 300))


async def test_a_consumer_that_is_slow_gets_everything_all_the_same(kv: KV) -> None:
    big = bytes(100_000)
    async with kv.watch("") as watch:
        first = await kv.put("a", big)
        await asyncio.gather(*(kv.put("a", big) for _ in range(99)))
        found = await events(watch, 100)
        last = await kv.put("a", b"")
        assert await events(watch, 1) == [("put", "a", last)]
    assert [revision for _, _, revision in found] == list(range(first, first + 100))


async def test_a_slow_consumer_that_had_nothing_to_take_for_long_misses_nothing_to_a_compaction(kv: KV) -> None:
    async with kv.watch("quiet") as watch, kv.watch("loud") as other:
        for n in range(5):
            last = await kv.put("loud", b"%d" % n)
            await told(other)
        await kv.compact(last)
        first = last + 1
        await asyncio.gather(*(kv.put("quiet", bytes(200_000)) for _ in range(60)))
        await kv.put("loud", b"")
        await told(other)
        found = await events(watch, 60)
    assert [revision for _, _, revision in found] == list(range(first, first + 60))


async def test_a_transaction_is_never_divided_between_batches(kv: KV) -> None:
    start = (await kv.list("")).revision
    keys = 100
    for n in range(6):
        await kv.transact([], [Put(f"{key:03}", b"%d" % n) for key in range(keys)])
    await kv.delete_prefix("")
    seen: list[int] = []
    async with kv.watch("", from_revision=start + 1) as watch:
        while len(seen) < 7:
            batch = await told(watch)
            revisions = [event.kv.mod_revision for event in batch.events]
            assert all(revisions.count(revision) == keys for revision in revisions)
            assert batch.revision >= revisions[-1]
            seen += sorted(set(revisions))
    assert seen == list(range(start + 1, start + 8))


async def test_a_watch_may_begin_in_the_future(kv: KV) -> None:
    now = (await kv.list("")).revision
    async with kv.watch("", from_revision=now + 3) as watch, kv.watch("") as other:
        waiting = asyncio.create_task(events(watch, 1))
        for _ in range(3):
            await kv.put("a", b"")
            await told(other)
        assert await waiting == [("put", "a", now + 3)]


async def test_notices_of_progress_say_how_far_nothing_was_missed(kv: KV) -> None:
    async with kv.watch("quiet/", progress_secs=0.05) as watch, asyncio.timeout(20):
        last = await kv.put("loud", b"")
        while (batch := await anext(watch)).revision < last:
            assert batch.events == ()
        assert batch.events == ()
        await kv.compact(await kv.put("loud", b""))
        await kv.put("quiet/a", b"")
        assert [e.kv.key for e in (await told(watch)).events] == ["quiet/a"], "what is compacted was not missed"


async def test_closing_one_watch_leaves_the_others(kv: KV) -> None:
    async with kv.watch("a") as stays:
        async with kv.watch("a") as goes:
            waiting = asyncio.create_task(anext(goes))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait((waiting,))
        last = await kv.put("a", b"")
        assert await events(stays, 1) == [("put", "a", last)]


# --- compaction


async def test_history_before_a_compaction_is_gone_with_a_clear_error(kv: KV) -> None:
    first = await kv.put("a", b"1")
    await kv.put("b", b"1")
    kept = await kv.put("a", b"2")
    last = await kv.delete("b") and (await kv.list("")).revision
    await kv.compact(kept)
    for asked in (kv.get("a", revision=first), kv.list("", revision=kept - 1)):
        with pytest.raises(Compacted) as refused:
            await asked
        assert (refused.value.code, refused.value.revision) == ("compacted", kept)
    async with kv.watch("", from_revision=kept - 1) as watch:
        with pytest.raises(Compacted) as refused:
            await anext(watch)
        assert refused.value.revision == kept
    assert [item.key for item in (await kv.list("", revision=kept)).items] == ["a", "b"]
    async with kv.watch("", from_revision=kept) as watch:
        assert await events(watch, 2) == [("put", "a", kept), ("delete", "b", last)]
    await kv.compact(last)
    async with kv.watch("", from_revision=last) as watch:
        assert await events(watch, 1) == [("delete", "b", last)]
    with pytest.raises(Compacted):
        await kv.compact(kept)
    with pytest.raises(BadRequest):
        await kv.compact(last + 1)
    assert await keys(kv) == ["a"]


async def test_a_view_follows_changes_and_lists_anew_after_a_compaction(shared: Stores) -> None:
    kv, other = await shared.open(), await shared.open()
    await kv.put("a/1", b"")
    views = follow(kv, "a/")
    async with asyncio.timeout(20):
        view = await anext(views)
        assert (sorted(view.items), view.changed) == (["a/1"], {"a/1"})
        await other.put("a/2", b"")
        await other.put("b", b"")
        view = await anext(views)
        assert (sorted(view.items), view.changed) == (["a/1", "a/2"], {"a/2"})
        await other.delete("a/1")
        view = await anext(views)
        assert (sorted(view.items), view.changed) == (["a/2"], {"a/1"})
        assert view.revision == (await kv.list("")).revision
    await views.aclose()


# --- elections


async def test_the_oldest_candidate_leads_and_the_next_follows_when_it_resigns(shared: Stores) -> None:
    one, two = await shared.open(), await shared.open()
    async with asyncio.timeout(30), kept_lease(one, 5) as first, kept_lease(two, 5) as second:
        assert await Election(two, "e").leader() is None
        leads = await Election(one, "e").campaign(b"one", first)
        waiting = asyncio.create_task(Election(two, "e").campaign(b"two", second))
        observed = Election(two, "e").observe()
        leader = await anext(observed)
        assert leader is not None
        assert (leader.key, leader.value, leader.term) == (leads.key, b"one", leads.term)
        assert (await one.transact([leads.guard], [Put("work", b"one")])).succeeded
        assert not waiting.done()
        await leads.resign()
        follower = await waiting
        assert follower.term > leads.term
        leader = await anext(observed)
        assert leader is not None
        assert leader.value == b"two"
        assert not (await one.transact([leads.guard], [Put("work", b"late")])).succeeded, "a late leader is refused"
        await leads.resign()
        assert await Election(one, "e").leader() == leader, "who has resigned takes nothing from the next"
        await observed.aclose()


async def test_a_candidate_that_gives_up_or_loses_its_lease_is_out_of_the_election(kv: KV) -> None:
    election = Election(kv, "e")
    async with (
        asyncio.timeout(30),
        kept_lease(kv, 5) as first,
        kept_lease(kv, 5) as second,
        kept_lease(kv, 5) as third,
    ):
        leads = await election.campaign(b"1", first)
        gives_up = asyncio.create_task(election.campaign(b"2", second))
        loses = asyncio.create_task(election.campaign(b"3", third))
        while len(await keys(kv, "e/")) < 3:
            await asyncio.sleep(0.01)
        gives_up.cancel()
        await asyncio.wait((gives_up,))
        assert len(await keys(kv, "e/")) == 2
        await kv.revoke(third.id)
        with pytest.raises(LeaseGone):
            await loses
        assert await keys(kv, "e/") == [leads.key]
        assert await election.campaign(b"again", first) is not None, "asked again it leads still"
    assert await keys(kv, "e/") == []


async def test_a_lease_is_kept_until_it_is_lost(kv: KV) -> None:
    async with kept_lease(kv, 2) as lease:
        created = await kv.put("mine", b"", lease=lease.id)
        before = (await kv.lease(lease.id)).remaining_secs
        async with asyncio.timeout(20):
            while (now := (await kv.lease(lease.id)).remaining_secs) <= before:
                before = now
                await asyncio.sleep(0.05)
        assert not lease.lost.is_set()
        assert (await kv.transact([created_at("mine", created)])).succeeded
        await kv.revoke(lease.id)
        async with asyncio.timeout(20):
            await lease.lost.wait()
        assert not lease.holds
    assert await keys(kv) == []
