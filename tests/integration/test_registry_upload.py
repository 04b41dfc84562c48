"""The two phases over HTTP: a real server, a real client, real files."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
import sqlalchemy as sa

from aether.stores.database.tables import applications, artifacts, uploads
from support.served import Served, add_app, digest_of, random_bytes, served

pytestmark = pytest.mark.usefixtures("database_url")

DATA = random_bytes(300_000)
KEY = f"artifacts/shop/{digest_of(DATA)}/app.tar.gz"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as one:
        await one.add_app("shop")
        yield one


def altered(url: str, **changes: str | None) -> str:
    parts = urlsplit(url)
    query = {**dict(parse_qsl(parts.query)), **changes}
    return f"{parts.path}?{urlencode({k: v for k, v in query.items() if v is not None})}"


async def test_presign_put_complete_and_read(api: Served) -> None:
    signed = await api.presign("shop", DATA, content_digest="c" * 64, runtime="node22")
    assert signed["method"] == "PUT"
    assert signed["duplicate"] is False
    assert signed["url"].startswith("/objects/pending/")
    assert signed["storage_key"] == KEY
    assert signed["multipart"] == {"threshold_bytes": 32 << 20, "part_size_bytes": 8 << 20}
    assert await api.put(signed, DATA) == 200
    status, done = await api.complete("shop", DATA, signed["upload_id"], put_duration_ms=12)
    assert status == 200
    digest = digest_of(DATA)
    assert done == {
        "artifact_url": f"/artifacts/{digest}/download",
        "digest": digest,
        "duplicate": False,
        "app_linked": True,
        "verified": False,
        "size_bytes": len(DATA),
    }
    assert api.files() == {KEY}
    status, meta = await api.call("GET", f"/artifacts/{digest}/meta")
    assert status == 200
    assert (meta["app"], meta["content_digest"], meta["runtime"], meta["verified"]) == (
        "shop",
        "c" * 64,
        "node22",
        False,
    )
    assert meta["created_at"].endswith("Z")
    status, body = await api.call("GET", f"/artifacts/{digest}/download")
    assert (status, body) == (200, DATA)
    assert (await api.call("HEAD", f"/artifacts/{digest}"))[0] == 200
    assert (await api.call("HEAD", f"/artifacts/{'0' * 64}"))[0] == 404
    assert api.sample("artifact_upload_bytes_total") == len(DATA)
    assert api.sample("artifact_put_duration_seconds_count") == 1
    assert api.sample("artifacts_total") == 1


async def test_a_second_upload_of_the_same_bytes_is_a_duplicate(api: Served) -> None:
    await api.upload("shop", DATA)
    again = await api.presign("shop", DATA)
    assert (again["method"], again["duplicate"], again["url"], again["upload_id"]) == ("NONE", True, None, None)


async def test_another_apps_digest_is_no_duplicate(api: Served) -> None:
    """Knowing a hash must not link, or reveal, bytes that one never had."""
    await api.add_app("spy")
    await api.upload("shop", DATA)
    signed = await api.presign("spy", DATA)
    assert signed["method"] == "PUT"
    status, error = await api.complete("spy", DATA, signed["upload_id"])
    assert (status, error["code"]) == (400, "bad_request")
    assert (await api.call("GET", f"/artifacts/{digest_of(DATA)}/meta?app=spy"))[0] == 404


async def test_another_apps_upload_cannot_be_completed(api: Served) -> None:
    await api.add_app("spy")
    signed = await api.presign("shop", DATA)
    await api.put(signed, DATA)
    status, error = await api.complete("spy", DATA, signed["upload_id"])
    assert (status, error["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"digest": ""}, 400, "missing_digest"),
        ({"digest": digest_of(DATA).upper()}, 400, "invalid_digest"),
        ({"digest": "abc"}, 400, "invalid_digest"),
        ({"content_digest": "A" * 64}, 400, "invalid_digest"),
        ({"size_bytes": 0}, 400, "bad_request"),
        ({"size_bytes": -1}, 400, "bad_request"),
        ({"size_bytes": "many"}, 400, "bad_request"),
        ({"size_bytes": 2_000_001}, 413, "payload_too_large"),
        ({"app": "nobody"}, 404, "not_found"),
        ({"runtime": "x" * 65}, 400, "bad_request"),
    ],
)
async def test_presign_refuses(tmp_path: Path, change: dict[str, object], status: int, code: str) -> None:
    async with served(tmp_path, AETHER_MAX_ARTIFACT_SIZE_BYTES="2000000") as api:
        await api.add_app("shop")
        body = {"app": "shop", "digest": digest_of(DATA), "size_bytes": len(DATA), **change}
        got, error = await api.call("POST", "/artifacts/presign", json=body)
        assert (got, error["code"]) == (status, code)
        assert "trace_id" in error
        assert api.sample("artifact_size_exceeded_total") == (1 if status == 413 else 0)


async def test_wrong_bytes_are_deleted(api: Served) -> None:
    signed = await api.presign("shop", DATA)
    assert await api.put(signed, DATA[:-1] + b"!") == 200
    status, error = await api.complete("shop", DATA, signed["upload_id"])
    assert (status, error["code"]) == (400, "digest_mismatch")
    assert error["details"]["expected"] == digest_of(DATA)
    assert api.files() == set()
    status, error = await api.complete("shop", DATA, signed["upload_id"])
    assert (status, error["code"]) == (409, "conflict")
    assert api.sample("artifact_digest_mismatch_total") == 1
    assert api.sample("artifact_complete_failures_total") == 2


@pytest.mark.parametrize("sent", [DATA[:-1], DATA + b"x", b""])
async def test_another_length_than_signed_keeps_nothing(api: Served, sent: bytes) -> None:
    signed = await api.presign("shop", DATA)
    assert await api.put(signed, sent) in (400, 413)
    assert api.files() == set()
    status, error = await api.complete("shop", DATA, signed["upload_id"])
    assert (status, error["code"]) == (400, "bad_request")


async def test_a_body_without_length_is_refused(api: Served) -> None:
    signed = await api.presign("shop", DATA)

    async def stream() -> AsyncIterator[bytes]:
        yield DATA

    status, error = await api.call("PUT", signed["url"], data=stream())
    assert (status, error["code"]) == (400, "bad_request")
    assert api.files() == set()


async def test_a_truncated_put_keeps_nothing(api: Served) -> None:
    """The socket is closed halfway; an upload that was there before stays."""
    data = random_bytes(5_000_000)
    signed = await api.presign("shop", data)
    for before in (set[str](), {f"pending/{signed['upload_id']}"}):
        with socket.create_connection(("127.0.0.1", api.port)) as raw:
            head = f"PUT {signed['url']} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
            await asyncio.to_thread(raw.sendall, head.encode() + data[:3_000_000])
            while not any(name.startswith(".parts/") for name in api.files()):
                await asyncio.sleep(0.005)
        while any(name.startswith(".parts/") for name in api.files()):
            await asyncio.sleep(0.005)
        assert api.files() == before
        assert await api.put(signed, data) == 200
    assert (await api.complete("shop", data, signed["upload_id"]))[0] == 200


async def test_a_repeated_put_replaces(api: Served) -> None:
    signed = await api.presign("shop", DATA)
    assert await api.put(signed, b"x" * len(DATA)) == 200
    assert await api.put(signed, DATA) == 200
    assert (await api.complete("shop", DATA, signed["upload_id"]))[0] == 200


async def test_a_url_cannot_change_a_completed_artifact(api: Served) -> None:
    signed = await api.presign("shop", DATA)
    await api.put(signed, DATA)
    await api.complete("shop", DATA, signed["upload_id"])
    assert await api.put(signed, b"x" * len(DATA)) == 200
    status, again = await api.complete("shop", DATA, signed["upload_id"])
    assert (status, again["duplicate"]) == (200, False)
    assert (await api.call("GET", f"/artifacts/{digest_of(DATA)}/download"))[1] == DATA


async def test_puts_that_race_with_complete_never_reach_the_artifact(api: Served) -> None:
    """Every outcome is allowed but one: stored bytes that are not those of the digest."""
    data = random_bytes(2_000_000)
    signed = await api.presign("shop", data)
    await api.put(signed, data)

    async def attack() -> None:
        for _ in range(10):
            await api.put(signed, b"x" * len(data))

    attacker = asyncio.create_task(attack())
    status, done = await api.complete("shop", data, signed["upload_id"])
    await attacker
    if status == 200:
        assert done["digest"] == digest_of(data)
        assert (await api.call("GET", f"/artifacts/{digest_of(data)}/download"))[1] == data
    else:
        assert done["code"] == "digest_mismatch"
        assert not any(name.startswith("artifacts/") for name in api.files())


@pytest.mark.parametrize(
    "change",
    [
        {"size": "5"},
        {"expires": "99999999999"},
        {"signature": "0" * 64},
        {"signature": None},
        {"signature": "ünsinn"},
        {"size": None},
        {"extra": "1"},
    ],
)
async def test_an_altered_url_is_refused(api: Served, change: dict[str, str | None]) -> None:
    signed = await api.presign("shop", DATA)
    status, error = await api.call("PUT", altered(signed["url"], **change), data=DATA)
    assert (status, error["code"]) == (403, "forbidden")
    assert api.files() == set()


@pytest.mark.parametrize("path", ["pending/other", "artifacts/shop/x/app.tar.gz", "pending/../x", "pending/%2e%2e/x"])
async def test_a_signature_holds_for_its_key_only(api: Served, path: str) -> None:
    signed = await api.presign("shop", DATA)
    query = urlsplit(signed["url"]).query
    with socket.create_connection(("127.0.0.1", api.port)) as raw:
        raw.sendall(
            f"PUT /objects/{path}?{query} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello".encode()
        )
        answer = await asyncio.to_thread(raw.recv, 100)
    assert answer.startswith(b"HTTP/1.1 403")
    assert api.files() == set()


async def test_a_put_url_is_no_get_url_and_the_other_way_round(api: Served) -> None:
    signed = await api.presign("shop", DATA)
    await api.put(signed, DATA)
    assert (await api.call("GET", signed["url"]))[0] == 403
    await api.complete("shop", DATA, signed["upload_id"])
    location = f"/artifacts/{digest_of(DATA)}/download"
    async with api.client.get(api.base + location, allow_redirects=False) as answer:
        assert answer.status == 307
        url = answer.headers["Location"]
    assert (await api.call("PUT", url, data=DATA))[0] == 403


async def test_an_expired_url_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path, AETHER_PRESIGN_EXPIRE_SECS="0") as api:
        await api.add_app("shop")
        signed = await api.presign("shop", DATA)
        await asyncio.sleep(1.01)  # expiry has a grain of one second; there is no event to await
        status, error = await api.call("PUT", signed["url"], data=DATA)
        assert (status, error["code"]) == (403, "forbidden")
        assert "expired" in error["message"]


async def test_fifty_completes_at_once_give_one_artifact(api: Served) -> None:
    signed = await api.presign("shop", DATA)
    await api.put(signed, DATA)
    answers = await asyncio.gather(*(api.complete("shop", DATA, signed["upload_id"]) for _ in range(50)))
    assert {status for status, _ in answers} == {200}
    assert {done["duplicate"] for _, done in answers} == {False}
    assert api.files() == {KEY}
    async with api.database.read() as tx:
        assert await tx.scalar(sa.select(sa.func.count()).select_from(artifacts)) == 1


async def test_many_uploads_of_one_digest_at_once(api: Served) -> None:
    signed = [await api.presign("shop", DATA) for _ in range(10)]
    await asyncio.gather(*(api.put(one, DATA) for one in signed))
    answers = await asyncio.gather(*(api.complete("shop", DATA, one["upload_id"]) for one in signed))
    assert {status for status, _ in answers} == {200}
    assert sorted(done["duplicate"] for _, done in answers) == [False] + [True] * 9
    assert api.files() == {KEY}


async def test_complete_must_match_what_was_presigned(api: Served) -> None:
    signed = await api.presign("shop", DATA)
    await api.put(signed, DATA)
    status, error = await api.complete("shop", DATA, signed["upload_id"], size_bytes=len(DATA) + 1)
    assert (status, error["code"]) == (400, "bad_request")
    status, error = await api.complete("shop", DATA, signed["upload_id"], digest="0" * 64)
    assert (status, error["code"]) == (400, "bad_request")
    status, error = await api.complete("shop", DATA, signed["upload_id"], digest=digest_of(DATA).upper())
    assert (status, error["code"]) == (400, "invalid_digest")
    assert (await api.complete("shop", DATA, signed["upload_id"]))[0] == 200


async def test_a_used_idempotency_key_conflicts_only_for_another_artifact(api: Served) -> None:
    other = random_bytes(1000)
    first, second = await api.presign("shop", DATA), await api.presign("shop", other)
    await api.put(first, DATA)
    await api.put(second, other)
    for _ in range(2):
        assert (await api.complete("shop", DATA, first["upload_id"], idempotency_key="k"))[0] == 200
    status, error = await api.complete("shop", other, second["upload_id"], idempotency_key="k")
    assert (status, error["code"]) == (409, "idempotency_conflict")
    assert (await api.complete("shop", other, second["upload_id"], idempotency_key="l"))[0] == 200


async def test_one_key_for_two_artifacts_at_once_keeps_one_of_them(api: Served) -> None:
    """What is refused for its key is not kept by a later look for interrupted uploads either."""
    for turn in range(5):
        datas = [random_bytes(900 + 10 * turn + n) for n in range(4)]
        signed = [await api.presign("shop", data) for data in datas]
        for data, one in zip(datas, signed, strict=True):
            await api.put(one, data)
        answers = await asyncio.gather(
            *(
                api.complete("shop", data, one["upload_id"], idempotency_key=f"k{turn}")
                for data, one in zip(datas, signed, strict=True)
            )
        )
        told = sorted((status, done.get("code", "")) for status, done in answers)
        assert told == [(200, "")] + [(409, "idempotency_conflict")] * 3
        assert await api.registry.recover() == 0
        for data, (status, _) in zip(datas, answers, strict=True):
            assert (await api.call("HEAD", f"/artifacts/{digest_of(data)}"))[0] == (200 if status == 200 else 404)


async def test_an_upload_completed_after_its_time_is_refused(api: Served) -> None:
    signed = await api.presign("shop", DATA)
    await api.put(signed, DATA)
    async with api.database.write() as tx:
        await tx.execute(sa.update(uploads).values(expires_at=1))
    for _ in range(2):
        status, error = await api.complete("shop", DATA, signed["upload_id"])
        assert (status, error["code"]) == (409, "conflict")
        assert "expired" in error["message"]
    again = await api.presign("shop", DATA)
    await api.put(again, DATA)
    assert (await api.complete("shop", DATA, again["upload_id"]))[0] == 200
    async with api.database.write() as tx:
        await tx.execute(sa.update(uploads).values(expires_at=1))
    assert (await api.complete("shop", DATA, again["upload_id"]))[0] == 200, "what is completed stays so"


async def test_a_row_without_its_object_is_no_duplicate(api: Served) -> None:
    await api.upload("shop", DATA)
    (api.folder / "objects" / KEY).unlink()
    assert (await api.upload("shop", DATA))["digest"] == digest_of(DATA)
    assert (await api.call("GET", f"/artifacts/{digest_of(DATA)}/download"))[1] == DATA


async def test_an_app_deleted_while_completing_leaves_nothing(api: Served) -> None:
    signed = await api.presign("shop", DATA)
    await api.put(signed, DATA)
    move = api.objects.move

    async def move_then_delete(source: str, target: str) -> None:
        await move(source, target)
        async with api.database.write() as tx:
            await tx.execute(sa.delete(applications))

    api.objects.move = move_then_delete
    status, error = await api.complete("shop", DATA, signed["upload_id"])
    assert (status, error["code"]) == (404, "not_found")
    assert api.files() == set()


async def test_dropping_an_app_deletes_its_objects_only(api: Served) -> None:
    await api.add_app("shop-two")
    await api.upload("shop", DATA)
    await api.upload("shop-two", DATA)
    await api.registry.drop_app("shop")
    assert api.files() == {f"artifacts/shop-two/{digest_of(DATA)}/app.tar.gz"}


async def test_the_list_pages_newest_first(api: Served) -> None:
    stored = [await api.upload("shop", random_bytes(100 + n)) for n in range(5)]
    await add_app(api.database, "other")
    await api.upload("other", DATA)
    seen: list[str] = []
    cursor = ""
    for _ in range(3):
        status, page = await api.call("GET", f"/artifacts?app=shop&limit=2{cursor}")
        assert status == 200
        seen += [item["digest"] for item in page["items"]]
        cursor = f"&cursor={page['next_cursor']}"
    assert page["next_cursor"] is None
    assert seen == [one["digest"] for one in reversed(stored)]
    assert (await api.call("GET", "/artifacts?limit=501"))[0] == 400
    assert (await api.call("GET", "/artifacts?cursor=zzz"))[0] == 400
    assert (await api.call("GET", "/artifacts?app=nobody"))[0] == 404


async def test_uploads_beyond_the_bound_are_told_to_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aether.api.turns.TURN_SECS", 0.05)
    async with served(tmp_path, AETHER_MAX_CONCURRENT_UPLOADS="1") as api:
        await api.add_app("shop")
        signed = await api.presign("shop", DATA)
        with socket.create_connection(("127.0.0.1", api.port)) as raw:
            raw.sendall(f"PUT {signed['url']} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(DATA)}\r\n\r\n".encode())
            while api.sample("artifact_uploads_in_progress") == 0:
                await asyncio.sleep(0.005)
            status, error = await api.call("PUT", signed["url"], data=DATA)
            assert (status, error["code"]) == (429, "rate_limited")
        while api.sample("artifact_uploads_in_progress") > 0:
            await asyncio.sleep(0.005)
        assert await api.put(signed, DATA) == 200


async def test_a_client_that_stalls_is_given_up(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aether.api.routers.objects.STALL_SECS", 0.05)
    signed = await api.presign("shop", DATA)
    with socket.create_connection(("127.0.0.1", api.port)) as raw:
        raw.sendall(f"PUT {signed['url']} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(DATA)}\r\n\r\nabc".encode())
        answer = await asyncio.to_thread(raw.recv, 100)
    assert answer.startswith(b"HTTP/1.1 400")
    assert api.files() == set()


def open_files(name: str) -> list[str]:
    links: list[str] = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(entry.readlink()))
    return [link for link in links if link.endswith(name)]


async def test_a_client_that_leaves_during_a_download_frees_everything(api: Served) -> None:
    data = random_bytes(30_000_000)
    done = await api.upload("shop", data)
    async with api.client.get(api.base + done["artifact_url"], allow_redirects=False) as answer:
        url = answer.headers["Location"]
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(f"GET {url} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    assert len(open_files("app.tar.gz")) == 1
    writer.transport.abort()
    async with asyncio.timeout(5):
        while open_files("app.tar.gz"):
            await asyncio.sleep(0.005)
    assert (await api.call("GET", done["artifact_url"]))[1] == data
