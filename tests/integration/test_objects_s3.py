"""What is S3's own: starting against wrong settings, encryption, large copies, pages, and what boto3 reads back."""

from __future__ import annotations

import asyncio
import glob
import io
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aether.model.errors import BadRequest, ConfigError, NotFound, ServiceUnavailable
from aether.model.objects import MIN_PART_BYTES
from aether.observability.logging import configure
from aether.stores.objects.s3 import S3Objects
from aether.stores.objects.s3_client import S3Options
from support import s3_servers
from support.product import free_port
from support.relay import relay
from support.s3_servers import KMS_KEY, S3Server
from support.served import digest_of, random_bytes
from support.stores import Bench, bench, credentials, stream

KEY, FINAL = "pending/one", "artifacts/shop/0123/app.tar.gz"


@pytest.fixture(params=s3_servers.kinds())
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    credentials(request.param, monkeypatch)
    return s3_servers.running(request.param)


@pytest.fixture
async def store(server: S3Server, tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(server.name, tmp_path) as made:
        yield made


async def refused(options: S3Options) -> str:
    store = S3Objects(options)
    with pytest.raises(ConfigError) as caught:
        await store.open()
    return caught.value.message


async def starts(store: S3Objects) -> S3Objects | None:
    """None when it is refused because the server does not encrypt."""
    try:
        await store.open()
    except ConfigError as error:
        if "AETHER_S3_SSE" not in error.message:
            raise
        return None
    return store


# --- starting


async def test_a_bucket_that_is_not_there(server: S3Server) -> None:
    message = await refused(S3Options("aether-nowhere", server.endpoint))
    assert "there is no bucket 'aether-nowhere'" in message
    assert "AETHER_ARTIFACT_BUCKET" in message


async def test_wrong_credentials(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = server.new_bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    message = await refused(S3Options(bucket, server.endpoint))
    assert "AWS_SECRET_ACCESS_KEY" in message
    assert "wrong-secret" not in message
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    assert "AWS_ACCESS_KEY_ID" in await refused(S3Options(bucket, server.endpoint))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no credentials" in await refused(S3Options(bucket, server.endpoint))


def test_a_clock_that_is_wrong(server: S3Server) -> None:
    libraries = glob.glob("/usr/lib/*/faketime/libfaketime.so.1")
    if not libraries:
        pytest.skip("component: faketime")
    program = (
        "import asyncio, sys\n"
        "from aether.model.errors import ConfigError\n"
        "from aether.stores.objects.s3 import S3Objects\n"
        "from aether.stores.objects.s3_client import S3Options\n"
        "try:\n    asyncio.run(S3Objects(S3Options(*sys.argv[1:])).open())\n"
        "except ConfigError as error:\n    print(error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, server.new_bucket(), server.endpoint],
        env={**os.environ, "LD_PRELOAD": libraries[0], "FAKETIME": "+2h", "DONT_FAKE_MONOTONIC": "1"},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "clock" in done.stdout, done.stdout + done.stderr
    assert "NTP" in done.stdout


async def test_a_store_that_is_away_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3Server("none", "").environ().items():
        monkeypatch.setenv(name, value)
    endpoint = f"http://127.0.0.1:{free_port()}"
    store = S3Objects(S3Options("artifacts", endpoint))
    await store.open()
    try:
        for asked in (store.check(), store.sign_put(KEY, 5, 60, sha256="0" * 64), store.claim(KEY), store.size(KEY)):
            with pytest.raises(ServiceUnavailable) as caught:
                await asyncio.wait_for(asked, 20)
            assert "Traceback" not in caught.value.message
        with pytest.raises(ServiceUnavailable, match=r"cannot be reached.*AETHER_S3_ENDPOINT_URL"):
            await store.check()
    finally:
        await store.close()


async def test_what_answers_is_no_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3Server("none", "").environ().items():
        monkeypatch.setenv(name, value)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 405 No\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
        await writer.drain()
        writer.close()

    web = await asyncio.start_server(answer, "127.0.0.1", 0)
    message = await refused(S3Options("artifacts", f"http://127.0.0.1:{web.sockets[0].getsockname()[1]}"))
    assert "does not do what Aether needs of S3" in message
    web.close()


async def test_probing_leaves_nothing(store: Bench) -> None:
    assert await store.keys() == []


async def test_no_log_tells_what_signs_a_request(server: S3Server, tmp_path: Path) -> None:
    root, out = logging.getLogger(), io.StringIO()
    before, level = root.handlers[:], root.level
    try:
        configure("trace", "json", out)
        async with bench(server.name, tmp_path) as store:
            await store.objects.put(FINAL, stream(b"x"))
            await store.objects.sign_put(KEY, 5, 60)
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    for told in (server.secret_key, "Signature", "Authorization"):
        assert told not in out.getvalue()


# --- encryption


async def test_every_write_asks_for_encryption(server: S3Server, tmp_path: Path) -> None:
    """The signed URLs too. Both servers take AES256 and do nothing with it, which is refused at the start: what is
    sent is looked at on the wire."""
    bucket = server.new_bucket()
    async with relay(server.endpoint) as wire:
        options = S3Options(bucket, wire.url, sse="AES256", copy_part_bytes=MIN_PART_BYTES)
        store = S3Objects(options)
        if await starts(store) is None:
            async with bench(server.name, tmp_path, bucket=bucket) as plain:
                store = S3Objects(options)
                await store._clients.open(options)
                store._abilities = await plain.objects.abilities()
        wire.asked.clear()
        signed = await store.sign_put(KEY, 5, 60)
        assert signed.headers == {"x-amz-server-side-encryption": "AES256"}
        assert "x-amz-server-side-encryption" in signed.url
        await store.put(KEY, stream(random_bytes(MIN_PART_BYTES + 1)), MIN_PART_BYTES + 1)
        await store.put("pending/two", stream(b"x"))
        await store.put("pending/three", stream(random_bytes(9_000_000)))
        await store.begin_multipart("pending/four")
        await store.move(await store.claim(KEY), FINAL)
        await store.move(await store.claim("pending/two"), "artifacts/shop/two/app.tar.gz")
        writes = [
            head
            for head in wire.requests()
            if (head.startswith("put ") and "partnumber" not in head.partition("\r\n")[0])
            or (head.startswith("post ") and "uploads" in head.partition("\r\n")[0])
        ]
        assert len(writes) >= 8
        assert [head for head in writes if "x-amz-server-side-encryption: aes256" not in head] == []
        await store.close()


async def test_encryption_with_a_key_of_the_key_service(server: S3Server, tmp_path: Path) -> None:
    bucket = server.new_bucket()
    store = S3Objects(S3Options(bucket, server.endpoint, sse="aws:kms", sse_kms_key=KMS_KEY))
    if await starts(store) is None:
        pytest.skip(f"unsupported: {server.name}: encryption with aws:kms")
    await store.close()
    data, large = random_bytes(300_000), random_bytes(MIN_PART_BYTES + 10)
    async with bench(server.name, tmp_path, bucket=bucket, sse="aws:kms", sse_kms_key=KMS_KEY) as made:
        signed = await made.objects.sign_put(KEY, len(data), 60)
        assert signed.headers["x-amz-server-side-encryption-aws-kms-key-id"] == KMS_KEY
        assert (await made.send(signed, data, headers={})).status == 403
        assert (await made.send(signed, data)).status == 200
        upload = await made.objects.begin_multipart("pending/large")
        etags = [
            await made.put_part("pending/large", upload, 1, large[:MIN_PART_BYTES]),
            await made.put_part("pending/large", upload, 2, large[MIN_PART_BYTES:]),
        ]
        await made.objects.finish_multipart("pending/large", upload, list(enumerate(etags, 1)))
        for key, content in ((KEY, data), ("pending/large", large)):
            claimed = await made.objects.claim(key)
            assert (await made.objects.sha256(claimed))[0] == digest_of(content)
            await made.objects.move(claimed, FINAL)
            found = server.boto().head_object(Bucket=bucket, Key=FINAL)
            assert (found["ServerSideEncryption"], found["SSEKMSKeyId"]) == ("aws:kms", KMS_KEY)
            assert await made.content(FINAL) == content


# --- sizes and numbers


async def test_large_objects_are_copied_in_parts(server: S3Server, tmp_path: Path) -> None:
    data = random_bytes(3 * MIN_PART_BYTES + 77)
    async with relay(server.endpoint) as wire:
        bucket = server.new_bucket()
        store = S3Objects(S3Options(bucket, wire.url, copy_part_bytes=MIN_PART_BYTES))
        await store.open()
        await store.put(KEY, stream(data), len(data))
        wire.asked.clear()
        claimed = await store.claim(KEY)
        await store.move(claimed, FINAL)
        copies = [head for head in wire.requests() if "x-amz-copy-source-range" in head]
        assert len(copies) == 8
        assert await store.sha256(FINAL) == (digest_of(data), len(data))
        assert [found async for found in store.multipart_uploads("artifacts/")] == []
        assert [key async for key, _, _ in store.list("")] == [FINAL]
        await store.close()


async def test_lists_go_on_over_pages(store: Bench) -> None:
    assert store.server is not None
    client = store.server.boto(max_pool_connections=16)
    with ThreadPoolExecutor(16) as threads:
        for done in [
            threads.submit(client.put_object, Bucket=store.bucket, Key=f"artifacts/a/{n:04d}/sbom.json", Body=b"x")
            for n in range(1005)
        ]:
            await asyncio.wrap_future(done)
    assert await store.keys("artifacts/") == [f"artifacts/a/{n:04d}/sbom.json" for n in range(1005)]


async def test_boto3_reads_what_was_stored(store: Bench) -> None:
    assert store.server is not None
    data = random_bytes(2_000_000)
    await store.put(KEY, data)
    await store.objects.move(await store.objects.claim(KEY), FINAL)
    found = store.server.boto().get_object(Bucket=store.bucket, Key=FINAL)
    assert found["Body"].read() == data
    signed = await store.objects.sign_get(FINAL, 60, "x")
    assert signed.url.startswith(store.server.endpoint)


async def test_clients_may_reach_the_store_by_another_name(server: S3Server, tmp_path: Path) -> None:
    async with relay(server.endpoint) as wire, bench(server.name, tmp_path, public_url=wire.url) as store:
        await store.put(KEY, b"12345")
        assert (await store.objects.sign_put(KEY, 5, 60)).url.startswith(wire.url)
        assert len(wire.requests()) == 1


async def test_what_is_too_large_for_one_put_goes_in_parts(store: Bench) -> None:
    with pytest.raises(BadRequest, match="in parts"):
        await store.objects.sign_put(KEY, 5 * 1024**3 + 1, 60)


async def test_a_read_that_breaks_goes_on_where_it_broke(server: S3Server) -> None:
    data = random_bytes(6_000_000)
    bucket = server.new_bucket()
    async with relay(server.endpoint) as wire:
        store = S3Objects(S3Options(bucket, wire.url))
        await store.open()
        await store.put(FINAL, stream(data))
        wire.asked.clear()
        wire.cut_after = 2_500_000
        assert await store.sha256(FINAL) == (digest_of(data), len(data))
        assert wire.cuts == 1
        ranges = [head for head in wire.requests() if head.startswith("get ") and "range: bytes=" in head]
        assert len(ranges) == 1
        with pytest.raises(NotFound):
            await store.sha256("artifacts/none/0/app.tar.gz")
        await store.close()
