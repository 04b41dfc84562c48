"""Makes a snapshot: boots a guest, waits until it is where its clones shall go on, and saves it.

That of a runtime was given nothing and says on its console that it waits; that of a function was given the function
and says on its line that this one listens and was stopped.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aether.runtimes.microvm import metadata
from aether.runtimes.microvm.line import Line
from aether.runtimes.microvm.machine import spawn
from aether.runtimes.microvm.metadata import Metadata
from aether.runtimes.microvm.network import Network, make_network
from aether.runtimes.microvm.qmp import CAPABILITIES, Control, MonitorError
from aether.runtimes.microvm.snapshots import new_memory

_MAKE_SECS = 300.0
_WAITS = b"aether-init: waiting"
_TAIL = 2000
_NICE = 10
"""Makers step back behind those whose callers wait."""


@dataclass(frozen=True, slots=True)
class Making:
    """How to start the monitor of a maker: as for a machine, with memory and control line after `files`."""

    files: tuple[Path, ...]
    command: Callable[[Sequence[int], int], list[str]]
    user: int | None
    memory_mb: int
    function: tuple[Metadata, str] | None = None
    """What the guest is told, with the secret of its line; None where it is told nothing."""


async def make_snapshot(making: Making) -> tuple[int, int]:
    """Descriptors, the caller's to close, of a guest's memory and of the state of its devices.

    Raises MonitorError with the end of what the guest said, TimeoutError, OSError, ServiceUnavailable; nothing is
    left of a maker that failed or was cancelled.
    """
    maker = _Maker(making)
    starting = asyncio.ensure_future(asyncio.to_thread(maker.start))
    try:
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            await asyncio.wait([starting])
            raise
        async with asyncio.timeout(_MAKE_SECS):
            return await maker.save()
    finally:
        await asyncio.shield(asyncio.to_thread(maker.close))


class _Maker:
    def __init__(self, making: Making) -> None:
        self._making = making
        self._network: Network | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._memory = self._state = -1

    def start(self) -> None:
        self._network = network = make_network()
        self._memory = new_memory(self._making.memory_mb << 20)
        self._state = os.memfd_create("aether-state", os.MFD_CLOEXEC)
        opened = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in self._making.files]
        try:
            self._control, theirs = socket.socketpair()
            opened.append(theirs.detach())
            given = (*opened[:-1], self._memory, opened[-1])
            command = self._making.command(given, network.tap)
            self._process = spawn(network, command, given, self._making.user)
            os.setpriority(os.PRIO_PROCESS, self._process.pid, _NICE)
        finally:
            for fd in opened:
                os.close(fd)
            network.close_tap()

    async def save(self) -> tuple[int, int]:
        assert self._control is not None
        assert self._process is not None
        assert self._network is not None
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        try:
            if self._making.function is None:
                await _until_it_waits(reader)
            else:
                await _until_it_is_parked(reader, self._network, *self._making.function)
        finally:
            transport.close()
        async with Control(self._control) as control:
            await control.execute("migrate-set-capabilities", capabilities=CAPABILITIES)
            await control.give("state", self._state)
            await control.execute("migrate", uri="fd:state")
            # the machine is stopped, and its memory whole, before this is said
            if await control.event("MIGRATION", "completed", "failed") == "failed":
                raise MonitorError("the monitor did not save the machine")
        await asyncio.to_thread(self._end)
        saved, self._memory, self._state = (self._memory, self._state), -1, -1
        return saved

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        self._end()
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
                if pipe is not None:
                    pipe.close()
        if self._control is not None:
            self._control.close()
        if self._network is not None:
            self._network.close()
        for fd in (self._memory, self._state):
            if fd >= 0:
                os.close(fd)


async def _until_it_waits(console: asyncio.StreamReader) -> None:
    said: list[str] = []
    try:
        while text := await console.readline():
            if text.startswith(_WAITS):
                return
            said = [*said[-4:], text.decode("utf-8", "replace").strip()]
    except ValueError as error:
        raise MonitorError("the guest says more than it may") from error
    raise MonitorError(f"the guest did not come up: {'; '.join(said) or 'it said nothing'}")


async def _until_it_is_parked(
    console: asyncio.StreamReader, network: Network, document: Metadata, secret: str
) -> None:
    assert network.metadata is not None
    line = Line(secret)
    parked = asyncio.create_task(line.parked.wait())
    said = asyncio.create_task(_end_of(console))
    serving = [
        asyncio.create_task(metadata.serve(network.metadata, document)),
        asyncio.create_task(line.serve(network.control)),
    ]
    try:
        await asyncio.wait([parked, said, *serving], return_when=asyncio.FIRST_COMPLETED)
        if line.parked.is_set():
            return
        if said.done():
            raise MonitorError(f"the function did not come up: {said.result() or 'it said nothing'}")
        raise MonitorError("the guest was not served")
    finally:
        tasks = [parked, said, *serving]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _end_of(console: asyncio.StreamReader) -> str:
    """The end of what was said, once it is over; what a function says is no reason to hold it up."""
    kept = b""
    while data := await console.read(_TAIL):
        kept = (kept + data)[-_TAIL:]
    return kept.decode("utf-8", "replace").strip()
