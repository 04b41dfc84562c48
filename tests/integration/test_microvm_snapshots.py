"""Machines that go on from a snapshot: what they do not share, and what becomes of snapshots that are of no use."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import mmap
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aether.model.errors import ServiceUnavailable
from aether.model.function_instance import StartKind
from aether.runtimes.locks import LOCK, PART
from aether.runtimes.microvm import leftovers, qemu
from aether.runtimes.microvm.boot import TCG
from aether.runtimes.microvm.guest.store import Guest
from aether.runtimes.microvm.machine import Restore
from aether.runtimes.microvm.snapshots import SnapshotLimits, SnapshotStore, snapshot_key
from support import snapshot_main
from support.clones import NODE, PYTHON, another_state, ask, flip, keep, kind
from support.microvm import code, machines, spec
from support.spawned import spawned


def stored(data: Path) -> dict[str, str]:
    """Digests of the files of the one snapshot there is."""
    (place,) = (item for item in (data / "snapshots").iterdir() if item.is_dir())
    return {item.name: hashlib.sha256(item.read_bytes()).hexdigest() for item in place.iterdir()}


@pytest.mark.parametrize("language", ["node", "python"])
async def test_two_clones_have_no_secret_in_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str
) -> None:
    made: list[object] = []
    make = qemu.make_snapshot

    async def counted(making: Any) -> tuple[int, int]:
        made.append(making)
        return await make(making)

    monkeypatch.setattr(qemu, "make_snapshot", counted)
    work = code(tmp_path / "in", {"index.js": NODE, "main.py": PYTHON})
    data = tmp_path / "data"
    async with machines(data, snapshots=True) as runtime:
        first = [spec(work, f"cold{number}", runtime=language, env={"NAME": f"cold{number}"}) for number in (1, 2)]
        await asyncio.gather(*(runtime.start(one) for one in first))
        assert [await kind(runtime, one.instance_id) for one in first] == [StartKind.COLD] * 2
        await runtime.settle()
        assert len(made) == 1
        for one in first:
            await runtime.stop(one.instance_id, 0.0)
        for item in [*(data / "snapshots").rglob("*"), data / "snapshots"]:
            assert item.stat().st_mode & 0o777 == (0o700 if item.is_dir() else 0o600), item
        before = stored(data)
        names = ("one", "two")
        await asyncio.gather(
            *(runtime.start(spec(work, name, runtime=language, env={"NAME": name, name: ""})) for name in names)
        )
        assert [await kind(runtime, name) for name in names] == [StartKind.RESTORED] * 2
        one, two = [await ask(runtime, name) for name in names]
        for what in one["own"]:
            assert one["own"][what] != two["own"][what], what
        for seen in (one, two):
            assert abs(seen["now"] / 1000 - time.time()) < 60
            assert "token" not in seen["command"]
        running = leftovers.running(leftovers.scope(data))
        users = {os.stat(f"/proc/{pid}").st_uid for found in running.values() for pid, _ in found}
        assert len(users) == 2
        assert 0 not in users
        if language == "node":
            assert ("one" in one["env"], "two" in one["env"]) == (True, False)
            assert "mark" in (await ask(runtime, "one", "/fill"))["files"]
            assert (await ask(runtime, "two"))["files"] == []
        assert stored(data) == before
        await runtime.start(spec(work, "three", runtime=language, env={"NAME": "three"}))
        assert await kind(runtime, "three") == StartKind.RESTORED
        await runtime.settle()
        assert len(made) == 1


def shorten(data: Path) -> None:
    (file,) = (data / "snapshots").glob("*/memory")
    os.truncate(file, file.stat().st_size - 4096)


async def test_a_damaged_snapshot_is_thrown_away_and_the_same_start_boots(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = code(tmp_path / "in", {"index.js": NODE})
    data = tmp_path / "data"
    damages: list[Callable[[Path], None]] = [lambda data: flip(data, "memory"), another_state]
    for damage in damages:
        async with machines(data, snapshots=True) as runtime:
            assert await runtime.make_snapshot("node")
            good = stored(data)
            damage(data)
            bad = stored(data)
            assert bad != good
            await runtime.start(spec(work))
            assert await kind(runtime, "i1") == StartKind.COLD
            assert (await ask(runtime, "i1"))["now"]
            await runtime.settle()
            assert stored(data) != bad
    assert "instance i1 was not restored and is booted: " in caplog.text


async def test_a_clone_that_is_given_no_assignment_runs_nothing_and_is_booted_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu, "Restore", lambda snapshot, _: Restore(snapshot, "0" * 64))
    work = code(tmp_path / "in", {"index.js": "console.log('user code runs');" + NODE})
    async with machines(tmp_path / "data", snapshots=True) as runtime:
        assert await runtime.make_snapshot("node")
        await runtime.start(spec(work))
        assert await kind(runtime, "i1") == StartKind.COLD
        said = [record.text for record in await runtime.log("i1")]
        assert "aether-init: FATAL: the metadata service refuses: 404 Not Found" in "\n".join(said)
        assert said.count("user code runs") == 1


async def test_nothing_is_left_of_a_maker_whose_server_was_killed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with machines(data):
        pass
    scope = leftovers.scope(data)
    async with spawned(Path(snapshot_main.__file__), data) as server:
        async with asyncio.timeout(100):
            while not leftovers.running(scope):
                await asyncio.sleep(0.01)
        await server.kill()
    assert len(leftovers.running(scope)) == 1
    part = data / "snapshots" / f"{'a' * 40}{PART}x"
    part.mkdir()
    (part / "memory").write_bytes(b"half of it")
    async with machines(data, snapshots=True) as runtime:
        assert await runtime.sweep() == []
        assert leftovers.running(scope) == {}
        assert list((data / "snapshots").iterdir()) == []
        assert await runtime.make_snapshot("node")
        assert not [item for item in (data / "snapshots").iterdir() if LOCK in item.name or PART in item.name]


GUEST = Guest(Path("k-vmlinux"), Path("i-initramfs"), Path("r-node.sqfs"), ("/usr/bin/node",), (), ("/usr/bin/node",))


def test_another_kernel_runtime_size_or_monitor_is_another_snapshot(tmp_path: Path) -> None:
    monitor = tmp_path / "qemu"
    monitor.write_text("1")
    same = snapshot_key(GUEST, 1, 128, TCG, str(monitor))
    assert re.fullmatch("[0-9a-f]{40}", same)
    assert snapshot_key(GUEST, 1, 128, TCG, str(monitor)) == same
    others = {
        snapshot_key(GUEST, 2, 128, TCG, str(monitor)),
        snapshot_key(GUEST, 1, 256, TCG, str(monitor)),
        snapshot_key(GUEST, 1, 128, "kvm", str(monitor)),  # type: ignore[arg-type]
        *(
            snapshot_key(replace(GUEST, **{part: Path("other")}), 1, 128, TCG, str(monitor))
            for part in ("kernel", "initramfs", "rootfs")
        ),
        snapshot_key(replace(GUEST, rehearsal=("other",)), 1, 128, TCG, str(monitor)),
    }
    monitor.write_text("an update")
    others.add(snapshot_key(GUEST, 1, 128, TCG, str(monitor)))
    assert len(others) == 8
    assert same not in others


async def test_what_is_found_is_what_was_kept_and_nobody_can_change_it(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "snapshots")
    assert await store.find("a" * 40) is None
    mark = await keep(store, "a" * 40)
    for again in (store, SnapshotStore(tmp_path / "snapshots")):
        first, second = await asyncio.gather(again.find("a" * 40), again.find("a" * 40))
        assert first is second
        assert first is not None
        expected = mark + bytes((4 << 20) - 8192) + mark
        assert os.pread(first.memory, 8 << 20, 0) == expected
        opened = [first.open_state(), first.open_state()]
        assert [os.read(fd, 100) for fd in opened] == [b"state of " + b"a" * 40] * 2
        for fd in opened:
            os.close(fd)
        # as a monitor opens it, and as one would that its guest has taken over
        fd = os.open(f"/proc/self/fd/{first.memory}", os.O_RDWR)
        try:
            with pytest.raises(PermissionError):
                os.pwrite(fd, b"x", 0)
            with pytest.raises(PermissionError):
                mmap.mmap(fd, 4096, mmap.MAP_SHARED)
            with pytest.raises(OSError) as caught:
                os.ftruncate(fd, 0)
            assert caught.value.errno == errno.EPERM
            with mmap.mmap(fd, 4096, mmap.MAP_PRIVATE) as own:
                own[:1] = b"x"
            assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL
        finally:
            os.close(fd)
        assert os.pread(first.memory, 8 << 20, 0) == expected


async def test_those_used_last_stay(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "snapshots", SnapshotLimits(max_count=2, max_resident_bytes=200_000))
    keys = [letter * 40 for letter in "abc"]
    for key in keys[:2]:
        await keep(store, key)
    await SnapshotStore(tmp_path / "snapshots").find(keys[0])
    await keep(store, keys[2])
    assert sorted(store.keys()) == [keys[0], keys[2]]
    assert await store.find(keys[1]) is None
    held = await store.find(keys[0])
    assert held is not None
    await store.find(keys[2])
    # the first was let go of for the second, and whoever holds it can go on with it
    assert os.pread(held.memory, 1, 4096) == b"\0"
    assert await store.find(keys[0]) is not held
    small = SnapshotStore(tmp_path / "snapshots", SnapshotLimits(max_bytes=200_000))
    await keep(small, keys[1])
    assert small.keys() == [keys[1]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: flip(data, "memory"),
        lambda data: flip(data, "state"),
        shorten,
        lambda data: next((data / "snapshots").glob("*/state")).unlink(),
        lambda data: next((data / "snapshots").glob("*/note.json")).write_text("{}"),
        lambda data: next((data / "snapshots").glob("*/note.json")).write_text('{"size": -1, "blocks": 3'),
        lambda data: next((data / "snapshots").glob("*/note.json")).write_text(
            '{"size": 4096, "blocks": [], "memory": "", "state": ""}'
        ),
    ],
    ids=["memory", "state", "short", "missing", "empty", "no-json", "size"],
)
async def test_what_is_not_whole_is_not_found_and_thrown_away(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    await keep(SnapshotStore(tmp_path / "snapshots"), "a" * 40)
    damage(tmp_path)
    store = SnapshotStore(tmp_path / "snapshots")
    assert await store.find("a" * 40) is None
    assert store.keys() == []
    assert not (tmp_path / "snapshots" / ("a" * 40)).exists()
    assert store.sweep() == 0


async def test_what_is_stopped_while_it_is_restored_is_not_booted_instead(tmp_path: Path) -> None:
    work = code(tmp_path / "in", {"index.js": NODE})
    data = tmp_path / "data"
    async with machines(data, snapshots=True) as runtime:
        assert await runtime.make_snapshot("node")
        before = stored(data)
        await runtime.prepare("node", work)
        start = asyncio.create_task(runtime.start(spec(work)))
        while not leftovers.running(leftovers.scope(data)):
            await asyncio.sleep(0.001)
        assert (await runtime.status("i1")).start == StartKind.RESTORED
        await runtime.stop("i1", 0.0)
        with pytest.raises(ServiceUnavailable, match="its machine ended before it listened"):
            await start
        assert await runtime.list() == []
        assert leftovers.running(leftovers.scope(data)) == {}
        assert stored(data) == before
