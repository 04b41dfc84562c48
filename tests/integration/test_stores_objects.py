"""The directory store under real limits: a full disk, big bodies, moves and races."""

from __future__ import annotations

import asyncio
import http.client
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from aether.model.errors import BadRequest, Forbidden, NotFound, ServiceUnavailable
from aether.stores.objects.filesystem import FilesystemObjects
from aether.stores.objects.signing import UrlSigner, load_key
from support.served import digest_of, random_bytes, served


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[FilesystemObjects]:
    made = FilesystemObjects(tmp_path / "objects", UrlSigner(b"k" * 32))
    await made.open()
    yield made
    await made.close()


async def put(store: FilesystemObjects, name: str, data: bytes) -> str:
    url = (await store.sign_put(f"pending/{name}", len(data), 60)).url
    path, _, query = url.partition("?")
    upload = await store.receive(store.authorize("PUT", path.removeprefix("/objects/"), query))
    await upload.add(memoryview(data))
    await upload.finish()
    return f"pending/{name}"


async def test_an_object_goes_from_pending_to_final(store: FilesystemObjects) -> None:
    data = random_bytes(3_000_000)
    claimed = await store.claim(await put(store, "one", data))
    assert await store.claim("pending/one") == claimed
    assert await store.sha256(claimed) == (digest_of(data), len(data))
    await store.move(claimed, "artifacts/a/d/app.tar.gz")
    await store.move(claimed, "artifacts/a/d/app.tar.gz")
    assert b"".join([block async for block in store.read("artifacts/a/d/app.tar.gz", 100_000)]) == data
    path = store.local_path("artifacts/a/d/app.tar.gz")
    assert path is not None
    assert os.stat(path).st_mode & 0o777 == 0o400
    found = [(key, size) async for key, size, _ in store.list("artifacts/")]
    assert found == [("artifacts/a/d/app.tar.gz", len(data))]
    await store.delete("artifacts/a/d/app.tar.gz")
    await store.delete("artifacts/a/d/app.tar.gz")
    assert [found async for found in store.list("artifacts/")] == []


async def test_a_move_that_another_one_overtakes_is_done(
    store: FilesystemObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random_bytes(1000)
    claimed = await store.claim(await put(store, "one", data))
    final = "artifacts/a/d/app.tar.gz"
    flush = os.fsync
    overtaken: list[bool] = []

    def overtake(descriptor: int) -> None:
        flush(descriptor)
        if not overtaken:
            overtaken.append(True)
            store._move(store._path(claimed), store._path(final))

    monkeypatch.setattr(os, "fsync", overtake)
    await store.move(claimed, final)
    assert overtaken
    assert b"".join([block async for block in store.read(final)]) == data


async def test_missing_objects_are_not_found(store: FilesystemObjects) -> None:
    with pytest.raises(NotFound):
        await store.size("pending/none")
    with pytest.raises(NotFound):
        await store.sha256("pending/none")
    with pytest.raises(NotFound):
        await store.claim("pending/none")
    with pytest.raises(NotFound):
        await store.move("claimed/none", "artifacts/a/d/app.tar.gz")


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/.parts/x", ".parts/x", "a\0b", "a b"]
)
async def test_keys_never_leave_the_folder(store: FilesystemObjects, key: str) -> None:
    with pytest.raises(BadRequest):
        await store.size(key)


async def test_only_pending_objects_can_be_written(store: FilesystemObjects) -> None:
    path, _, query = (await store.sign_put("artifacts/a/d/app.tar.gz", 5, 60)).url.partition("?")
    with pytest.raises(Forbidden):
        store.authorize("PUT", path.removeprefix("/objects/"), query)


async def test_urls_begin_where_clients_reach_the_server(tmp_path: Path) -> None:
    store = FilesystemObjects(tmp_path, UrlSigner(b"k" * 32), base_url="https://aether.example.com/")
    assert (await store.sign_put("pending/x", 5, 60)).url.startswith("https://aether.example.com/objects/pending/x?")
    await store.close()


async def test_moves_and_deletes_may_race(store: FilesystemObjects) -> None:
    """Deleting prunes empty folders under a move's feet."""
    for n in range(50):
        claimed = await store.claim(await put(store, f"n{n}", b"x"))
        old = await store.claim(await put(store, f"o{n}", b"y"))
        await store.move(old, "artifacts/a/old/app.tar.gz")
        await asyncio.gather(
            store.delete("artifacts/a/old/app.tar.gz"), store.move(claimed, f"artifacts/a/d{n}/app.tar.gz")
        )
        assert await store.size(f"artifacts/a/d{n}/app.tar.gz") == 1
        await store.delete(f"artifacts/a/d{n}/app.tar.gz")


