"""One machine from its birth to its end: monitor process, network, metadata, line and console, all owned by one task.

Nothing of a machine has a name on the host but its log and its process, so nothing is left when the process is gone.
A machine does not outlive the process that started it: /init ends the guest when the line breaks, and what hangs
before there is a line is found by its label (see `leftovers`).
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aether.model.function_instance import FunctionPhase, FunctionSpec, FunctionStatus, StartKind
from aether.model.instance import InstanceExit
from aether.runtimes.microvm import line, metadata
from aether.runtimes.microvm.console import Console, open_log
from aether.runtimes.microvm.line import Line
from aether.runtimes.microvm.metadata import Metadata
from aether.runtimes.microvm.network import Network, inside, make_network
from aether.runtimes.microvm.qmp import CAPABILITIES, Control, MonitorError
from aether.runtimes.microvm.snapshots import Snapshot

_END_SECS = 5.0
"""For a guest to end after its function has, and for a killed monitor to be gone."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a monitor: `files` are opened by us and reach it as descriptors, so it needs no right to them."""

    files: tuple[Path, ...]
    command: Callable[[Sequence[int], int], list[str]]
    """The command line from the descriptors of `files` and the TAP."""
    user: int | None
    restore: Restore | None = None


@dataclass(frozen=True, slots=True)
class Restore:
    """From what to go on instead of booting; after `files`, the command is given memory and control line."""

    snapshot: Snapshot
    token: str
    """For the metadata service: the guest reads it on its console, as it has no command line of its own."""


