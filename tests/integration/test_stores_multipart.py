"""Uploads in parts on a directory: the HTTP side, and what kill -9 leaves at every step."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aether.model.errors import BadRequest, NotFound
from aether.model.objects import MIN_PART_BYTES
from aether.stores.objects.filesystem import FilesystemObjects
from aether.stores.objects.signing import UrlSigner
from support.served import Served, digest_of, random_bytes, served

KEY = "pending/one"
SIZES = [MIN_PART_BYTES, MIN_PART_BYTES + 7, 1000]


async def put_part(api: Served, upload: str, number: int, data: bytes) -> tuple[int, str]:
    signed = await api.objects.sign_part(KEY, upload, number, len(data), 60)
    async with api.client.put(api.base + signed.url, data=io.BytesIO(data)) as answer:
        return answer.status, answer.headers.get("ETag", "")


def listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder / "objects")) for path in (folder / "objects").rglob("*") if path.is_file()}


async def test_parts_are_put_over_http_and_become_one_object(tmp_path: Path) -> None:
    data = [random_bytes(size) for size in SIZES]
    async with served(tmp_path) as api:
        upload = await api.objects.begin_multipart(KEY)
        etags: dict[int, str] = {}
        for number in (3, 1, 2):
            status, etags[number] = await put_part(api, upload, number, data[number - 1])
            assert status == 200
        assert etags[1].startswith('"')
        found = await api.objects.parts(KEY, upload)
        assert [(part.number, part.size_bytes, f'"{part.etag}"') for part in found] == [
            (number, SIZES[number - 1], etags[number]) for number in (1, 2, 3)
        ]
        await api.objects.finish_multipart(KEY, upload, sorted(etags.items()))
        await api.objects.finish_multipart(KEY, upload, sorted(etags.items()))
        assert listed(tmp_path) == {KEY}
        assert await api.objects.sha256(KEY) == (digest_of(b"".join(data)), sum(SIZES))
        assert (await put_part(api, upload, 2, data[1]))[0] == 404
        await api.objects.claim(KEY)
        await api.objects.finish_multipart(KEY, upload, sorted(etags.items()))


async def test_a_part_sent_again_replaces_the_one_before(tmp_path: Path) -> None:
    old, new = random_bytes(1000), random_bytes(1000)
    async with served(tmp_path) as api:
        upload = await api.objects.begin_multipart(KEY)
        _, before = await put_part(api, upload, 1, old)
        assert await put_part(api, upload, 1, old) == (200, before)
        _, after = await put_part(api, upload, 1, new)
        assert [f'"{part.etag}"' for part in await api.objects.parts(KEY, upload)] == [after]
        with pytest.raises(BadRequest, match="another ETag"):
            await api.objects.finish_multipart(KEY, upload, [(1, before)])
        await api.objects.finish_multipart(KEY, upload, [(1, after)])
        assert await api.objects.sha256(KEY) == (digest_of(new), 1000)


async def test_a_url_of_a_part_is_for_that_part_only(tmp_path: Path) -> None:
    async with served(tmp_path) as api:
        upload = await api.objects.begin_multipart(KEY)
        signed = (await api.objects.sign_part(KEY, upload, 1, 5, 60)).url
        for altered in (
            signed.replace("part=1", "part=2"),
            signed.replace("size=5", "size=6"),
            signed.replace(upload, "0" * len(upload)),
            signed.replace("pending/one", "pending/two"),
        ):
            assert altered != signed
            assert (await api.call("PUT", altered, data=b"12345"))[0] == 403
        assert (await api.call("PUT", signed, data=b"1234"))[0] == 400
        assert (await api.call("PUT", signed, data=b"123456"))[0] == 413
        assert await api.objects.parts(KEY, upload) == []
        assert (await api.call("PUT", signed, data=b"12345"))[0] == 200


async def test_aborting_takes_everything_away(tmp_path: Path) -> None:
    async with served(tmp_path) as api:
        upload = await api.objects.begin_multipart(KEY)
        await put_part(api, upload, 1, b"12345")
        assert [(key, found) async for key, found, _ in api.objects.multipart_uploads("pending/")] == [(KEY, upload)]
        await api.objects.abort_multipart(KEY, upload)
        await api.objects.abort_multipart(KEY, upload)
        assert listed(tmp_path) == set()
        assert [found async for found in api.objects.multipart_uploads("pending/")] == []
        with pytest.raises(NotFound):
            await api.objects.parts(KEY, upload)
        with pytest.raises(NotFound):
            await api.objects.finish_multipart(KEY, upload, [(1, "x")])


CHILD = """
import os, signal, sys
from pathlib import Path
from aether.stores.objects import multipart

folder, upload, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
done = 0

def step(event, arguments):
    global done
    if event in ("os.rename", "os.remove", "open", "os.rmdir", "shutil.rmtree") and str(folder) in str(arguments):
        if event == "open" and not arguments[2] & os.O_CREAT:
            return
        done += 1
        if done > steps:
            os.kill(os.getpid(), signal.SIGKILL)

multipart._HELD_TWICE_BYTES = 1
uploads = multipart.Multiparts(folder / ".multipart", folder / ".parts")
sys.addaudithook(step)
parts = [(part.number, part.etag) for part in uploads.parts("pending/one", upload)]
uploads.finish("pending/one", upload, parts, folder / "pending" / "one")
"""


async def test_finishing_goes_on_after_kill_9_at_every_step(tmp_path: Path) -> None:
    data = [random_bytes(size) for size in SIZES]
    for steps in range(100):
        folder = tmp_path / str(steps)
        folder.mkdir()
        async with served(folder) as api:
            upload = await api.objects.begin_multipart(KEY)
            for number, part in enumerate(data, 1):
                await put_part(api, upload, number, part)
            parts = [(part.number, part.etag) for part in await api.objects.parts(KEY, upload)]
        arguments = [str(folder / "objects"), upload, str(steps)]
        child = subprocess.run([sys.executable, "-c", CHILD, *arguments], timeout=60, check=False)
        store = FilesystemObjects(folder / "objects", UrlSigner(b"k" * 32))
        await store.open()
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
        await store.finish_multipart(KEY, upload, parts)
        assert await store.sha256(KEY) == (digest_of(b"".join(data)), sum(SIZES)), steps
        assert listed(folder) == {KEY}, steps
        await store.close()
    assert 8 < steps < 99, "the child was not killed where it should have been"
    await store.close()


async def test_what_a_killed_server_began_is_swept_and_what_another_receives_is_not(tmp_path: Path) -> None:
    store = FilesystemObjects(tmp_path / "objects", UrlSigner(b"k" * 32))
    await store.open()
    url = (await store.sign_put(KEY, 5, 60)).url
    path, _, query = url.partition("?")
    receiving = await store.receive(store.authorize("PUT", path.removeprefix("/objects/"), query))
    await receiving.add(memoryview(b"12345"))
    (tmp_path / "objects" / ".parts" / "left.part").write_bytes(b"x")
    (tmp_path / "objects" / ".parts" / "left.gone").mkdir()
    begun = tmp_path / "objects" / ".multipart" / "left"
    begun.mkdir()
    os.utime(begun, (1, 1))
    other = FilesystemObjects(tmp_path / "objects", UrlSigner(b"k" * 32))
    await other.open()
    assert {item.suffix for item in (tmp_path / "objects" / ".parts").iterdir()} == {".part"}
    assert not begun.exists()
    await receiving.finish()
    assert listed(tmp_path) == {KEY}
    await other.close()
    await store.close()