async def test_an_aborted_upload_in_the_middle_of_a_write(store: FilesystemObjects, tmp_path: Path) -> None:
    path, _, query = (await store.sign_put("pending/x", 50_000_000, 60)).url.partition("?")
    upload = await store.receive(store.authorize("PUT", path.removeprefix("/objects/"), query))
    writing = asyncio.create_task(upload.add(memoryview(bytes(50_000_000))))
    await asyncio.sleep(0)
    await upload.abort()
    await writing
    with pytest.raises(BadRequest):
        await upload.finish()
    await upload.abort()
    assert [path for path in (tmp_path / "objects").rglob("*") if path.is_file()] == []


def test_the_signing_key_is_made_once_and_private(tmp_path: Path) -> None:
    key = load_key(tmp_path / "signing.key")
    assert len(key) == 32
    assert load_key(tmp_path / "signing.key") == key
    assert (tmp_path / "signing.key").stat().st_mode & 0o777 == 0o600


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("a full disk is tested on a tmpfs, and mounting one needs root: run as root to test it")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, small_disk: Path) -> None:
    async with served(tmp_path, small_disk / "objects") as api:
        await api.add_app("shop")
        big, fits = random_bytes(20_000_000), random_bytes(5_000_000)
        signed = await api.presign("shop", big)
        status, error = await api.call("PUT", signed["url"], data=asyncio_file(tmp_path, big))
        assert (status, error["code"]) == (503, "service_unavailable")
        assert "full" in error["message"]
        assert not any((small_disk / "objects").rglob("*.part"))
        assert (await api.upload("shop", fits))["size_bytes"] == len(fits)


async def test_a_disk_that_fills_up_while_receiving(small_disk: Path) -> None:
    store = FilesystemObjects(small_disk / "objects", UrlSigner(b"k" * 32))
    await store.open()
    path, _, query = (await store.sign_put("pending/x", 6_000_000, 60)).url.partition("?")
    grant = store.authorize("PUT", path.removeprefix("/objects/"), query)
    first, second = await store.receive(grant), await store.receive(grant)
    await first.add(memoryview(bytes(5_000_000)))
    with pytest.raises(ServiceUnavailable, match="full"):
        await second.add(memoryview(bytes(5_000_000)))
    await second.abort()
    await first.add(memoryview(bytes(1_000_000)))
    await first.finish()
    assert await store.size("pending/x") == 6_000_000
    await store.close()


def asyncio_file(folder: Path, data: bytes) -> object:
    """aiohttp streams an open file without holding it in memory."""
    path = folder / "body"
    path.write_bytes(data)
    return path.open("rb")


SERVER = """
import asyncio, sys
from pathlib import Path
from support.served import served
async def main():
    async with served(Path(sys.argv[1])) as api:
        await api.add_app("shop")
        signed = await api.presign("shop", b"warm up")
        await api.put(signed, b"warm up")
        await api.complete("shop", b"warm up", signed["upload_id"])
        print("PORT", api.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)
import uvloop
uvloop.run(main())
"""


def resident_bytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def test_memory_stays_bounded_for_500_megabytes(tmp_path: Path) -> None:
    import hashlib
    import json

    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path)],
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdout is not None
        line = ""
        while not line.startswith("PORT"):
            line = server.stdout.readline()
        before = resident_bytes(server.pid, "VmRSS")
        block, digest = random_bytes(1 << 20), hashlib.sha256()
        for _ in range(500):
            digest.update(block)
        size = 500 << 20
        connection = http.client.HTTPConnection("127.0.0.1", int(line.split()[1]), blocksize=1 << 20)
        headers = {"Authorization": "Bearer tok-deployer", "Content-Type": "application/json"}
        body = {"app": "shop", "digest": digest.hexdigest(), "size_bytes": size}

        def call(method: str, path: str, data: object, extra: dict[str, str]) -> dict[str, object]:
            connection.request(method, path, data, extra)  # type: ignore[arg-type]
            answer = connection.getresponse()
            decoded = json.loads(answer.read())
            assert answer.status == 200, decoded
            return decoded

        signed = call("POST", "/artifacts/presign", json.dumps(body), headers)
        blocks = (block for _ in range(500))
        call("PUT", str(signed["url"]), blocks, {"Content-Length": str(size)})
        done = {**body, "upload_id": signed["upload_id"]}
        assert call("POST", "/artifacts/complete", json.dumps(done), headers)["size_bytes"] == size
        connection.request("GET", f"/artifacts/{body['digest']}/download", headers=headers)
        redirect = connection.getresponse()
        redirect.read()
        connection.request("GET", str(redirect.headers["Location"]))
        download = connection.getresponse()
        received = hashlib.sha256()
        while chunk := download.read(1 << 20):
            received.update(chunk)
        assert received.hexdigest() == body["digest"]
        grown = resident_bytes(server.pid, "VmHWM") - before
        connection.close()
        assert server.stdin is not None
        server.stdin.close()
        server.wait(timeout=20)
    assert grown < 32 << 20, f"the server grew by {grown >> 20} MiB"
