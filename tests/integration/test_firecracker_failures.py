"""What becomes of Firecracker's machines when something fails at any point: it says why, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aether.model.errors import BadRequest, ServiceUnavailable
from aether.runtimes.firecracker import jail as jails
from aether.runtimes.firecracker.api import Call
from aether.runtimes.firecracker.jail import Jail
from aether.runtimes.firecracker.machine import Machine, Plan
from aether.runtimes.firecracker.runtime import FirecrackerRuntime
from aether.runtimes.firecracker.users import FIRST_UID
from support.firecracker import (
    CALLS,
    FILES,
    KILLED,
    PROGRAMS,
    answer,
    left,
    limited,
    machines,
    monitor,
    need_firecracker,
    running,
)
from support.microvm import code, spec

Change = Callable[[Plan], Plan]


async def _machine(runtime: FirecrackerRuntime, work: Any, change: Change, snapshot: Any = None) -> Machine:
    """A machine that is started otherwise than the runtime would start it."""
    plan = change(await runtime.plan(work, snapshot))
    return Machine(work, runtime._log(work.instance_id), plan)  # pyright: ignore[reportPrivateUsage]


def _run(machine: Machine) -> asyncio.Task[None]:
    return asyncio.create_task(machine.run())


def _no_kernel(plan: Plan, tmp_path: Path) -> Plan:
    bad = tmp_path / "kernel"
    bad.write_bytes(b"no kernel at all" * 1000)
    return replace(plan, files={**plan.files, jails.KERNEL: bad})


def _no_drive(plan: Plan, tmp_path: Path) -> Plan:
    return replace(plan, files={name: path for name, path in plan.files.items() if name != jails.CODE})


def _no_file(plan: Plan, tmp_path: Path) -> Plan:
    return replace(plan, files={**plan.files, jails.CODE: tmp_path / "missing"})


def _no_jailer(plan: Plan, tmp_path: Path) -> Plan:
    return replace(plan, programs=replace(plan.programs, jailer=tmp_path / "jailer"))


def _bad_name(plan: Plan, tmp_path: Path) -> Plan:
    other = tmp_path / "monitor"
    other.write_bytes(PROGRAMS.firecracker.read_bytes())
    other.chmod(0o755)
    return replace(
        plan, programs=replace(plan.programs, firecracker=other), jail=replace(plan.jail, program=other.name)
    )


def _no_monitor(plan: Plan, tmp_path: Path) -> Plan:
    other = tmp_path / "firecracker-that-cannot-run"
    other.write_text("no program")
    other.chmod(0o755)
    return replace(
        plan, programs=replace(plan.programs, firecracker=other), jail=replace(plan.jail, program=other.name)
    )


def _too_much(plan: Plan, tmp_path: Path) -> Plan:
    calls = [replace(call, body={"x": "y" * 60_000}) if call.path == "/mmds" else call for call in plan.calls()]
    return replace(plan, calls=lambda: calls)


@pytest.mark.parametrize(
    ("change", "reason", "logged"),
    [
        (_no_kernel, r"Firecracker refuses PUT /actions: .*[Kk]ernel", ""),
        (_no_drive, r"Firecracker refuses PUT /drives/code: .*No such file", ""),
        (_no_file, r"a machine's jail cannot be made: .*No such file", ""),
        (_no_jailer, r"a machine's jail cannot be made: .*No such file", ""),
        (_bad_name, r"the jailer (exited with|was ended by signal) \d+; its reason is in the log", "firecracker"),
        (_no_monitor, r"Firecracker ended (as soon as it was started|before it could be called)", ""),
        (_too_much, r"Firecracker (refuses|ended or hung up at) PUT /mmds", ""),
    ],
    ids=["kernel", "drive", "image", "jailer", "name", "monitor", "metadata"],
)
async def test_a_start_that_fails_says_why_and_leaves_nothing(
    tmp_path: Path, change: Callable[[Plan, Path], Plan], reason: str, logged: str
) -> None:
    data = tmp_path / "data"
    async with machines(data) as runtime:
        work = spec(code(tmp_path / "in", FILES))
        task = _run(await _machine(runtime, work, lambda plan: change(plan, tmp_path)))
        with pytest.raises(ServiceUnavailable, match=reason):
            await task
        assert left(data) == []
        assert logged in "\n".join(record.text for record in await runtime.log("i1"))


@pytest.mark.parametrize("at", range(len(CALLS)), ids=[item.split("/", 1)[1] for item in CALLS])
async def test_a_monitor_that_is_killed_at_a_call_leaves_nothing(tmp_path: Path, at: int) -> None:
    data = tmp_path / "data"
    async with machines(data) as runtime:
        work = spec(code(tmp_path / "in", FILES))
        held: list[Machine] = []

        def broken(plan: Plan) -> Plan:
            def calls() -> Iterator[Call]:
                for number, call in enumerate(plan.calls()):
                    if number == at:
                        os.kill(monitor(data, held[0]), signal.SIGKILL)
                    yield call

            return replace(plan, calls=calls)

        held.append(await _machine(runtime, work, broken))
        with pytest.raises(ServiceUnavailable, match="ended or hung up at PUT /"):
            await _run(held[0])
        assert left(data) == []
        assert held[0].exit() == KILLED


@pytest.mark.parametrize("after_ms", [0, 3, 8, 15, 25, 40, 60, 90])
async def test_a_start_that_is_given_up_leaves_nothing(tmp_path: Path, after_ms: int) -> None:
    data = tmp_path / "data"
    async with machines(data) as runtime:
        work = code(tmp_path / "in", FILES)
        for number in range(3):
            task = _run(await _machine(runtime, spec(work, f"i{number}"), lambda plan: plan))
            await asyncio.wait([task], timeout=after_ms / 1000)
            task.cancel()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert left(data) == []


@pytest.mark.parametrize("after_ms", [None, 0, 2, 5, 10, 20, 40])
async def test_an_instance_that_is_stopped_while_it_starts_is_gone_at_once(
    tmp_path: Path, after_ms: int | None
) -> None:
    data = tmp_path / "data"
    async with machines(data) as runtime:
        work = code(tmp_path / "in", FILES)
        await runtime.launch(spec(work))
        waiting = asyncio.create_task(runtime.wait("i1"))
        if after_ms is not None:
            await asyncio.sleep(after_ms / 1000)
        async with asyncio.timeout(30):
            assert await runtime.stop("i1", 20.0) == KILLED
            assert await waiting == KILLED
        assert await runtime.list() == []
        assert left(data) == []
        # one that the end of the runtime meets is gone for who waits for it
        last = await runtime.launch(spec(work, "i2"))
        await runtime.close()
        assert last.gone.is_set()


async def test_ten_that_start_and_are_killed_at_once_leave_nothing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with machines(data) as runtime:
        work = code(tmp_path / "in", FILES)
        await asyncio.gather(*(runtime.launch(spec(work, f"i{number}")) for number in range(10)))
        names = await runtime.list()
        assert len(names) == 10
        held = [runtime._held(name) for name in names]  # pyright: ignore[reportPrivateUsage]
        assert len({machine.plan.jail.user for machine in held}) == 10
        await running(held[0])
        async with asyncio.timeout(60):
            await asyncio.gather(*(runtime.stop(name, 0.0) for name in names))
        assert await runtime.list() == []
        assert left(data) == []


async def test_what_no_guest_can_be_told_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with machines(data) as runtime:
        work = code(tmp_path / "in", FILES)
        for change in ({"env": {"A": "x" * 60_000}}, {"env": {"A B": ""}}, {"port": 0}, {"memory_mb": 1}):
            for begin in (runtime.start, runtime.launch):
                with pytest.raises(BadRequest):
                    await begin(spec(work, **change))  # type: ignore[arg-type]
        # as much as fits is taken by the real service too
        room = 51_200 - 1_024
        env = {"A": "x" * (room * 3 // 4 - 400)}
        machine = await running(await runtime.launch(spec(work, env=env)))
        assert len(str((await answer(machine, "/mmds"))["latest"])) > 49_000
        await runtime.stop("i1", 0.0)
        assert not (data / "jails" / "firecracker" / "i1").exists()


async def test_a_snapshot_that_is_damaged_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with machines(data) as runtime:
        work = code(tmp_path / "in", FILES)
        first = await running(await runtime.launch(spec(work, "first")))
        taken = await first.take_snapshot(data / "state", data / "memory")
        await runtime.stop("first", 0.0)
        whole = bytearray(taken.state.read_bytes())
        whole[len(whole) // 2] ^= 0xFF
        taken.state.write_bytes(whole)
        task = _run(await _machine(runtime, spec(work, "x"), lambda plan: plan, taken))
        with pytest.raises(ServiceUnavailable, match="PUT /snapshot/load"):
            await task
        assert left(data) == []


def test_nothing_that_an_intruder_put_into_a_jail_is_followed(tmp_path: Path) -> None:
    need_firecracker()
    place = Jail(tmp_path / "jails", "firecracker", "aether-x", "1", FIRST_UID)
    jails.make_jail(place, ["code"], "i1")
    secret = tmp_path / "secret"
    secret.write_text("1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(os.fspath(tmp_path / "s"))
        other.listen()
        (place.root / "api.socket").symlink_to(tmp_path / "s")
        with pytest.raises(ServiceUnavailable, match="is not its socket"):
            jails.open_socket(place)
        (place.root / "api.socket").unlink()
        os.link(tmp_path / "s", place.root / "api.socket")
        with pytest.raises(ServiceUnavailable, match="is not its socket"):
            jails.open_socket(place)
    (place.root / "firecracker.pid").symlink_to(secret)
    with pytest.raises(ServiceUnavailable, match="did not say what it started"):
        jails.open_monitor(place, limited())
    (place.root / "link").symlink_to(secret)
    os.link(secret, place.root / "hard")
    os.mkfifo(place.root / "pipe")
    (place.root / "roots").write_text("")
    with pytest.raises(OSError, match="symbolic links"):
        jails.take_files(place, {"link": tmp_path / "out"})
    for name in ("hard", "pipe", "roots"):
        with pytest.raises(ServiceUnavailable, match="no file of its own"):
            jails.take_files(place, {name: tmp_path / "out"})
    (place.root / "dir").symlink_to(tmp_path)
    jails.remove_jail(place)
    assert secret.read_text() == "1"
    assert not place.folder.exists()


def test_a_process_that_only_has_the_number_is_not_taken_for_the_monitor(tmp_path: Path) -> None:
    need_firecracker()
    place = Jail(tmp_path / "jails", "firecracker", "aether-x", "1", FIRST_UID)
    jails.make_jail(place, [], "i1")
    for text, reason in ((str(os.getpid()), "ended as soon as"), ("1x", "did not say"), ("", "did not say")):
        (place.root / "firecracker.pid").write_text(text)
        with pytest.raises(ServiceUnavailable, match=reason):
            jails.open_monitor(place, limited())