class Machine:
    """A started machine. `run` must be awaited by exactly one task, which ends the machine when it is cancelled."""

    def __init__(self, spec: FunctionSpec, log: Path, launch: Launch, document: Metadata, secret: str) -> None:
        self.spec = spec
        self.began = time.monotonic()
        self.gone = asyncio.Event()
        self._log = log
        self._launch = launch
        self._metadata = document
        self._line = Line(secret)
        self._network: Network | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ready_ms: float | None = None
        self._control: socket.socket | None = None
        self._state = -1
        self.refusal = ""
        """Why the monitor did not restore the machine."""
        self.stopping = False
        """Whether somebody wants its end."""

    @property
    def ready(self) -> asyncio.Event:
        return self._line.ready

    @property
    def up(self) -> asyncio.Event:
        """Set once the guest has its assignment and has called."""
        return self._line.up

    def status(self) -> FunctionStatus:
        phase = FunctionPhase.READY if self._line.ready.is_set() else FunctionPhase.STARTING
        ended = self.exit() if self.gone.is_set() else None
        if ended is not None:
            phase = FunctionPhase.EXITED
        reason = "" if ended is None or self._line.ended is not None else "the machine ended without a word"
        kind = StartKind.COLD if self._launch.restore is None else StartKind.RESTORED
        return FunctionStatus(self.spec.instance_id, self.spec.function, phase, self._ready_ms, ended, reason, kind)

    def exit(self) -> InstanceExit:
        """How the function ended; once `gone` is set."""
        return self._line.ended or line.KILLED

    def note_ready(self) -> None:
        self._ready_ms = (time.monotonic() - self.began) * 1000

    async def connect(self) -> socket.socket:
        """A connected socket to the function. Raises OSError."""
        if self._network is None:
            raise ConnectionRefusedError(f"instance {self.spec.instance_id} is not running")
        return await self._network.connect(self.spec.port)

    async def stop(self, grace_secs: float) -> None:
        """End the function, and the machine with it; returns when it is gone."""
        self.stopping = True
        if self._line.stop(grace_secs):
            with suppress(TimeoutError):
                async with asyncio.timeout(max(grace_secs, 0.0) + _END_SECS):
                    await self.gone.wait()
        self.kill()
        await self.gone.wait()

    def kill(self) -> None:
        """End the monitor at once."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def run(self) -> None:
        """Start the machine and return when all of it is gone."""
        try:
            # a thread cannot be cancelled: what it makes is waited for and then taken away
            starting = asyncio.ensure_future(asyncio.to_thread(self._start))
            try:
                await asyncio.shield(starting)
            except asyncio.CancelledError:
                await asyncio.wait([starting])
                raise
            if not self.stopping:  # else there was nothing to end yet when it was told to
                await self._watch()
        finally:
            self.kill()
            if self._process is not None:
                await asyncio.shield(asyncio.to_thread(self._process.wait))
                for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
                    if pipe is not None:
                        pipe.close()
            if self._control is not None:
                self._control.close()
            if self._network is not None:
                self._network.close()
            self.gone.set()

    def _start(self) -> None:
        self._network = network = make_network()
        opened = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in self._launch.files]
        given, passed = list(opened), list(opened)
        try:
            if (restore := self._launch.restore) is not None:
                self._control, theirs = socket.socketpair()
                opened += (theirs.detach(), restore.snapshot.open_state())
                self._state = opened[-1]
                given += (restore.snapshot.memory, opened[-2])
                passed += (restore.snapshot.memory, *opened[-2:])
            command = self._launch.command(given, network.tap)
            # who breaks out of the monitor finds himself in the machine's own network
            self._process = spawn(network, command, passed, self._launch.user)
        finally:
            for fd in opened:
                os.close(fd)
            network.close_tap()

    async def _resume(self, restore: Restore) -> None:
        """Have the monitor load the snapshot, then tell the guest who it is; end the machine if that cannot be."""
        assert self._control is not None
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            async with Control(self._control) as control:
                await control.execute("migrate-set-capabilities", capabilities=CAPABILITIES)
                await control.execute("migrate-incoming", uri=f"fd:{self._state}")
                # a guest that runs reads its console; what is written before would be lost
                await control.event("RESUME")
            os.write(self._process.stdin.fileno(), f"{restore.token}\n".encode())
        except (MonitorError, OSError) as error:
            self.refusal = str(error)
            self.kill()

    async def _watch(self) -> None:
        process, network = self._process, self._network
        assert process is not None
        assert network is not None
        assert network.metadata is not None
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        handle = os.pidfd_open(process.pid)

        def over() -> None:
            # it stays readable, and would be told of in every round of the loop
            loop.remove_reader(handle)
            ended.set()

        loop.add_reader(handle, over)
        journal = open_log(self._log)
        console, errors = Console(journal, b"stdout"), Console(journal, b"stderr")
        try:
            await loop.connect_read_pipe(lambda: console, process.stdout)
            await loop.connect_read_pipe(lambda: errors, process.stderr)
            async with asyncio.TaskGroup() as tasks:
                serving = [
                    tasks.create_task(metadata.serve(network.metadata, self._metadata)),
                    tasks.create_task(self._line.serve(network.control)),
                ]
                if self._launch.restore is not None:
                    serving.append(tasks.create_task(self._resume(self._launch.restore)))
                await ended.wait()
                # by then the line has been read, too: its last word may have come just before the end
                with suppress(TimeoutError):
                    async with asyncio.timeout(_END_SECS):
                        await console.done.wait()
                        await errors.done.wait()
                for task in serving:
                    task.cancel()
        finally:
            journal.close()
            loop.remove_reader(handle)
            os.close(handle)


def spawn(
    network: Network, command: list[str], descriptors: Sequence[int], user: int | None
) -> subprocess.Popen[bytes]:
    """Start a monitor in `network` as `user`, without any right, with these descriptors and the TAP."""

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            env={"PATH": os.defpath},
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(*descriptors, network.tap),
            start_new_session=True,
            umask=0o077,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )

    return inside(network.namespace, start)


def how(ended: InstanceExit) -> str:
    """Why a machine that was never ready is gone, in words."""
    if ended == line.KILLED:
        return "its machine ended"
    return f"it {ended}"
