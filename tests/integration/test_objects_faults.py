"""S3 under faults, for real: the server killed and back, ours killed at every step, two of ours doing the same."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from aether.apps.artifacts import UnpackedArtifacts
from aether.model.errors import AetherError, NotFound, ServiceUnavailable
from aether.model.objects import MIN_PART_BYTES
from aether.registry.ports import ObjectStore
from aether.stores.objects.s3 import S3Objects
from aether.stores.objects.s3_client import S3Options
from support import s3_servers
from support.s3_servers import S3Server
from support.served import digest_of, random_bytes
from support.server import pack
from support.stores import Bench, bench, credentials, stream

KEY, FINAL = "pending/one", "artifacts/shop/0123/app.tar.gz"
KINDS = [kind for kind in s3_servers.kinds() if kind != "external"]
"""Servers that the tests may kill."""
SOON_SECS = 15.0
"""Within this a call says that the store is away."""


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    credentials(request.param, monkeypatch)
    running = s3_servers.running(request.param)
    yield running
    running.ensure()


@pytest.fixture
async def store(server: S3Server, tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(server.name, tmp_path) as made:
        yield made


# --- the server goes away


async def test_a_server_that_is_away_is_told_in_time_and_nothing_is_lost(store: Bench) -> None:
    assert store.server is not None
    data, kept = random_bytes(300_000), random_bytes(1000)
    await store.objects.put(FINAL, stream(kept))
    await store.put(KEY, data)
    upload = await store.objects.begin_multipart("pending/two")
    etag = await store.put_part("pending/two", upload, 1, data)
    claimed = await store.objects.claim(KEY)
    await store.put("pending/three", data)
    store.server.kill9()
    objects = store.objects
    for asked in (
        lambda: objects.size(FINAL),
        lambda: objects.sha256(claimed),
        lambda: objects.claim("pending/three"),
        lambda: objects.move(claimed, "artifacts/shop/1/app.tar.gz"),
        lambda: objects.put(FINAL, stream(b"x" * 2_000_000), 2_000_000),
        lambda: objects.put(FINAL, stream(b"x" * 20_000_000)),
        lambda: objects.delete(FINAL),
        lambda: objects.parts("pending/two", upload),
        lambda: objects.finish_multipart("pending/two", upload, [(1, etag)]),
        lambda: objects.abort_multipart("pending/two", upload),
        lambda: store.keys(),
    ):
        began = time.monotonic()
        with pytest.raises(ServiceUnavailable, match="does not answer"):
            await asked()
        assert time.monotonic() - began < SOON_SECS
    assert (await objects.sign_put(KEY, 5, 60)).url, "signing needs no server"
    store.server.start()
    assert await store.content(FINAL) == kept
    await objects.finish_multipart("pending/two", upload, [(1, etag)])
    for key, final in ((KEY, "1"), ("pending/two", "2"), ("pending/three", "3")):
        again = await objects.claim(key) if key != KEY else claimed
        assert await objects.sha256(again) == (digest_of(data), len(data))
        await objects.move(again, f"artifacts/shop/{final}/app.tar.gz")
    assert await store.keys() == ["artifacts/shop/0123/app.tar.gz"] + [
        f"artifacts/shop/{final}/app.tar.gz" for final in "123"
    ]


async def test_the_server_is_killed_while_parts_arrive(store: Bench) -> None:
    """What was answered is there afterwards, what was not is sent again."""
    assert store.server is not None
    data = [random_bytes(MIN_PART_BYTES) for _ in range(4)]
    upload = await store.objects.begin_multipart(KEY)
    first = await store.put_part(KEY, upload, 1, data[0])

    async def put(number: int) -> str | None:
        signed = await store.objects.sign_part(KEY, upload, number, MIN_PART_BYTES, 60)
        try:
            answer = await store.send(signed, data[number - 1])
        except OSError:
            return None
        return answer.etag if answer.status == 200 else None

    sending = [asyncio.create_task(put(number)) for number in (2, 3, 4)]
    await asyncio.sleep(0.02)
    store.server.kill9()
    sent = {number: await task for number, task in zip((2, 3, 4), sending, strict=True)}
    store.server.start()
    arrived = {part.number: f'"{part.etag}"' for part in await store.objects.parts(KEY, upload)}
    assert arrived[1] == first
    for number, etag in sent.items():
        assert etag is None or arrived[number] == etag
        if number not in arrived:
            arrived[number] = await store.put_part(KEY, upload, number, data[number - 1])
    await store.objects.finish_multipart(KEY, upload, sorted(arrived.items()))
    assert (await store.objects.sha256(KEY))[0] == digest_of(b"".join(data))


class KillsItsServer(S3Objects):
    """Kills the server after some blocks of the first read, and has it back after `away_secs`."""

    def __init__(self, options: S3Options, server: S3Server, away_secs: float) -> None:
        super().__init__(options)
        self._killed = False
        self._server = server
        self._away_secs = away_secs

    async def read(self, key: str, chunk_bytes: int = 1 << 20, start: int = 0) -> AsyncGenerator[bytes]:
        count = 0
        async for block in super().read(key, 100_000, start):
            count += 1
            if count == 3 and not self._killed:
                self._killed = True
                self._server.kill9()
                asyncio.get_running_loop().call_later(self._away_secs, self._server.start)
            yield block


async def test_hashing_outlives_a_server_that_is_back_at_once(server: S3Server) -> None:
    data = random_bytes(30_000_000)
    store = KillsItsServer(S3Options(server.new_bucket(), server.endpoint), server, 0.3)
    await store.open()
    await store.put(FINAL, stream(data))
    assert await store.sha256(FINAL) == (digest_of(data), len(data))
    await store.close()


async def test_unpacking_waits_for_a_server_that_is_away_for_ten_seconds(server: S3Server, tmp_path: Path) -> None:
    archive = pack({"noise": random_bytes(20_000_000).hex()})
    digest = digest_of(archive)
    store = KillsItsServer(S3Options(server.new_bucket(), server.endpoint), server, 10.0)
    await store.open()
    await store.put(f"artifacts/shop/{digest}/app.tar.gz", stream(archive))
    source = UnpackedArtifacts(tmp_path / "releases", store)
    await source.open()
    began = time.monotonic()
    folder = await source.unpack("shop", digest, None)
    assert time.monotonic() - began > 10
    assert (folder / "noise").stat().st_size == 40_000_000
    assert [item.name for item in (tmp_path / "releases").iterdir() if item.name.startswith(".fetched")] == []
    with pytest.raises(NotFound):
        await source.unpack("shop", "0" * 64, None)
    await source.close()
    await store.close()


# --- our own server is killed

CHILD = """
import asyncio, os, signal, sys
from aether.stores.objects.s3 import S3Objects
from aether.stores.objects.s3_client import S3Options

