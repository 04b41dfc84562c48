"""Logs of real instances: whole, in order, each line once, bounded on disk, through floods and full disks."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from aether.runtimes.process import RuntimeOptions
from support.runtimes import NODE_SERVER, Bench, ask, bench

LOG_BYTES = 256 * 1024


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(tmp_path / "data", RuntimeOptions(log_bytes=LOG_BYTES)) as made:
        yield made


def _disk(box: Bench) -> int:
    return sum(path.stat().st_size for path in (box.data / "logs" / "demo").iterdir())


async def test_streams_and_binary_junk(box: Bench) -> None:
    command = (
        r"printf 'out\n'; sleep 0.05; printf 'err\n' >&2; sleep 0.05; printf '\377\000junk\r\n\n'; printf unfinished"
    )
    instance = await box.runtime.start(box.spec(command))
    await instance.wait()
    records = [record async for record in box.runtime.logs(instance.spec.instance_id, "demo")]
    assert [(record.stream, record.text) for record in records] == [
        ("stdout", "out"),
        ("stderr", "err"),
        ("stdout", "\ufffd\0junk\r"),
        ("stdout", ""),
        ("stdout", "unfinished"),
    ]
    assert not any(record.partial for record in records)


async def test_a_megabyte_without_a_newline(box: Bench) -> None:
    instance = await box.runtime.start(box.spec("head -c 200000 /dev/zero | tr '\\0' x; echo; echo next"))
    await instance.wait()
    records = [record async for record in box.runtime.logs(instance.spec.instance_id, "demo")]
    assert "".join(record.text for record in records[:-1]) == "x" * 200_000
    assert [record.partial for record in records] == [True] * (len(records) - 2) + [False, False]
    assert max(len(record.text) for record in records) == 16 * 1024
    instance = await box.runtime.start(box.spec("head -c 1048576 /dev/zero | tr '\\0' x"))
    await instance.wait()
    assert _disk(box) < 3 * LOG_BYTES


async def test_a_flood_is_bounded_on_disk_and_leaves_the_app_reachable(box: Bench) -> None:
    flood = """
const block = ('y'.repeat(99) + '\\n').repeat(600)
const more = () => { while (process.stdout.write(block)); process.stdout.once('drain', () => setImmediate(more)) }
""" + NODE_SERVER.replace("console.log('up')", "more()")
    instance = await box.runtime.start(box.spec("exec node flood.js", files={"flood.js": flood}))
    largest = 0
    for _ in range(20):
        assert await ask(instance) == "hello from node"
        largest = max(largest, _disk(box))
    await instance.stop(1.0)
    log = box.data / "logs" / "demo" / f"{instance.spec.instance_id}.log"
    assert log.with_name(log.name + ".1").exists(), "the flood was too small to show anything"
    assert max(largest, _disk(box)) <= 2 * LOG_BYTES


async def test_follow_gives_every_line_once_across_rotations(box: Bench) -> None:
    # slow enough for the reader to keep up: it may fall one file behind, not two
    script = """
let n = 0
const timer = setInterval(() => {
  for (let i = 0; i < 100; i++) console.log(n++ + ' ' + 'z'.repeat(80))
  if (n >= 12000) clearInterval(timer)
}, 2)
"""
    instance = await box.runtime.start(box.spec("exec node lines.js", files={"lines.js": script}))
    seen: list[int] = []
    times: list[int] = []
    async with asyncio.timeout(60):
        async for record in box.runtime.logs(instance.spec.instance_id, "demo", follow=True):
            seen.append(int(record.text.split()[0]))
            times.append(record.time_ns)
    assert seen == list(range(12_000))
    assert times == sorted(set(times))
    assert _disk(box) <= 2 * LOG_BYTES


async def test_tail_and_since(box: Bench) -> None:
    instance = await box.runtime.start(box.spec("seq 1 9000; exec sleep 1000"))
    await box.said(instance, "9000")
    name = instance.spec.instance_id
    tail = [record async for record in box.runtime.logs(name, "demo", tail=3)]
    assert [record.text for record in tail] == ["8998", "8999", "9000"]
    long = [record.text async for record in box.runtime.logs(name, "demo", tail=8000)]
    assert long == [str(n) for n in range(1001, 9001)], "the tail reaches into the older file"
    since = [record.text async for record in box.runtime.logs(name, "demo", since_ns=tail[1].time_ns)]
    assert since == ["8999", "9000"]
    assert [record async for record in box.runtime.logs(name, "demo", tail=0)] == []
    assert len([record async for record in box.runtime.logs(name, "demo", tail=1_000_000)]) == 9000


async def test_followers_end_with_the_instance_and_may_leave_early(box: Bench) -> None:
    instance = await box.runtime.start(box.spec("echo one; exec sleep 1000"))
    await box.said(instance, "one")

    async def follow() -> list[str]:
        return [
            record.text async for record in box.runtime.logs(instance.spec.instance_id, "demo", follow=True, tail=5)
        ]

    leaver = asyncio.create_task(follow())
    stayers = [asyncio.create_task(follow()) for _ in range(3)]
    await asyncio.sleep(0)
    leaver.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaver
    await instance.stop(1.0)
    async with asyncio.timeout(5):
        assert await asyncio.gather(*stayers) == [["one"]] * 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
async def test_a_full_disk_loses_lines_but_not_the_app(box: Bench) -> None:
    logs = box.data / "logs"
    logs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", logs], check=True)
    try:
        filler = logs / "filler"
        script = """
require('http').createServer((q, s) => { console.log('asked ' + q.url); s.end('ok') }).listen(process.env.PORT)
console.log('x'.repeat(30000))
"""
        instance = await box.runtime.start(box.spec("exec node server.js", files={"server.js": script}))
        assert await ask(instance, "/first") == "ok"
        await box.said(instance, "/first")
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        for n in range(300):
            assert await ask(instance, f"/lost{n}-" + "y" * 100) == "ok"
        filler.unlink()
        assert await ask(instance, "/after") == "ok"
        await box.said(instance, "/after")
        lines = await box.lines(instance)
        notices = [line for line in lines if line.startswith("aether: ")]
        assert len(notices) == 1
        assert "No space left on device" in notices[0]
        lost = int(notices[0].split()[1])
        assert lost + sum("/lost" in line for line in lines) == 300
        assert lost > 0
        await instance.stop(1.0)
        await box.runtime.remove(instance.spec.instance_id)
    finally:
        subprocess.run(["umount", logs], check=True)
