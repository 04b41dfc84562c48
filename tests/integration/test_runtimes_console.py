"""Runs in real sandboxes: streams joined both ways, a terminal, the leash, the time limit, and volumes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aether.model.errors import BadRequest
from aether.model.instance import Console, Volume
from aether.runtimes.process.console import Attached
from support.runtimes import Bench, bench, gone


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(tmp_path / "data") as made:
        yield made
    while OPEN:
        OPEN.pop().close()


OPEN: list[Attached] = []
"""Everything that a test attached."""


async def attach(instance: Any) -> Attached:
    OPEN.append(await instance.open_console())
    return OPEN[-1]


async def begin(box: Bench, command: str, console: Console = Console.PIPES, **changes: Any) -> tuple[Any, Attached]:
    instance = await box.runtime.start(replace(box.spec(command), console=console, **changes))
    return instance, await attach(instance)


async def output(attached: Attached) -> tuple[bytes, bytes]:
    """(stdout, stderr) up to the end."""
    found = {1: bytearray(), 2: bytearray()}
    async with asyncio.timeout(60):
        while (piece := await attached.read()) is not None:
            found[piece[0]] += piece[1]
    return bytes(found[1]), bytes(found[2])


async def until(attached: Attached, text: bytes) -> bytes:
    said = b""
    async with asyncio.timeout(20):
        while text not in said:
            piece = await attached.read()
            assert piece is not None, said
            said += piece[1]
    return said


async def test_streams_are_apart_and_the_exit_code_is_the_commands(box: Bench) -> None:
    instance, attached = await begin(box, "echo out; echo err >&2; exit 7")
    assert await output(attached) == (b"out\n", b"err\n")
    assert (await instance.wait()).code == 7
    assert await box.lines(instance) == ["out", "err"]


async def test_an_end_before_anybody_attached_loses_nothing(box: Bench) -> None:
    instance = await box.runtime.start(replace(box.spec("echo early; exit 3"), console=Console.PIPES))
    await asyncio.sleep(0.5)
    assert await output(await attach(instance)) == (b"early\n", b"")
    assert (await instance.wait()).code == 3


async def test_megabytes_go_through_unchanged_both_ways(box: Bench) -> None:
    data = os.urandom(8_000_000)
    instance, attached = await begin(box, "cat")

    async def feed() -> None:
        await attached.write(data)
        await attached.end_input()

    _, (out, err) = await asyncio.gather(feed(), output(attached))
    assert out == data
    assert err == b""
    assert (await instance.wait()).code == 0


async def test_a_slow_reader_stops_the_command_and_a_slow_command_its_writer(box: Bench) -> None:
    instance, attached = await begin(box, "head -c 3000000 /dev/zero; echo done >&2; sleep 0.5; wc -c >&2")
    await asyncio.sleep(0.5)
    assert await box.lines(instance) is not None
    assert "done" not in await box.lines(instance), "nobody reads, so the command stands"

    fed = asyncio.create_task(attached.write(bytes(2_000_000)))
    out = 0
    said = b""
    async with asyncio.timeout(30):
        while b"done" not in said or out < 3_000_000:
            piece = await attached.read()
            assert piece is not None
            stream, data = piece
            out, said = (out + len(data), said) if stream == 1 else (out, said + data)
        assert out == 3_000_000
        await fed
        await attached.end_input()
        assert (await output(attached))[1].strip() == b"2000000"
    assert (await instance.wait()).code == 0


async def test_the_streams_can_be_opened_again_by_name(box: Bench) -> None:
    instance, attached = await begin(box, "echo one >/dev/stdout; echo two >/dev/stderr; cat /dev/stdin")
    await attached.write(b"three\n")
    await attached.end_input()
    assert await output(attached) == (b"one\nthree\n", b"two\n")
    assert (await instance.wait()).code == 0


async def test_input_that_the_command_does_not_want_is_dropped(box: Bench) -> None:
    instance, attached = await begin(box, "exec <&-; sleep 0.3; echo over")
    async with asyncio.timeout(20):
        await asyncio.gather(attached.write(bytes(1_000_000)), output(attached))
    assert (await instance.wait()).code == 0


async def test_a_lost_caller_ends_the_run(box: Bench) -> None:
    command = "trap '' HUP; trap 'echo got TERM; exit 4' TERM; echo on; while :; do sleep 0.05; done"
    instance, attached = await begin(box, command)
    await until(attached, b"on")
    attached.close()
    async with asyncio.timeout(10):
        assert (await instance.wait()).code == 4
    assert "got TERM" in await box.lines(instance)


async def test_a_lost_caller_ends_a_command_that_reads_nothing(box: Bench) -> None:
    instance, attached = await begin(box, "sleep 60")
    filling = asyncio.create_task(attached.write(bytes(3_000_000)))
    await asyncio.sleep(0.3)
    filling.cancel()
    await asyncio.gather(filling, return_exceptions=True)
    attached.close()
    async with asyncio.timeout(10):
        assert (await instance.wait()).signal is not None


async def test_only_one_may_attach(box: Bench) -> None:
    instance, attached = await begin(box, "cat")
    with pytest.raises(ConnectionRefusedError):
        await instance.open_console()
    await attached.end_input()
    assert (await instance.wait()).code == 0


async def test_nothing_attaches_to_an_ordinary_instance(box: Bench) -> None:
    instance = await box.runtime.start(box.spec("sleep 60"))
    with pytest.raises(ConnectionRefusedError):
        await instance.open_console()


async def test_its_time_ends_it_whoever_is_there(box: Bench) -> None:
    instance, attached = await begin(box, "trap '' TERM HUP; echo on; exec sleep 60", timeout_secs=0.5)
    await until(attached, b"on")
    stopped = await asyncio.wait_for(instance.wait(), 20)
    assert stopped.expired
    assert any("its time of 0.5 s is over" in line for line in await box.lines(instance))

    detached = await box.runtime.start(replace(box.spec("sleep 60"), timeout_secs=0.3))
    assert (await asyncio.wait_for(detached.wait(), 20)).expired


async def test_signals_reach_the_command(box: Bench) -> None:
    instance, attached = await begin(box, "trap 'echo int; exit 5' INT; echo on; while :; do sleep 0.05; done")
    await until(attached, b"on")
    instance.signal(signal.SIGINT)
    assert b"int" in (await output(attached))[0]
    assert (await instance.wait()).code == 5


async def test_a_terminal_is_one(box: Bench) -> None:
    command = (
        "tty; test -t 0 && test -t 1 && test -t 2 && echo all; stty size; echo hi >/dev/tty; echo x >/dev/stderr"
    )
    instance = await box.runtime.start(replace(box.spec("read go; " + command), console=Console.TERMINAL))
    attached = await attach(instance)
    instance.resize(33, 111)
    await attached.write(b"\n")
    out, err = await output(attached)
    assert err == b""
    assert b"not a tty" not in out
    assert out.replace(b"\r", b"").split(b"\n")[2:] == [b"all", b"33 111", b"hi", b"x", b""], out
    assert (await instance.wait()).code == 0
    assert await box.lines(instance) == [], "what a terminal shows is not logged"


async def test_a_terminal_has_job_control(box: Bench) -> None:
    instance, attached = await begin(box, "exec bash --norc -i", Console.TERMINAL, env={"PS1": "ready> "})
    assert b"no job control" not in await until(attached, b"ready>")
    await attached.write(b"sh -c \"echo be''gun; exec sleep 1000\"\n")
    await until(attached, b"begun")
    await attached.write(b"\x1a")
    await until(attached, b"Stopped")
    await attached.write(b"fg\n")
    await until(attached, b"exec sleep 1000")
    await asyncio.sleep(0.5)  # bash says what it brings to the fore just before it does
    await attached.write(b"\x03")
    await until(attached, b"ready>")
    await attached.write(b"echo $?.\n")
    await until(attached, b"130.\r\nready>")
    instance.resize(20, 70)
    await attached.write(b"stty size\n")
    # only a shell that waits for a line takes this as the end
    await until(attached, b"20 70\r\nready>")
    await attached.write(b"\x04")
    await output(attached)
    assert (await instance.wait()).code == 0


async def test_a_lost_terminal_ends_an_interactive_shell_and_its_jobs(box: Bench) -> None:
    instance, attached = await begin(box, "exec bash --norc -i", Console.TERMINAL, env={"PS1": "ready> "})
    await until(attached, b"ready>")
    await attached.write(b"sleep 1000 & sleep 1001\n")
    await asyncio.sleep(0.3)
    attached.close()
    async with asyncio.timeout(10):
        assert (await instance.wait()).signal is not None
    await gone(str(box.data / "instances" / instance.spec.instance_id))


DATA = Volume("data", "/data")


async def test_a_volume_outlives_instances_and_is_one_apps_own(box: Bench) -> None:
    def spec(command: str, app: str, *volumes: Volume) -> Any:
        return replace(box.spec(command, app=app), volumes=volumes)

    async def said(spec: Any) -> list[str]:
        instance = await box.runtime.start(spec)
        await asyncio.wait_for(instance.wait(), 30)
        return await box.lines(instance)

    assert await said(
        spec("echo one >/data/note; mkdir /data/deep; chmod 700 /data/deep; ls /data", "mine", DATA)
    ) == [
        "deep",
        "note",
    ]
    assert await said(spec("cat /data/note; echo two >>/data/note; cat /data/note", "mine", DATA)) == [
        "one",
        "one",
        "two",
    ]
    assert await said(spec("ls -A /data; ls /data/../ | grep -c volumes", "other", DATA)) == ["0"]
    assert await said(spec("ls /data 2>&1", "mine")) == ["ls: cannot access '/data': No such file or directory"]
    assert (box.data / "volumes" / "mine" / "data" / "note").read_text() == "one\ntwo\n"
    for folder in (box.data / "volumes", box.data / "volumes" / "mine", box.data / "volumes" / "mine" / "data"):
        assert folder.stat().st_mode & 0o077 == 0


async def test_a_volume_below_the_read_only_app(box: Bench) -> None:
    uploads = Volume("uploads", "/app/var/uploads")
    spec = replace(
        box.spec("touch /app/var/uploads/a /app/var/b 2>&1; ls /app/var/uploads; mount | grep -c nosuid"),
        volumes=(uploads,),
    )
    instance = await box.runtime.start(spec)
    await asyncio.wait_for(instance.wait(), 30)
    refused, listed, _ = await box.lines(instance)
    assert "Read-only" in refused
    assert listed == "a"


@pytest.mark.parametrize("path", ["/usr/share/x", "/usr", "/bin", "/proc/x", "/tmp"])
async def test_a_volume_may_not_hide_the_machines_own(box: Bench, path: str) -> None:
    with pytest.raises(BadRequest, match="choose another path"):
        await box.runtime.start(replace(box.spec("true"), volumes=(Volume("v", path),)))


async def test_a_link_in_the_artifact_leads_no_volume_astray(box: Bench, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    spec = box.spec("true")
    (spec.root / "up").symlink_to(outside)
    for path in ("/app/up", "/app/up/inner"):
        with pytest.raises(BadRequest, match="not a plain folder"):
            await box.runtime.start(replace(spec, volumes=(Volume("v", path),)))
    assert list(outside.iterdir()) == []


async def test_volumes_are_listed_measured_and_deleted(box: Bench) -> None:
    command = "head -c 300000 /dev/zero >/data/x; d=/data/d; i=0; mkdir $d; cd $d; " + (
        "while [ $i -lt 1500 ]; do mkdir d && cd d || exit 1; i=$((i+1)); done; "
        "ln -s /etc /data/link; chmod 0 /data/d"
    )
    instance = await box.runtime.start(replace(box.spec(command, app="mine"), volumes=(DATA, Volume("b", "/b"))))
    assert (await asyncio.wait_for(instance.wait(), 60)).code == 0
    volumes = box.runtime.volumes
    assert await volumes.names("mine") == ["b", "data"]
    assert (await volumes.used_bytes("mine", "data") or 0) >= 300_000
    assert await volumes.delete("mine", "data")
    assert not await volumes.delete("mine", "data")
    assert await volumes.names("mine") == ["b"]
    (box.data / "volumes" / ".deleted-left").mkdir()
    await volumes.clear()
    await volumes.delete_all("mine")
    assert await volumes.names("mine") == []
    assert list((box.data / "volumes").iterdir()) == []
    assert Path("/etc/passwd").exists()
