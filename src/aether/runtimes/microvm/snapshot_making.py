"""Makes a snapshot: boots a guest that was given nothing, waits until it says that it waits, and saves it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aether.runtimes.microvm.machine import spawn
from aether.runtimes.microvm.network import Network, make_network
from aether.runtimes.microvm.qmp import CAPABILITIES, Control, MonitorError
from aether.runtimes.microvm.snapshots import new_memory

_MAKE_SECS = 300.0
_WAITS = b"aether-init: waiting"
_NICE = 10
"""Makers step back behind those whose callers wait."""


@dataclass(frozen=True, slots=True)
class Making:
    """How to start the monitor of a maker: as for a machine, with memory and control line after `files`."""

    files: tuple[Path, ...]
    command: Callable[[Sequence[int], int], list[str]]
    user: int | None
    memory_mb: int


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
        await self._until_it_waits()
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

    async def _until_it_waits(self) -> None:
        assert self._process is not None
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        said: list[str] = []
        try:
            while text := await reader.readline():
                if text.startswith(_WAITS):
                    return
                said = [*said[-4:], text.decode("utf-8", "replace").strip()]
        except ValueError as error:
            raise MonitorError("the guest says more than it may") from error
        finally:
            transport.close()
        raise MonitorError(f"the guest did not come up: {'; '.join(said) or 'it said nothing'}")

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
