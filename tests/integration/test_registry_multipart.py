"""Uploads in parts over HTTP: begun, resumed, put together, refused, given up."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aether.registry.collector import PendingCollector
from aether.registry.multipart import part_count, part_size, size_of
from support.served import Served, digest_of, random_bytes, served

pytestmark = pytest.mark.usefixtures("database_url")

PART = 5 * 1024**2
DATA = random_bytes(2 * PART + 70_000)
DIGEST = digest_of(DATA)
KEY = f"artifacts/shop/{DIGEST}/app.tar.gz"
SIZES = {"AETHER_MULTIPART_PART_SIZE_BYTES": str(PART)}


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path, **SIZES) as one:
        await one.add_app("shop")
        yield one


async def init(api: Served, data: bytes = DATA, **more: Any) -> dict[str, Any]:
    body = {"app": "shop", "digest": digest_of(data), "size_bytes": len(data), **more}
    status, begun = await api.call("POST", "/artifacts/multipart/init", json=body)
    assert status == 200, begun
    return begun


async def urls(api: Served, upload_id: str, numbers: list[int]) -> list[dict[str, Any]]:
    body = {"app": "shop", "upload_id": upload_id, "part_numbers": numbers}
    status, signed = await api.call("POST", "/artifacts/multipart/presign-part", json=body)
    assert status == 200, signed
    return signed["parts"]


async def put_part(api: Served, signed: dict[str, Any], data: bytes = DATA) -> dict[str, Any]:
    """PUT one part; returns what completing names it by."""
    start = (signed["part_number"] - 1) * PART
    body = data[start : start + signed["size_bytes"]]
    async with api.client.put(api.base + signed["url"], data=io.BytesIO(body), headers=signed["headers"]) as answer:
        assert answer.status == 200, await answer.text()
        return {"part_number": signed["part_number"], "etag": answer.headers["ETag"]}


async def put_all(api: Served, upload_id: str, data: bytes = DATA) -> list[dict[str, Any]]:
    signed = await urls(api, upload_id, [1, 2, 3])
    return list(await asyncio.gather(*(put_part(api, one, data) for one in signed)))


async def complete(
    api: Served, upload_id: str, parts: list[dict[str, Any]], data: bytes = DATA, **more: Any
) -> tuple[int, Any]:
    body = {
        "app": "shop", "digest": digest_of(data), "size_bytes": len(data), "upload_id": upload_id, "parts": parts,
        **more,
    }  # fmt: skip
    return await api.call("POST", "/artifacts/multipart/complete", json=body)


async def test_parts_become_the_artifact(api: Served) -> None:
    begun = await init(api, content_digest="c" * 64, runtime="node22")
    assert (begun["part_size_bytes"], begun["part_count"], begun["parts"]) == (PART, 3, [])
    assert begun["storage_key"] == KEY
    one = {"app": "shop", "upload_id": begun["upload_id"], "part_number": 3}
    status, signed = await api.call("POST", "/artifacts/multipart/presign-part", json=one)
    assert (status, signed["part_number"], signed["size_bytes"]) == (200, 3, 70_000)
    parts = await put_all(api, begun["upload_id"])
    status, done = await complete(api, begun["upload_id"], parts, put_duration_ms=30)
    assert (status, done["digest"], done["duplicate"], done["size_bytes"]) == (200, DIGEST, False, len(DATA))
    assert api.files() == {KEY}
    assert (await api.call("GET", f"/artifacts/{DIGEST}/download"))[1] == DATA
    meta = (await api.call("GET", f"/artifacts/{DIGEST}/meta"))[1]
    assert (meta["content_digest"], meta["runtime"]) == ("c" * 64, "node22")
    again = await init(api)
    assert (again["upload_id"], again["duplicate"], again["parts"]) == (None, True, [])
    text = (await api.call("GET", "/metrics"))[1].decode()
    for line in (
        "artifact_multipart_inits_total 2.0",
        "artifact_multipart_part_presigns_total 4.0",
        "artifact_multipart_completes_total 1.0",
        "artifact_multipart_complete_failures_total 0.0",
        "artifact_multipart_part_size_bytes_count 3.0",
        "artifact_multipart_parts_per_artifact_sum 3.0",
    ):
        assert line in text.splitlines(), line
    assert api.sample("artifact_upload_bytes_total") == len(DATA)


async def test_the_same_caller_goes_on_where_it_was(api: Served) -> None:
    begun = await init(api)
    (first,) = await urls(api, begun["upload_id"], [1])
    named = await put_part(api, first)
    again = await init(api)
    assert again["upload_id"] == begun["upload_id"]
    assert again["parts"] == [{"part_number": 1, "size_bytes": PART, "etag": named["etag"].strip('"')}]
    assert again["expires_at"] >= begun["expires_at"]
    other = {"Authorization": "Bearer tok-admin"}
    body = {"app": "shop", "digest": DIGEST, "size_bytes": len(DATA)}
    status, theirs = await api.call("POST", "/artifacts/multipart/init", json=body, headers=other)
    assert status == 200
    assert theirs["upload_id"] != begun["upload_id"]
    assert theirs["parts"] == []
    rest = [await put_part(api, one) for one in await urls(api, begun["upload_id"], [2, 3])]
    assert (await complete(api, begun["upload_id"], [named, *rest]))[0] == 200


async def test_what_is_wrong_with_the_parts_is_said_and_can_be_put_right(api: Served) -> None:
    begun = await init(api)
    good = await put_all(api, begun["upload_id"])
    for parts, said in (
        (good[:2], "missing: 3"),
        ([], "missing: 1, 2, 3"),
        ([good[1], good[0], good[2]], "order"),
        ([*good, good[2]], "once each"),
        ([*good, {"part_number": 4, "etag": "x"}], "no part 4"),
        ([{"part_number": 0, "etag": "x"}, *good], "no part 0"),
        ([{**good[0], "etag": good[1]["etag"]}, *good[1:]], ""),
        ([{**good[0], "etag": ""}, *good[1:]], "etag"),
    ):
        status, error = await complete(api, begun["upload_id"], parts)
        assert (status, error["code"]) == (400, "bad_request"), parts
        assert said in error["message"]
    assert api.sample("artifact_multipart_complete_failures_total") == 8
    assert (await complete(api, begun["upload_id"], good))[0] == 200


async def test_a_part_that_never_came_is_missed(api: Served) -> None:
    begun = await init(api)
    parts = [await put_part(api, one) for one in await urls(api, begun["upload_id"], [1, 3])]
    claimed = [parts[0], {"part_number": 2, "etag": parts[0]["etag"]}, parts[1]]
    status, error = await complete(api, begun["upload_id"], claimed)
    assert (status, error["code"]) == (400, "bad_request")
    (second,) = await urls(api, begun["upload_id"], [2])
    parts.insert(1, await put_part(api, second))
    assert (await complete(api, begun["upload_id"], parts))[0] == 200


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"part_numbers": []}, 400),
        ({"part_numbers": [0]}, 400),
        ({"part_numbers": [4]}, 400),
        ({"part_numbers": [1, 1]}, 400),
        ({"part_numbers": list(range(1, 102))}, 400),
        ({"part_number": 1, "part_numbers": [1]}, 400),
        ({}, 400),
        ({"part_number": 1 << 70}, 400),
        ({"part_number": 1, "upload_id": "nothing"}, 404),
        ({"part_number": 1, "app": "other"}, 404),
    ],
)
async def test_a_part_that_cannot_be_is_refused(api: Served, change: dict[str, Any], status: int) -> None:
    await api.add_app("other")
    begun = await init(api)
    body = {"app": "shop", "upload_id": begun["upload_id"], **change}
    assert (await api.call("POST", "/artifacts/multipart/presign-part", json=body))[0] == status


async def test_each_kind_of_upload_is_completed_at_its_own_place(api: Served) -> None:
    begun = await init(api)
    parts = await put_all(api, begun["upload_id"])
    status, error = await api.complete("shop", DATA, begun["upload_id"])
    assert (status, error["code"]) == (400, "bad_request")
    assert "multipart" in error["message"]
    signed = await api.presign("shop", DATA)
    status, error = await complete(api, signed["upload_id"], parts)
    assert (status, error["code"]) == (400, "bad_request")
    assert (await complete(api, begun["upload_id"], parts))[0] == 200


async def test_wrong_bytes_in_one_part_leave_nothing(api: Served) -> None:
    begun = await init(api)
    parts = await put_all(api, begun["upload_id"], b"x" + DATA[1:])
    status, error = await complete(api, begun["upload_id"], parts)
    assert (status, error["code"]) == (400, "digest_mismatch")
    assert api.files() == set()
    status, error = await complete(api, begun["upload_id"], parts)
    assert (status, error["code"]) == (409, "conflict")


async def test_a_live_part_url_changes_nothing_that_is_stored(api: Served) -> None:
    begun = await init(api)
    signed = await urls(api, begun["upload_id"], [1, 2, 3])
    parts = [await put_part(api, one) for one in signed]
    assert (await complete(api, begun["upload_id"], parts))[0] == 200
    async with api.client.put(api.base + signed[0]["url"], data=io.BytesIO(b"x" * PART)) as answer:
        assert answer.status in (403, 404)
    assert (await api.call("GET", f"/artifacts/{DIGEST}/download"))[1] == DATA
    assert api.files() == {KEY}


async def test_many_completes_at_once_give_one_artifact(api: Served) -> None:
    begun = await init(api)
    parts = await put_all(api, begun["upload_id"])
    answers = await asyncio.gather(*(complete(api, begun["upload_id"], parts) for _ in range(20)))
    assert [(status, done["duplicate"]) for status, done in answers] == [(200, False)] * 20
    assert (await complete(api, begun["upload_id"], parts))[0] == 200
    assert api.files() == {KEY}


async def test_what_nobody_completed_is_given_up(api: Served) -> None:
    begun = await init(api)
    parts = await put_all(api, begun["upload_id"])
    late = PendingCollector(api.database, api.objects, api.settings, api.metrics, lambda: time.time() + 86_500)
    assert await late.collect() == 1
    assert api.files() == set()
    status, error = await complete(api, begun["upload_id"], parts)
    assert (status, error["code"]) in ((404, "not_found"), (409, "conflict"))


async def test_an_upload_that_no_row_knows_is_given_up_when_no_url_of_it_can_live(api: Served) -> None:
    begun = await init(api)
    await put_all(api, begun["upload_id"])
    await api.objects.begin_multipart("pending/left-by-a-killed-server")
    soon = PendingCollector(api.database, api.objects, api.settings, api.metrics, lambda: time.time() + 100)
    assert await soon.collect() == 0
    later = PendingCollector(api.database, api.objects, api.settings, api.metrics, lambda: time.time() + 1000)
    assert await later.collect() == 1
    left = [key async for key, _, _ in api.objects.multipart_uploads("pending/")]
    assert left == [f"pending/{begun['upload_id']}"]


def test_parts_grow_so_that_there_are_not_too_many() -> None:
    mib = 1024**2
    assert part_size(10, 8 * mib) == 8 * mib
    assert part_size(80_000 * mib, 8 * mib) == 8 * mib
    assert part_size(80_000 * mib + 1, 8 * mib) == 9 * mib
    for size in (1, 8 * mib, 8 * mib + 1, 80_000 * mib + 1, 5 * 1024**4):
        part = part_size(size, 8 * mib)
        count = part_count(size, part)
        assert count <= 10_000
        assert sum(size_of(number, size, part) for number in (1, count)) <= size or count == 1
        assert (count - 1) * part + size_of(count, size, part) == size
