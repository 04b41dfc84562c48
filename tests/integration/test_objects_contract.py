"""What every object store does, whichever it is: the whole port, on a directory and on real S3 servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from aether.model.errors import BadRequest, NotFound
from aether.model.objects import MAX_PARTS, MIN_PART_BYTES, Part
from support.served import digest_of, random_bytes
from support.stores import KINDS, Bench, bench, credentials, stream

KEY = "pending/one"
FINAL = "artifacts/shop/0123/app.tar.gz"


@pytest.fixture(params=KINDS)
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bench]:
    credentials(request.param, monkeypatch)
    async with bench(request.param, tmp_path) as made:
        yield made


# --- from pending to final


async def test_an_object_goes_from_pending_to_final(store: Bench) -> None:
    data = random_bytes(3_000_000)
    await store.put(KEY, data)
    assert await store.objects.size(KEY) == len(data)
    claimed = await store.objects.claim(KEY)
    assert claimed.split("/")[:2] == ["claimed", "one"]
    assert await store.objects.claim(KEY) == claimed
    assert await store.keys("pending/") == []
    assert await store.objects.sha256(claimed) == (digest_of(data), len(data))
    await store.objects.move(claimed, FINAL)
    await store.objects.move(claimed, FINAL)
    assert await store.keys() == [FINAL]
    assert await store.content(FINAL) == data
    signed = await store.objects.sign_get(FINAL, 60, 'shop "é".tar.gz')
    answer = await store.send(signed)
    assert (answer.status, answer.body) == (200, data)
    assert answer.headers["Content-Type"] == "application/gzip"
    assert answer.headers["Content-Disposition"] == 'attachment; filename="shop ___.tar.gz"'
    await store.objects.delete(FINAL)
    await store.objects.delete(FINAL)
    assert await store.keys() == []


async def test_reading_begins_where_it_is_told_and_comes_in_even_blocks(store: Bench) -> None:
    data = random_bytes(2_500_000)
    await store.put(KEY, data)
    blocks = [block async for block in store.objects.read(KEY, 1_000_000)]
    assert [len(block) for block in blocks] == [1_000_000, 1_000_000, 500_000]
    assert b"".join(blocks) == data
    assert b"".join([block async for block in store.objects.read(KEY, 1 << 20, 2_400_000)]) == data[2_400_000:]


async def test_what_is_missing_is_not_found(store: Bench) -> None:
    objects = store.objects
    for asked in (objects.size(KEY), objects.sha256(KEY), objects.kept_sha256(KEY), objects.claim(KEY)):
        with pytest.raises(NotFound):
            await asked
    with pytest.raises(NotFound):
        await store.content(KEY)
    with pytest.raises(NotFound):
        await objects.move("claimed/one", FINAL)
    assert (await store.send(await objects.sign_get(FINAL, 60, "x"))).status == 404
    with pytest.raises(BadRequest):
        await objects.claim(FINAL)


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a\0b", "a b", ".parts/x"])
async def test_what_is_no_key_is_refused(store: Bench, key: str) -> None:
    with pytest.raises(BadRequest):
        await store.objects.size(key)
    with pytest.raises(BadRequest):
        await store.objects.sign_put(key, 1, 60)
    with pytest.raises(BadRequest):
        await store.objects.put(key, stream(b"x"))


async def test_listing_is_by_prefix_and_tells_size_and_time(store: Bench) -> None:
    for number in range(5):
        await store.objects.put(f"artifacts/shop/d{number}/sbom.json", stream(b"x" * number), number)
    await store.objects.put("artifacts/shop2/d/sbom.json", stream(b"x"))
    found = [entry async for entry in store.objects.list("artifacts/shop/")]
    assert [(key, size) for key, size, _ in found] == [(f"artifacts/shop/d{n}/sbom.json", n) for n in range(5)]
    assert max(at for _, _, at in found) - min(at for _, _, at in found) < 60
    assert len(await store.keys("artifacts/shop")) == 6
    assert await store.keys("artifacts/none/") == []


# --- what a client may do with a URL


async def test_a_url_takes_exactly_the_bytes_it_was_signed_for(store: Bench) -> None:
    signed = await store.objects.sign_put(KEY, 5, 60)
    for wrong in (b"1234", b"123456", b""):
        assert 400 <= (await store.send(signed, wrong)).status < 500
    assert await store.keys() == []
    assert (await store.send(signed, b"12345")).status == 200
    assert (await store.send(signed, b"54321")).status == 200
    assert await store.content(KEY) == b"54321"


async def test_a_url_that_was_altered_is_refused(store: Bench) -> None:
    await store.put("pending/other", b"other")
    signed = await store.objects.sign_put(KEY, 5, 60)
    query = parse_qs(urlsplit(signed.url).query)
    expiry = "X-Amz-Expires" if "X-Amz-Expires" in query else "expires"
    for altered in (
        signed.url.replace("pending/one", "pending/two"),
        signed.url.replace("pending/one", FINAL),
        signed.url.replace(f"{expiry}={query[expiry][0]}", f"{expiry}={int(query[expiry][0]) + 1}"),
        signed.url[:-1] + ("0" if signed.url[-1] != "0" else "1"),
        signed.url.partition("?")[0],
    ):
        assert altered != signed.url
        assert (await store.send(signed, b"12345", url=altered)).status == 403
    reading = await store.objects.sign_get("pending/other", 60, "x")
    assert (await store.send(signed, b"12345", url=reading.url)).status == 403
    assert await store.keys() == ["pending/other"]
    assert (await store.send(reading, url=reading.url.replace("pending/other", "pending/one"))).status == 403


async def test_a_url_expires(store: Bench) -> None:
    signed = await store.objects.sign_put(KEY, 5, 1)
    upload = await store.objects.begin_multipart(KEY)
    part = await store.objects.sign_part(KEY, upload, 1, 5, 1)
    await asyncio.sleep(2.2)  # a URL's life is in whole seconds on a clock that the test cannot move
    for late in (signed, part):
        assert (await store.send(late, b"12345")).status == 403
    assert await store.keys() == []
    assert await store.objects.parts(KEY, upload) == []


async def test_bytes_that_are_not_the_announced_ones(store: Bench) -> None:
    right, wrong = random_bytes(1000), random_bytes(1000)
    signed = await store.objects.sign_put(KEY, 1000, 60, sha256=digest_of(right))
    if not signed.headers:
        assert (await store.send(signed, wrong)).status == 200, "the registry hashes it and refuses it then"
        assert await store.objects.kept_sha256(KEY) is None
        store.lacks("refusing wrong bytes already at the PUT (checksums)")
    assert 400 <= (await store.send(signed, wrong)).status < 500
    assert (await store.send(signed, right, headers={})).status == 403, "the header is part of the signature"
    assert await store.keys() == []
    assert (await store.send(signed, right)).status == 200
    assert await store.objects.kept_sha256(KEY) == digest_of(right)
    claimed = await store.objects.claim(KEY)
    assert await store.objects.kept_sha256(claimed) == digest_of(right)
    await store.objects.move(claimed, FINAL)
    assert await store.objects.kept_sha256(FINAL) == digest_of(right)


async def test_a_live_url_never_reaches_what_was_claimed(store: Bench) -> None:
    data, other = random_bytes(200_000), random_bytes(200_000)
    signed = await store.objects.sign_put(KEY, len(data), 60)

    async def replace() -> None:
        assert (await store.send(signed, other)).status == 200

    assert (await store.send(signed, data)).status == 200
    claimed = await store.objects.claim(KEY)
    await replace()
    assert await store.objects.sha256(claimed) == (digest_of(data), len(data))
    assert await store.objects.claim(KEY) == claimed
    await replace()
    await store.objects.move(claimed, FINAL)
    await replace()
    assert await store.content(FINAL) == data
    late = await store.objects.claim(KEY)
    assert (await store.objects.sha256(late))[0] == digest_of(other), "it is another claim, to be judged by itself"
    assert await store.content(FINAL) == data


async def test_a_live_url_used_all_the_time_mixes_nothing(store: Bench) -> None:
    """Whatever a claim catches is one whole upload, and what was hashed is what becomes final."""
    candidates = [bytes([number]) * 300_000 for number in range(4)]
    signed = await store.objects.sign_put(KEY, 300_000, 60)
    done = asyncio.Event()

    async def writer(data: bytes) -> None:
        while not done.is_set():
            assert (await store.send(signed, data)).status == 200

    writers = [asyncio.create_task(writer(data)) for data in candidates]
    digests = {digest_of(data) for data in candidates}
    try:
        for number in range(5):
            while await store.keys("pending/") == []:
                await asyncio.sleep(0.01)
            claimed = await store.objects.claim(KEY)
            digest, _ = await store.objects.sha256(claimed)
            assert digest in digests
            await store.objects.move(claimed, f"artifacts/shop/{number}/app.tar.gz")
            assert digest_of(await store.content(f"artifacts/shop/{number}/app.tar.gz")) == digest
    finally:
        done.set()
        await asyncio.gather(*writers)


# --- several at once


async def test_several_claims_and_moves_at_once_come_to_one_object(store: Bench) -> None:
    for number in range(3):
        key, final, data = f"pending/u{number}", f"artifacts/shop/d{number}/app.tar.gz", random_bytes(400_000)
        await store.put(key, data)

        async def complete(key: str = key, final: str = final, data: bytes = data) -> None:
            try:
                claimed = await store.objects.claim(key)
                assert (await store.objects.sha256(claimed))[0] == digest_of(data)
                await store.objects.move(claimed, final)
            except NotFound:
                # The others were faster at every step: then it is there.
                assert await store.objects.size(final) == len(data)

        await asyncio.gather(*(complete() for _ in range(4)))
        assert await store.content(final) == data
    assert await store.keys("pending/") == []


async def test_moves_to_one_place_at_once(store: Bench) -> None:
    data = random_bytes(100_000)
    sources: list[str] = []
    for number in range(4):
        await store.put(f"pending/u{number}", data)
        sources.append(await store.objects.claim(f"pending/u{number}"))
    await asyncio.gather(*(store.objects.move(source, FINAL) for source in [*sources, *sources]))
    assert await store.keys() == [FINAL]
    assert await store.content(FINAL) == data


# --- in parts


async def put_parts(store: Bench, upload: str, *sizes: int) -> tuple[list[tuple[int, str]], bytes]:
    data = [random_bytes(size) for size in sizes]
    order = [*range(len(sizes), 0, -1)]
    etags = {number: await store.put_part(KEY, upload, number, data[number - 1]) for number in order}
    return sorted(etags.items()), b"".join(data)


async def test_parts_in_any_order_become_one_object(store: Bench) -> None:
    upload = await store.objects.begin_multipart(KEY)
    parts, data = await put_parts(store, upload, MIN_PART_BYTES, MIN_PART_BYTES + 1, 10)
    found = await store.objects.parts(KEY, upload)
    assert [(part.number, part.size_bytes) for part in found] == [
        (1, MIN_PART_BYTES),
        (2, MIN_PART_BYTES + 1),
        (3, 10),
    ]
    assert [(part.number, f'"{part.etag}"') for part in found] == parts
    assert [(key, name) async for key, name, _ in store.objects.multipart_uploads(KEY)] == [(KEY, upload)]
    assert await store.keys() == []
    await store.objects.finish_multipart(KEY, upload, parts)
    await store.objects.finish_multipart(KEY, upload, [(part.number, part.etag) for part in found])
    assert await store.objects.sha256(KEY) == (digest_of(data), len(data))
    with pytest.raises(NotFound):
        await store.objects.parts(KEY, upload)
    late = await store.objects.sign_part(KEY, upload, 1, 5, 60)
    assert (await store.send(late, b"12345")).status == 404
    assert [found async for found in store.objects.multipart_uploads("pending/")] == []
    claimed = await store.objects.claim(KEY)
    await store.objects.finish_multipart(KEY, upload, parts)
    assert await store.objects.sha256(claimed) == (digest_of(data), len(data))


async def test_a_part_sent_again_is_the_same_or_replaces_it(store: Bench) -> None:
    old, new = random_bytes(1000), random_bytes(1000)
    upload = await store.objects.begin_multipart(KEY)
    first = await store.put_part(KEY, upload, 1, old)
    assert await store.put_part(KEY, upload, 1, old) == first
    second = await store.put_part(KEY, upload, 1, new)
    assert second != first
    assert await store.objects.parts(KEY, upload) == [Part(1, 1000, second.strip('"'))]
    with pytest.raises(BadRequest):
        await store.objects.finish_multipart(KEY, upload, [(1, first)])
    await store.objects.finish_multipart(KEY, upload, [(1, second)])
    assert await store.content(KEY) == new


async def test_finishing_with_wrong_parts_is_refused_and_can_be_put_right(store: Bench) -> None:
    upload = await store.objects.begin_multipart(KEY)
    parts, data = await put_parts(store, upload, MIN_PART_BYTES, MIN_PART_BYTES, 10)
    (_, one), (_, two), (_, three) = parts
    for wrong in (
        [],
        [(1, one), (3, three), (2, two)],
        [(1, one), (1, one), (2, two), (3, three)],
        [(0, one), (1, one)],
        [(1, one), (2, one), (3, three)],
        [(1, one), (2, two), (3, three), (4, three)],
        [(1, one), (2, two), (3, three), (MAX_PARTS + 1, three)],
    ):
        with pytest.raises(BadRequest):
            await store.objects.finish_multipart(KEY, upload, wrong)
    assert await store.keys() == []
    await store.objects.finish_multipart(KEY, upload, parts)
    assert await store.content(KEY) == data


async def test_only_the_last_part_may_be_small(store: Bench) -> None:
    upload = await store.objects.begin_multipart(KEY)
    parts, _ = await put_parts(store, upload, MIN_PART_BYTES - 1, 10)
    with pytest.raises(BadRequest, match=r"part 1 is too small|EntityTooSmall"):
        await store.objects.finish_multipart(KEY, upload, parts)
    assert len(await store.objects.parts(KEY, upload)) == 2


async def test_fewer_parts_than_have_arrived(store: Bench) -> None:
    upload = await store.objects.begin_multipart(KEY)
    parts, data = await put_parts(store, upload, 1000, 10)
    try:
        await store.objects.finish_multipart(KEY, upload, parts[:1])
    except BadRequest:
        store.lacks("finishing with fewer parts than have arrived")
    assert await store.content(KEY) == data[:1000]


async def test_a_url_of_a_part_is_for_that_part_and_size(store: Bench) -> None:
    upload = await store.objects.begin_multipart(KEY)
    other = await store.objects.begin_multipart(KEY)
    signed = await store.objects.sign_part(KEY, upload, 1, 5, 60)
    name = "partNumber" if "partNumber" in signed.url else "part"
    for altered in (
        signed.url.replace(f"{name}=1", f"{name}=2"),
        signed.url.replace(upload, other),
        signed.url.replace("pending/one", "pending/two"),
        signed.url.replace("pending/one", FINAL),
    ):
        assert altered != signed.url
        assert (await store.send(signed, b"12345", url=altered)).status == 403
    for wrong in (b"1234", b"123456"):
        assert 400 <= (await store.send(signed, wrong)).status < 500
    assert await store.objects.parts(KEY, upload) == []
    for number in (0, MAX_PARTS + 1):
        with pytest.raises(BadRequest):
            await store.objects.sign_part(KEY, upload, number, 5, 60)


async def test_aborting_leaves_nothing_and_may_be_repeated(store: Bench) -> None:
    upload = await store.objects.begin_multipart(KEY)
    etag = await store.put_part(KEY, upload, 1, b"12345")
    await store.objects.abort_multipart(KEY, upload)
    await store.objects.abort_multipart(KEY, upload)
    await store.objects.abort_multipart(KEY, "00000000-0000-7000-8000-000000000000")
    assert [found async for found in store.objects.multipart_uploads(KEY)] == []
    with pytest.raises(NotFound):
        await store.objects.finish_multipart(KEY, upload, [(1, etag)])
    assert (await store.send(await store.objects.sign_part(KEY, upload, 1, 5, 60), b"12345")).status == 404
    assert await store.keys() == []


async def test_several_finish_at_once(store: Bench) -> None:
    upload = await store.objects.begin_multipart(KEY)
    parts, data = await put_parts(store, upload, MIN_PART_BYTES, 10)
    ended = await asyncio.gather(
        *(store.objects.finish_multipart(KEY, upload, parts) for _ in range(4)), return_exceptions=True
    )
    assert None in ended
    await store.objects.finish_multipart(KEY, upload, parts)
    assert await store.content(KEY) == data


async def test_uploads_in_parts_are_listed_by_prefix(store: Bench) -> None:
    begun = {key: await store.objects.begin_multipart(key) for key in ("pending/a", "pending/b")}
    assert {key: name async for key, name, _ in store.objects.multipart_uploads("pending/a")} == {
        "pending/a": begun["pending/a"]
    }
    found = {key: name async for key, name, _ in store.objects.multipart_uploads("pending/")}
    if found != begun:
        store.lacks("listing uploads in parts by prefix")
    assert {key: name async for key, name, _ in store.objects.multipart_uploads("")} == begun


# --- what the server itself writes


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("size", [0, 1, 5_000_000, 20_000_000])
async def test_the_server_writes_whole_objects(store: Bench, size: int, known: bool) -> None:
    data = random_bytes(size)
    blocks = [data[at : at + 700_000] for at in range(0, size, 700_000)]
    await store.objects.put(FINAL, stream(b"before"))
    await store.objects.put(FINAL, stream(*blocks), size if known else None)
    assert await store.objects.sha256(FINAL) == (digest_of(data), size)


@pytest.mark.parametrize("block", [100, 500_000])
async def test_a_body_of_another_size_leaves_what_was_there(store: Bench, block: int) -> None:
    await store.objects.put(KEY, stream(b"before"))
    for announced in (block * 5 + 1, block * 5 - 1):
        with pytest.raises(BadRequest):
            await store.objects.put(KEY, stream(*[bytes(block)] * 5), announced)
    assert await store.keys() == [KEY]
    if block > 1000 and await store.content(KEY) != b"before":
        store.lacks("dropping a PUT whose connection breaks off")
    assert await store.content(KEY) == b"before"


@pytest.mark.parametrize("known", [True, False])
async def test_a_body_that_fails_leaves_nothing(store: Bench, known: bool) -> None:
    class Broken(Exception):
        pass

    async def breaks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield bytes(1_000_000)
        raise Broken

    with pytest.raises(Broken):
        await store.objects.put(KEY, breaks(), 30_000_000 if known else None)
    assert [found async for found in store.objects.multipart_uploads(KEY)] == []
    left = await store.keys()
    if known and left == [KEY]:
        store.lacks("dropping a PUT whose connection breaks off")
    assert left == []
