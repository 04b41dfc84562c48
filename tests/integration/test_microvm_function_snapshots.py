"""Machines that go on from a snapshot of their own function: each from another one, and none from a used one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aether.model.function_instance import StartKind
from aether.runtimes.locks import PART
from aether.runtimes.microvm.snapshots import SnapshotStore, function_snapshot_key
from support import taking_main
from support.clones import NODE, PYTHON, another_state, ask, flip, keep, kind
from support.microvm import code, machines, spec

FOLDER = "function-snapshots"
SOURCES = {
    "index.js": NODE.replace("const fs", "const started = Date.now();\nconst fs", 1).replace("now:", "started, now:"),
    "main.py": PYTHON.replace("class Handler", "started = time.time() * 1000\n\nclass Handler").replace(
        '"now":', '"started": started, "now":'
    ),
}
assert all("started" in source for source in SOURCES.values())


def kept(data: Path) -> list[bytes]:
    """What tells the function snapshots that there are apart."""
    return [note.read_bytes() for note in (data / FOLDER).glob("*/note.json")]


@pytest.mark.parametrize("language", ["node", "python"])
async def test_a_clone_has_its_function_started_already_and_no_secret_of_the_one_before(
    tmp_path: Path, language: str
) -> None:
    data = tmp_path / "data"
    work = code(tmp_path / "in", SOURCES)
    async with machines(data, snapshots=True) as runtime:
        await runtime.start(spec(work, "anew", runtime=language, env={"NAME": "x"}))
        await runtime.settle()
        assert not (data / FOLDER).exists(), "nobody asked for it"
        await runtime.stop("anew", 0.0)
        await runtime.start(spec(work, "first", runtime=language, env={"NAME": "x"}, snapshot=True))
        assert "aether.park" not in (await ask(runtime, "first"))["command"]
        await runtime.settle()
        for item in [data / FOLDER, *(data / FOLDER).rglob("*")]:
            assert item.stat().st_mode & 0o777 == (0o700 if item.is_dir() else 0o600), item
        notes = kept(data)
        answers = [await ask(runtime, "first")]
        for number in (1, 2):
            began = time.time()
            name = f"clone{number}"
            await runtime.start(spec(work, name, runtime=language, env={"NAME": "x"}, snapshot=True))
            assert await kind(runtime, name) == StartKind.RESTORED
            answers.append(await ask(runtime, name))
            assert "aether.park" in answers[-1]["command"]
            assert answers[-1]["started"] / 1000 < began < answers[-1]["now"] / 1000 + 30
            assert abs(answers[-1]["now"] / 1000 - time.time()) < 30
            await runtime.settle()
            notes += kept(data)
        assert len(set(notes)) == 3, "one for each of the two, and one for the next"
        for what in set(answers[0]["own"]) - {"name"}:
            assert len({answer["own"][what] for answer in answers}) == 3, what
        # one is left: of two that want it one gets it, and the other is started anew
        names = ("left", "right")
        await asyncio.gather(
            *(runtime.start(spec(work, one, runtime=language, env={"NAME": "x"}, snapshot=True)) for one in names)
        )
        both = [await ask(runtime, one) for one in names]
        assert sorted("aether.park" in one["command"] for one in both) == [False, True]
        assert both[0]["own"]["uuid"] != both[1]["own"]["uuid"]
        # the variables are another function's
        await runtime.settle()
        await runtime.start(spec(work, "other", runtime=language, env={"NAME": "y"}, snapshot=True))
        other = await ask(runtime, "other")
        assert ("aether.park" in other["command"], other["own"]["name"]) == (False, "y")


async def test_a_damaged_one_is_not_used_and_the_same_start_goes_another_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    work = code(tmp_path / "in", SOURCES)
    async with machines(data, snapshots=True) as runtime:
        await runtime.start(spec(work, "first", snapshot=True))
        await runtime.settle()
        await runtime.stop("first", 0.0)
        assert len(kept(data)) == 1
    flip(data, "memory", FOLDER)
    async with machines(data, snapshots=True) as runtime:
        await runtime.start(spec(work, "i1", snapshot=True))
        assert "aether.park" not in (await ask(runtime, "i1"))["command"]
        assert await kind(runtime, "i1") == StartKind.RESTORED, "of the runtime"
        await runtime.settle()
        assert "was not restored" not in caplog.text
        another_state(data, FOLDER)
        await runtime.start(spec(work, "i2", snapshot=True))
        assert "aether.park" not in (await ask(runtime, "i2"))["command"]
        assert "instance i2 was not restored and is booted: " in caplog.text
        await runtime.settle()
        assert len(kept(data)) == 1


async def test_what_is_taken_is_taken_once(tmp_path: Path) -> None:
    one, two = (SnapshotStore(tmp_path / FOLDER) for _ in range(2))
    key = "a" * 40
    mark = await keep(one, key, to_take=True)
    taken = await asyncio.gather(*(store.take(key) for store in (one, two, one, two)))
    (got,) = (snapshot for snapshot in taken if snapshot is not None)
    assert os.pread(got.memory, 4096, 0) == mark
    assert os.pwrite(got.memory, b"write", 0) == 5, "nobody else goes on from it"
    assert await one.take(key) is None
    # what one still holds was used by another process, which has made the next
    await keep(one, key, to_take=True)
    assert await two.take(key) is not None
    mark = await keep(two, key, to_take=True)
    again = await one.take(key)
    assert again is not None
    assert os.pread(again.memory, 4096, 0) == mark
    assert await two.take(key) is None
    assert one.keys() == []


async def test_what_was_taken_by_who_was_killed_is_not_used_again(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / FOLDER)
    await keep(store, "a" * 40)
    with subprocess.Popen(
        [sys.executable, taking_main.__file__, str(tmp_path / FOLDER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == b"taken\n"
        process.kill()
    assert [item for item in (tmp_path / FOLDER).iterdir() if PART in item.name]
    assert await store.take("a" * 40) is None
    assert store.keys() == []
    assert store.sweep() == 1
    assert not [item for item in (tmp_path / FOLDER).iterdir() if PART in item.name]


def test_anything_else_that_is_started_is_another_snapshot() -> None:
    def key(**other: object) -> str:
        values = {"runtime": "r", "image": "i", "argv": ("a", "b"), "env": {"A": "1"}, "port": 3000}
        return function_snapshot_key(**{**values, **other})  # type: ignore[arg-type]

    others = [
        key(runtime="s"), key(image="j"), key(argv=("a", "c")), key(argv=("a b",)), key(env={"A": "2"}),
        key(env={"B": "1"}), key(env={}), key(port=3001),
    ]  # fmt: skip
    assert key() == key()
    assert len({key(), *others}) == len(others) + 1
