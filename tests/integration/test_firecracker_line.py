"""What the driver does with what /init says, also where guests do not boot: monitor, jail, network and service are
real, and the test speaks /init's part of the line from inside of the machine's network."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from aether.model.errors import ServiceUnavailable
from aether.model.function_instance import FunctionPhase, FunctionSpec
from aether.model.instance import InstanceExit
from aether.runtimes.firecracker.machine import Machine
from aether.runtimes.firecracker.runtime import FirecrackerRuntime
from aether.runtimes.microvm.network import CONTROL_PORT, HOST_ADDRESS, inside
from support.firecracker import FILES, KILLED, answer, left, machines, monitor, need_firecracker, options, running
from support.microvm import code, spec


class Trusting(FirecrackerRuntime):
    """Starts without having found out that guests boot."""

    async def check_machines(self) -> None:
        return


@asynccontextmanager
async def starting(data: Path, **more: object) -> AsyncIterator[tuple[Trusting, asyncio.Task[None], Machine]]:
    """A start that waits for its function, whose machine runs."""
    need_firecracker()
    async with machines(data):  # looks after what is left
        runtime = Trusting(data, options())
        try:
            work: FunctionSpec = spec(code(data / "in", FILES), env={"A": "1"}, **more)
            start = asyncio.create_task(runtime.start(work))
            while not await runtime.list():
                await asyncio.sleep(0)
            machine = await running(runtime._held("i1"))  # pyright: ignore[reportPrivateUsage]
            yield runtime, start, machine
        finally:
            await runtime.close()


async def dialled(machine: Machine) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the host's end of the line; it has no other way in than the machine's network."""
    network = machine._network  # pyright: ignore[reportPrivateUsage]
    assert network is not None
    sock = inside(network.namespace, lambda: socket.create_connection((HOST_ADDRESS, CONTROL_PORT), 5.0))
    sock.setblocking(False)
    return await asyncio.open_connection(sock=sock)


async def emptied(machine: Machine) -> None:
    async with asyncio.timeout(30):
        while await answer(machine, "/mmds") != {}:
            await asyncio.sleep(0.005)


async def test_an_instance_is_ready_when_init_says_so_and_ends_as_it_says(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with starting(data) as (runtime, start, machine):
        # who does not know the secret says nothing to the host, and the metadata stay for /init
        stranger, writer = await dialled(machine)
        writer.write(b"hello 1\nready\n")
        assert await stranger.read() == b""
        writer.close()
        assert (await answer(machine, "/mmds"))["latest"]["aether"].keys() == {machine.plan.token}
        assert (await runtime.status("i1")).phase == FunctionPhase.STARTING
        reader, writer = await dialled(machine)
        writer.write(f"hello {machine.plan.secret}\n".encode())
        await emptied(machine)
        assert not start.done()
        writer.write(b"ready\n")
        await start
        status = await runtime.status("i1")
        assert (status.phase, status.exit, status.reason) == (FunctionPhase.READY, None, "")
        assert status.ready_ms is not None
        stop = asyncio.create_task(runtime.stop("i1", 5.0))
        assert await reader.readline() == b"stop 5000\n"
        writer.write(b"exit 3\n")
        await writer.drain()
        writer.close()
        # /init ends its machine then
        while machine._line.ended is None:  # pyright: ignore[reportPrivateUsage]
            await asyncio.sleep(0.005)
        os.kill(monitor(data, machine), signal.SIGKILL)
        assert await stop == InstanceExit(3, None)
        assert await runtime.list() == []
        assert left(data) == []


async def test_a_function_that_ends_before_it_listens_is_told_so(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with starting(data) as (runtime, start, machine):
        _, writer = await dialled(machine)
        writer.write(f"hello {machine.plan.secret}\nmemory 9\n".encode())
        await writer.drain()
        await emptied(machine)
        os.kill(monitor(data, machine), signal.SIGKILL)
        with pytest.raises(ServiceUnavailable, match=r"more memory than its limit before it listened on port 3000"):
            await start
        writer.close()
        assert await runtime.list() == []
        assert left(data) == []


async def test_a_start_is_over_in_time_or_when_it_is_given_up_and_leaves_nothing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with starting(data, ready_secs=0.4) as (runtime, start, _):
        with pytest.raises(ServiceUnavailable, match=r"did not listen on port 3000 within 0\.4 seconds") as caught:
            await start
        assert caught.value.details is not None
        assert "log" in caught.value.details
        assert await runtime.list() == []
        assert left(data) == []


async def test_a_start_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with starting(data) as (runtime, start, _):
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert await runtime.list() == []
        assert left(data) == []


async def test_what_does_not_answer_its_grace_is_ended(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with starting(data) as (runtime, start, machine):
        reader, writer = await dialled(machine)
        writer.write(f"hello {machine.plan.secret}\nready\n".encode())
        await start
        # a guest that is paused could not hear it
        await machine.pause()
        async with asyncio.timeout(60):
            assert await runtime.stop("i1", 300.0) == KILLED
        assert await reader.read() == b""
        writer.close()
        assert left(data) == []
