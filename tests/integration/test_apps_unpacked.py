"""Unpacked artifacts over kills and power cuts: a folder that counts as complete has its content."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from aether.apps.artifacts import UnpackedArtifacts
from aether.stores.objects.filesystem import FilesystemObjects
from aether.stores.objects.signing import UrlSigner, load_key
from support.server import hello, pack

Opened = Callable[[str], UnpackedArtifacts]


@pytest.fixture
async def digest(tmp_path: Path) -> str:
    blob = pack(hello("x"))
    name = hashlib.sha256(blob).hexdigest()
    folder = tmp_path / "objects" / "artifacts" / "it" / name
    folder.mkdir(parents=True)
    (folder / "app.tar.gz").write_bytes(blob)
    return name


@pytest.fixture
async def source(tmp_path: Path) -> Opened:
    objects = FilesystemObjects(tmp_path / "objects", UrlSigner(load_key(tmp_path / "signing.key")))
    await objects.open()
    return lambda boot: UnpackedArtifacts(tmp_path / "releases", objects, boot_id=boot)


def marks(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "releases" / "it").iterdir() if path.name.startswith(".unflushed-")]


async def test_the_mark_is_there_before_the_folder_and_goes_once_it_is_flushed(
    tmp_path: Path, digest: str, source: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_end: list[int] = []
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        at_the_end.append(len(marks(tmp_path)))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    it = source("boot-1")
    await it.open()
    await it.unpack("it", digest, None)
    async with asyncio.timeout(120):
        while marks(tmp_path):
            await asyncio.sleep(0.01)
    assert at_the_end == [1]
    await it.close()


async def test_after_a_power_cut_what_was_not_flushed_is_unpacked_again(
    tmp_path: Path, digest: str, source: Opened
) -> None:
    it = source("boot-1")
    await it.open()
    folder = await it.unpack("it", digest, None)
    await it.close()
    whole = (folder / "server.js").read_text()
    (folder / "server.js").write_text("")  # what a lost page looks like
    (folder.with_name(f".unflushed-{digest}")).write_text("boot-1")
    it = source("boot-2")
    await it.open()
    assert await it.unpacked("it") == []
    assert ((await it.unpack("it", digest, None)) / "server.js").read_text() == whole
    await it.close()


async def test_after_a_kill_the_folder_stays_and_is_flushed(tmp_path: Path, digest: str, source: Opened) -> None:
    it = source("boot-1")
    await it.open()
    folder = await it.unpack("it", digest, None)
    await it.close()
    before = folder.stat().st_ino
    folder.with_name(f".unflushed-{digest}").write_text("boot-1")
    it = source("boot-1")
    await it.open()
    assert (await it.unpack("it", digest, None)).stat().st_ino == before
    async with asyncio.timeout(120):
        while marks(tmp_path):
            await asyncio.sleep(0.01)
    await it.close()


async def test_a_flushed_folder_outlives_a_reboot(tmp_path: Path, digest: str, source: Opened) -> None:
    it = source("boot-1")
    await it.open()
    folder = await it.unpack("it", digest, None)
    async with asyncio.timeout(120):
        while marks(tmp_path):
            await asyncio.sleep(0.01)
    await it.close()
    before = folder.stat().st_ino
    it = source("boot-2")
    await it.open()
    assert (await it.unpack("it", digest, None)).stat().st_ino == before
    await it.close()