async def main(bucket, endpoint, steps):
    asked = 0

    def before_send(**_):
        nonlocal asked
        asked += 1
        if asked > steps:
            os.kill(os.getpid(), signal.SIGKILL)

    store = S3Objects(S3Options(bucket, endpoint, copy_part_bytes=5 * 1024**2))
    await store.open()
    for client in (store._clients.calling, store._clients.once):
        client.meta.events.register("before-send.s3", before_send)
    claimed = await store.claim("pending/one")
    await store.sha256(claimed)
    await store.move(claimed, "artifacts/shop/0123/app.tar.gz")
    await store.close()

for line in sys.stdin:  # what takes long, the imports, is done once
    child = os.fork()
    if not child:
        asyncio.run(main(sys.argv[1], sys.argv[2], int(line)))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
async def killed_at(store: Bench) -> AsyncIterator[Callable[[int], Awaitable[bool]]]:
    """Complete the upload in a process that is killed before so many requests; False when it came to its end."""
    assert store.server is not None
    pipe = asyncio.subprocess.PIPE
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, store.bucket, store.server.endpoint, stdin=pipe, stdout=pipe
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    stdin, stdout = parent.stdin, parent.stdout

    async def run(steps: int) -> bool:
        stdin.write(b"%d\n" % steps)
        code = int(await asyncio.wait_for(stdout.readline(), 60))
        assert code in (0, -signal.SIGKILL)
        return code != 0

    yield run
    stdin.close()
    await parent.wait()


@pytest.mark.parametrize("size", [1000, MIN_PART_BYTES + 10])
async def test_claim_and_move_go_on_after_kill_9_at_every_step(
    store: Bench, size: int, killed_at: Callable[[int], Awaitable[bool]]
) -> None:
    data = random_bytes(size)
    signed = await store.objects.sign_put(KEY, size, 900)
    for steps in range(60):
        assert (await store.send(signed, data)).status == 200
        killed = await killed_at(steps)
        if killed:
            try:
                claimed = await store.objects.claim(KEY)
                assert await store.objects.sha256(claimed) == (digest_of(data), len(data)), steps
            except NotFound:
                claimed = "claimed/one/gone"
            await store.objects.move(claimed, FINAL)
        assert digest_of(await store.content(FINAL)) == digest_of(data), steps
        assert await store.keys() == [FINAL], steps
        async for key, upload, _ in store.objects.multipart_uploads(""):
            await store.objects.abort_multipart(key, upload)  # the collector's to find
        await store.objects.delete(FINAL)
        if not killed:
            break
    assert 7 < steps < 59, "the child was not killed where it should have been"


async def test_two_servers_complete_the_same_uploads_at_once(store: Bench) -> None:
    assert store.server is not None
    other = S3Objects(S3Options(store.bucket, store.server.endpoint))
    await other.open()
    for number in range(6):
        key, final, data = f"pending/u{number}", f"artifacts/shop/{number}/app.tar.gz", random_bytes(50_000)
        signed = await store.objects.sign_put(key, len(data), 60)
        assert (await store.send(signed, data)).status == 200

        async def complete(
            objects: ObjectStore, key: str = key, final: str = final, digest: str = digest_of(data)
        ) -> bool:
            try:
                claimed = await objects.claim(key)
                if (await objects.sha256(claimed))[0] != digest:
                    await objects.delete(claimed)
                    return False
                await objects.move(claimed, final)
            except NotFound:
                await objects.size(final)
            return True

        # and somebody with the live URL, at the same time
        replaced = store.send(signed, random_bytes(len(data)))
        done = await asyncio.gather(complete(store.objects), complete(other), replaced, return_exceptions=True)
        found = await store.keys(final)
        if found:
            assert digest_of(await store.content(final)) == digest_of(data), "only verified bytes are ever final"
        else:
            assert False in done or any(isinstance(one, AetherError) for one in done)
    await other.close()
