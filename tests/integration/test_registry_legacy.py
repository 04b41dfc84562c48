"""POST /artifacts: the deprecated upload whose bytes go through the server."""

from __future__ import annotations

import asyncio
import hashlib
import io
import resource
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from support.served import Served, digest_of, random_bytes, served
from support.supply import Signer

pytestmark = pytest.mark.usefixtures("database_url")

DATA = random_bytes(3_000_000)
DIGEST = digest_of(DATA)
KEY = f"artifacts/shop/{DIGEST}/app.tar.gz"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as one:
        await one.add_app("shop")
        yield one


async def upload(
    api: Served, data: bytes = DATA, query: str = "?app=shop", **headers: str
) -> tuple[int, Any, Mapping[str, str]]:
    named = {"X-Aether-Artifact-Digest": digest_of(data), **{k.replace("_", "-"): v for k, v in headers.items()}}
    async with api.client.post(f"{api.base}/artifacts{query}", data=io.BytesIO(data), headers=named) as answer:
        return answer.status, await answer.json(), answer.headers


async def test_the_body_becomes_the_artifact_and_the_answer_says_where_to_go_from_here(api: Served) -> None:
    status, done, headers = await upload(api)
    assert status == 200, done
    assert (done["digest"], done["duplicate"], done["app_linked"], done["verified"]) == (DIGEST, False, True, False)
    assert headers["Deprecation"].startswith("@")
    assert headers["Link"] == '</artifacts/presign>; rel="successor-version"'
    assert "Sunset" not in headers
    assert api.files() == {KEY}
    assert (await api.call("GET", f"/artifacts/{DIGEST}/download"))[1] == DATA
    assert api.sample("artifact_legacy_upload_requests_total") == 1
    status, done, _ = await upload(api, query="", X_Aether_App="shop")
    assert (status, done["duplicate"]) == (200, True)
    assert (await api.presign("shop", DATA))["duplicate"] is True


async def test_a_signature_is_judged(api: Served) -> None:
    key = Signer()
    admin = {"Authorization": "Bearer tok-admin"}
    await api.call("POST", "/apps/shop/public-keys", json={"public_key_hex": key.public_key}, headers=admin)
    status, done, _ = await upload(api, X_Aether_Signature=key.sign(DIGEST))
    assert (status, done["verified"]) == (200, True)
    status, error, _ = await upload(api, random_bytes(10), X_Aether_Signature="nonsense")
    assert (status, error["code"]) == (400, "bad_request")


@pytest.mark.parametrize(
    ("query", "headers", "status", "code"),
    [
        ("?app=shop", {"X_Aether_Artifact_Digest": ""}, 400, "missing_digest"),
        ("?app=shop", {"X_Aether_Artifact_Digest": DIGEST.upper()}, 400, "invalid_digest"),
        ("?app=shop", {"X_Aether_Artifact_Digest": DIGEST[:-1]}, 400, "invalid_digest"),
        ("?app=shop", {"X_Aether_Artifact_Digest": "e" * 64}, 400, "digest_mismatch"),
        ("?app=nobody", {}, 404, "not_found"),
        ("", {}, 400, "bad_request"),
        ("?app=shop", {"X_Aether_App": "other"}, 400, "bad_request"),
        ("?app=shop", {"Authorization": "Bearer tok-reader"}, 403, "forbidden"),
        ("?app=shop", {"Authorization": "Bearer wrong"}, 401, "unauthorized"),
    ],
)
async def test_what_is_refused_keeps_nothing(
    api: Served, query: str, headers: dict[str, str], status: int, code: str
) -> None:
    found, error, answered = await upload(api, query=query, **headers)
    assert (found, error["code"]) == (status, code)
    if status != 401:
        assert "Deprecation" in answered
    assert api.files() == set()


async def test_one_that_is_stored_is_compared_all_the_same(api: Served) -> None:
    await upload(api)
    status, error, _ = await upload(api, b"x" * len(DATA), X_Aether_Artifact_Digest=DIGEST)
    assert (status, error["code"]) == (400, "digest_mismatch")
    assert (await api.call("GET", f"/artifacts/{DIGEST}/download"))[1] == DATA


