"""The registry on every object store there is: what clients and faults do to it, with killed servers."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa

from aether.registry.collector import PendingCollector
from aether.registry.records import storage_key
from aether.registry.sweeper import ArtifactSweeper, Keep, OrphanSweeper
from aether.stores.database.tables import artifacts, uploads
from support import s3_servers, supply
from support.served import Served, digest_of, random_bytes, served
from support.stores import KINDS, stream

PART = 5 * 1024**2
DATA = random_bytes(300_000)
DIGEST = digest_of(DATA)
KEY = storage_key("shop", DIGEST)
LARGE = random_bytes(PART + 40_000)
SETTINGS = {"AETHER_MULTIPART_PART_SIZE_BYTES": str(PART)}

CHILD = """
import asyncio, os, signal, sys
from pathlib import Path
from aether.registry.upload_rows import Said
from aether.registry.uploads import Announced
from support.served import served

folder, point, upload_id, digest, size = sys.argv[1:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    async with served(Path(folder)) as api:
        when, _, name = point.partition("-")
        real = getattr(api.objects, name)

        async def spied(*args, **more):
            if when == "before":
                die()
            await real(*args, **more)
            die()

        setattr(api.objects, name, spied)
        await api.registry.uploads.complete(Announced("shop", digest, int(size)), upload_id, Said(), "child")

asyncio.run(main())
"""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of the test's own; what the test serves uses it, in other processes too."""
    if request.param != "filesystem":
        server = s3_servers.running(request.param)
        for name, value in server.settings(server.new_bucket()).items():
            monkeypatch.setenv(name, value)
    return str(request.param)


@pytest.fixture
async def api(tmp_path: Path, kind: str) -> AsyncIterator[Served]:
    async with served(tmp_path, **SETTINGS) as one:
        await one.add_app("shop")
        yield one


async def stored(api: Served) -> None:
    """The artifact is there, once, and nothing else is."""
    assert await api.keys() == {KEY}
    assert await api.download(DIGEST) == (200, DATA)
    async with api.database.read() as tx:
        assert await tx.scalar(sa.select(sa.func.count()).select_from(artifacts)) == 1


async def test_two_phases(api: Served, kind: str) -> None:
    signed = await api.presign("shop", DATA)
    assert await api.put(signed, DATA) == 200
    status, done = await api.complete("shop", DATA, signed["upload_id"])
    assert (status, done["duplicate"]) == (200, False)
    await stored(api)
    assert (await api.presign("shop", DATA))["method"] == "NONE"
    if kind != "filesystem":
        boto = s3_servers.running(kind).boto()
        try:
            found = boto.get_object(Bucket=os.environ["AETHER_ARTIFACT_BUCKET"], Key=KEY)
            assert hashlib.sha256(found["Body"].read()).hexdigest() == DIGEST
        finally:
            boto.close()


async def test_wrong_bytes_never_become_an_artifact(api: Served) -> None:
    signed = await api.presign("shop", DATA)
    accepted = await api.put(signed, b"x" * len(DATA)) == 200
    status, error = await api.complete("shop", DATA, signed["upload_id"])
    # a store that knows the checksum refuses the bytes itself
    assert (status, error["code"]) == ((400, "digest_mismatch") if accepted else (400, "bad_request"))
    assert await api.keys() == set()


async def test_another_length_than_signed_is_refused_by_the_store(api: Served) -> None:
    signed = await api.presign("shop", DATA)
    assert await api.put(signed, DATA[:-1]) >= 400
    status, error = await api.complete("shop", DATA, signed["upload_id"])
    assert (status, error["code"]) == (400, "bad_request")
    assert await api.keys() == set()


async def test_a_live_url_changes_nothing_that_is_stored(api: Served) -> None:
    signed = await api.presign("shop", DATA)
    await api.put(signed, DATA)
    assert (await api.complete("shop", DATA, signed["upload_id"]))[0] == 200
    await api.put(signed, b"x" * len(DATA))
    status, again = await api.complete("shop", DATA, signed["upload_id"])
    assert (status, again["duplicate"]) == (200, False)
    assert await api.download(DIGEST) == (200, DATA)
    late = PendingCollector(api.database, api.objects, api.settings, api.metrics, lambda: time.time() + 1000)
    await late.collect()
    await stored(api)


async def test_puts_that_race_with_complete_never_reach_the_artifact(api: Served) -> None:
    signed = await api.presign("shop", DATA)
    await api.put(signed, DATA)

    async def attack() -> None:
        for _ in range(5):
            await api.put(signed, b"x" * len(DATA))

    attacker = asyncio.create_task(attack())
    status, done = await api.complete("shop", DATA, signed["upload_id"])
    await attacker
    if status == 200:
        assert await api.download(DIGEST) == (200, DATA)
    else:
        assert done["code"] == "digest_mismatch"
        assert not any(key.startswith("artifacts/") for key in await api.keys())


@pytest.mark.parametrize("wrong", [b"x" * len(DATA), DATA[:-1], DATA + b"x"], ids=["bytes", "short", "long"])
@pytest.mark.parametrize("asks", ["1", "0"])
async def test_an_object_altered_before_complete_is_told(tmp_path: Path, kind: str, wrong: bytes, asks: str) -> None:
    """Whatever the toggles say: they only ask earlier."""
    toggles = {"AETHER_VERIFY_REMOTE_SIZE": asks, "AETHER_VERIFY_REMOTE_DIGEST": asks}
    async with served(tmp_path, **toggles) as api:
        await api.add_app("shop")
        signed = await api.presign("shop", DATA)
        await api.put(signed, DATA)
        await api.objects.put(f"pending/{signed['upload_id']}", stream(wrong), len(wrong))
        hashed: list[str] = []
        real = api.objects.sha256

        async def spied(key: str) -> tuple[str, int]:
            hashed.append(key)
            return await real(key)

        api.objects.sha256 = spied
        status, error = await api.complete("shop", DATA, signed["upload_id"])
        assert (status, error["code"]) == (400, "digest_mismatch")
        if len(wrong) != len(DATA):
            assert bool(hashed) is (asks == "0"), "a wrong size costs no reading where the store is asked for it"
        assert await api.keys() == set()
        assert api.sample("artifact_digest_mismatch_total") == 1


async def test_an_object_altered_after_complete_is_no_duplicate_where_it_is_read_again(
    tmp_path: Path, kind: str
) -> None:
    async with served(tmp_path, AETHER_VERIFY_REMOTE_HASH="1", AETHER_REMOTE_HASH_MAX_BYTES="400000") as api:
        await api.add_app("shop")
        await api.upload("shop", DATA)
        assert (await api.presign("shop", DATA))["duplicate"] is True
        await api.objects.put(KEY, stream(b"x" * len(DATA)), len(DATA))
        again = await api.presign("shop", DATA)
        assert again["duplicate"] is False
        await api.put(again, DATA)
        assert (await api.complete("shop", DATA, again["upload_id"]))[0] == 200
        await stored(api)


async def test_what_the_store_makes_of_the_bytes_on_their_last_way_is_told(tmp_path: Path, kind: str) -> None:
    async with served(tmp_path, AETHER_VERIFY_REMOTE_HASH="true") as api:
        await api.add_app("shop")
        signed = await api.presign("shop", DATA)
        await api.put(signed, DATA)
        move = api.objects.move

        async def spoiling(source: str, target: str) -> None:
            await move(source, target)
            await api.objects.put(target, stream(b"y" * len(DATA)), len(DATA))

        api.objects.move = spoiling
        status, error = await api.complete("shop", DATA, signed["upload_id"])
        assert (status, error["code"]) == (400, "digest_mismatch")
        assert await api.keys() == set()


# --- in parts


async def begun(api: Served, data: bytes = LARGE) -> tuple[str, list[dict[str, Any]]]:
    body = {"app": "shop", "digest": digest_of(data), "size_bytes": len(data)}
    status, made = await api.call("POST", "/artifacts/multipart/init", json=body)
    assert status == 200, made
    ask = {"app": "shop", "upload_id": made["upload_id"], "part_numbers": [1, 2]}
    return made["upload_id"], (await api.call("POST", "/artifacts/multipart/presign-part", json=ask))[1]["parts"]


async def put_parts(api: Served, signed: list[dict[str, Any]], data: bytes = LARGE) -> list[dict[str, Any]]:
    named: list[dict[str, Any]] = []
    for one in signed:
        start = (one["part_number"] - 1) * PART
        status, _, etag = await api.outside(one, data[start : start + one["size_bytes"]])
        assert status == 200
        named.append({"part_number": one["part_number"], "etag": etag})
    return named


async def complete(api: Served, upload_id: str, parts: list[dict[str, Any]]) -> tuple[int, Any]:
    body = {
        "app": "shop", "digest": digest_of(LARGE), "size_bytes": len(LARGE), "upload_id": upload_id, "parts": parts,
    }  # fmt: skip
    return await api.call("POST", "/artifacts/multipart/complete", json=body)


async def test_parts_and_what_is_wrong_with_them(api: Served) -> None:
    upload_id, signed = await begun(api)
    (first,) = await put_parts(api, signed[:1])
    status, error = await complete(api, upload_id, [first, {"part_number": 2, "etag": first["etag"]}])
    assert (status, error["code"]) == (400, "bad_request"), "a part that never came"
    again = await api.call(
        "POST", "/artifacts/multipart/init",
        json={"app": "shop", "digest": digest_of(LARGE), "size_bytes": len(LARGE)},
    )  # fmt: skip
    assert again[1]["upload_id"] == upload_id
    assert [(part["part_number"], part["size_bytes"]) for part in again[1]["parts"]] == [(1, PART)]
    (second,) = await put_parts(api, signed[1:])
    for parts in (
        [first], [second, first], [first, {**second, "etag": first["etag"]}], [{**first, "etag": "0" * 32}, second],
    ):  # fmt: skip
        status, error = await complete(api, upload_id, parts)
        assert (status, error["code"]) == (400, "bad_request"), parts
    answers = await asyncio.gather(*(complete(api, upload_id, [first, second]) for _ in range(10)))
    assert [(status, done["duplicate"]) for status, done in answers] == [(200, False)] * 10
    assert await api.download(digest_of(LARGE)) == (200, LARGE)
    try:
        status, _, _ = await api.outside(signed[0], b"x" * PART)
    except aiohttp.ClientOSError:
        status = 400  # a store may hang up before it has read what it refuses
    assert status >= 400, "a live URL of a part reaches nothing"
    assert len(await api.keys()) == 1


async def test_wrong_bytes_in_parts_leave_nothing(api: Served) -> None:
    upload_id, signed = await begun(api)
    parts = await put_parts(api, signed, b"x" + LARGE[1:])
    status, error = await complete(api, upload_id, parts)
    assert (status, error["code"]) == (400, "digest_mismatch")
    assert await api.keys() == set()


async def test_what_nobody_completed_is_given_up(api: Served) -> None:
    _, signed = await begun(api)
    await put_parts(api, signed[:1])
    pending = await api.presign("shop", DATA)
    await api.put(pending, DATA)
    await api.objects.begin_multipart("pending/left-by-a-killed-server")

    def collector(ahead: float) -> PendingCollector:
        return PendingCollector(api.database, api.objects, api.settings, api.metrics, lambda: time.time() + ahead)

    assert await collector(100).collect() == 0
    assert await collector(86_500).collect() == 3
    assert await api.keys() == set()
    assert [key async for key, _, _ in api.objects.multipart_uploads("pending/")] == []
    status, error = await api.complete("shop", DATA, pending["upload_id"])
    assert (status, error["code"]) in ((404, "not_found"), (409, "conflict"))


# --- kills, servers, the rest


@pytest.mark.parametrize("point", ["before-claim", "after-claim", "after-sha256", "before-move", "after-move"])
async def test_a_killed_server_loses_nothing(tmp_path: Path, kind: str, point: str) -> None:
    async with served(tmp_path) as api:
        await api.add_app("shop")
        signed = await api.presign("shop", DATA)
        await api.put(signed, DATA)
    arguments = [str(tmp_path), point, signed["upload_id"], DIGEST, str(len(DATA))]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", CHILD, *arguments, env=environ)
    assert await child.wait() == -signal.SIGKILL
    async with served(tmp_path) as api:
        assert await api.registry.recover() == 1
        await stored(api)
        assert (await api.complete("shop", DATA, signed["upload_id"]))[0] == 200
        async with api.database.read() as tx:
            assert set((await tx.execute(sa.select(uploads.c.status))).scalars()) == {"completed"}


async def test_two_servers_complete_one_upload(tmp_path: Path, kind: str) -> None:
    async with served(tmp_path, lease_secs=3) as one, served(tmp_path, lease_secs=3) as two:
        await one.add_app("shop")
        signed = await one.presign("shop", DATA)
        await one.put(signed, DATA)
        answers = await asyncio.gather(
            *(api.complete("shop", DATA, signed["upload_id"]) for _ in range(4) for api in (one, two))
        )
        assert [(status, done["duplicate"]) for status, done in answers] == [(200, False)] * 8
        await stored(two)


async def test_a_quota_holds_and_what_is_refused_is_deleted(tmp_path: Path, kind: str) -> None:
    async with served(tmp_path, AETHER_MAX_ARTIFACTS_PER_APP="3", AETHER_RETAIN_LATEST_PER_APP="0") as api:
        await api.add_app("shop")
        ready: list[tuple[bytes, str]] = []
        for _ in range(8):
            data = random_bytes(1000)
            signed = await api.presign("shop", data)
            await api.put(signed, data)
            ready.append((data, signed["upload_id"]))
        answers = await asyncio.gather(*(api.complete("shop", data, upload_id) for data, upload_id in ready))
        assert sorted(status for status, _ in answers) == [200] * 3 + [403] * 5
        assert len(await api.keys()) == 3


async def test_documents_and_the_deprecated_upload(api: Served) -> None:
    headers = {"X-Aether-Artifact-Digest": DIGEST}
    status, done = await api.call("POST", "/artifacts?app=shop", data=DATA, headers=headers)
    assert (status, done["duplicate"]) == (200, False)
    await stored(api)
    for kind, body in (("sbom", supply.sbom(DIGEST)), ("manifest", supply.manifest(DIGEST))):
        assert (await api.call("POST", f"/artifacts/{DIGEST}/{kind}", data=body))[0] == 201
        async with api.client.get(f"{api.base}/artifacts/{DIGEST}/{kind}") as answer:
            assert await answer.read() == body
    assert len(await api.keys()) == 3
    await api.upload("shop", random_bytes(10))
    sweeper = ArtifactSweeper(api.database, api.registry, Keep(1, 0.0), lambda: time.time() + 5)
    assert (await sweeper.sweep(dry_run=False)).deleted == 1
    assert not [key for key in await api.keys() if DIGEST in key], "documents go with their artifact"


async def test_objects_that_no_row_knows_go_when_they_are_old(api: Served) -> None:
    await api.upload("shop", DATA)
    await api.objects.put(storage_key("shop", "e" * 64), stream(b"left"), 4)
    orphans = OrphanSweeper(api.database, api.objects, api.registry, 10.0)
    assert (await orphans.sweep(dry_run=False)).deleted == 0, "an upload may be under way"
    later = OrphanSweeper(api.database, api.objects, api.registry, 10.0, lambda: time.time() + 100)
    assert (await later.sweep(dry_run=True)).deleted == 1
    assert (await later.sweep(dry_run=False)).deleted == 1
    await stored(api)