async def test_too_large_a_body_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async with served(tmp_path, AETHER_MAX_ARTIFACT_SIZE_BYTES="1000") as api:
        await api.add_app("shop")
        with socket.create_connection(("127.0.0.1", api.port)) as raw:
            head = _head(10_000_000)
            await asyncio.to_thread(raw.sendall, head)
            answer = await asyncio.to_thread(raw.makefile("rb").read)
        assert b" 413 " in answer
        assert b"payload_too_large" in answer
        assert api.sample("artifact_size_exceeded_total") == 1


def _head(length: int, digest: str = DIGEST) -> bytes:
    return (
        f"POST /artifacts?app=shop HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer tok-deployer\r\n"
        f"X-Aether-Artifact-Digest: {digest}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


async def test_a_body_without_length_is_refused(api: Served) -> None:
    async def stream() -> AsyncIterator[bytes]:
        yield DATA

    status, error = await api.call(
        "POST", "/artifacts?app=shop", data=stream(), headers={"X-Aether-Artifact-Digest": DIGEST}
    )
    assert (status, error["code"]) == (400, "bad_request")


async def test_a_body_that_breaks_off_keeps_nothing(api: Served) -> None:
    with socket.create_connection(("127.0.0.1", api.port)) as raw:
        await asyncio.to_thread(raw.sendall, _head(len(DATA)) + DATA[:1_500_000])
        while not any(name.startswith(".parts/") for name in api.files()):
            await asyncio.sleep(0.005)
        assert api.sample("artifact_uploads_in_progress") == 1
    async with asyncio.timeout(5):
        while api.sample("artifact_uploads_in_progress") or api.files():
            await asyncio.sleep(0.005)
    page = (await api.call("GET", f"/artifacts/{DIGEST}/events"))[1]
    assert [row["event"] for row in page["items"]] == ["rejected", "streamed"]
    assert (await upload(api))[0] == 200


async def test_it_can_be_switched_off(tmp_path: Path) -> None:
    async with served(tmp_path, AETHER_REQUIRE_PRESIGN="true") as api:
        await api.add_app("shop")
        status, error, headers = await upload(api)
        assert (status, error["code"]) == (403, "forbidden")
        assert "presign" in error["message"]
        assert "Deprecation" in headers
        await api.upload("shop", DATA)


async def test_uploads_beyond_the_bound_are_told_to_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aether.api.turns.TURN_SECS", 0.05)
    async with served(tmp_path, AETHER_MAX_CONCURRENT_UPLOADS="1") as api:
        await api.add_app("shop")
        with socket.create_connection(("127.0.0.1", api.port)) as raw:
            await asyncio.to_thread(raw.sendall, _head(len(DATA)))
            while api.sample("artifact_uploads_in_progress") == 0:
                await asyncio.sleep(0.005)
            status, error, _ = await upload(api)
            assert (status, error["code"]) == (429, "rate_limited")
        while api.sample("artifact_uploads_in_progress") > 0:
            await asyncio.sleep(0.005)
        assert (await upload(api))[0] == 200


async def test_a_client_that_stalls_is_given_up(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aether.api.routers.legacy.STALL_SECS", 0.05)
    with socket.create_connection(("127.0.0.1", api.port)) as raw:
        await asyncio.to_thread(raw.sendall, _head(len(DATA)) + b"abc")
        answer = await asyncio.to_thread(raw.recv, 4000)
    assert b" 400 " in answer
    assert api.files() == set()


async def test_bodies_pass_through_without_being_held(api: Served) -> None:
    """Four uploads of 48 MB at once; what the process takes at its peak grows by far less than one of them. Client
    and server are one process here, and the client sends from a file of zeros."""
    size = 48 * 1024**2
    path = api.folder / "zeros"
    with path.open("wb") as out:
        out.truncate(size)
    with path.open("rb") as zeros:
        digest = hashlib.file_digest(zeros, "sha256").hexdigest()

    async def one(app: str) -> int:
        headers = {"X-Aether-Artifact-Digest": digest}
        with path.open("rb") as body:
            async with api.client.post(f"{api.base}/artifacts?app={app}", data=body, headers=headers) as answer:
                return answer.status

    for n in range(4):
        await api.add_app(f"app{n}")
    assert (await upload(api))[0] == 200
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert await asyncio.gather(*(one(f"app{n}") for n in range(4))) == [200] * 4
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < size // 2, f"{grown / 1e6:.0f} MB"
