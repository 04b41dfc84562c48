"""One machine from its birth to its end: jail, network, monitor, its API, line and console, all owned by one task.

The jailer starts the monitor in a process namespace of its own and ends, so the monitor is nobody's child here: it is
known by a descriptor (pidfd), which tells its end and is the only thing that is ever sent a signal. What has a name
on the host, the jail's folder and the cgroup, is taken away by the same task; see `sweep` for a killed server.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from aether.model.errors import ServiceUnavailable
from aether.model.function_instance import FunctionPhase, FunctionSpec, FunctionStatus
from aether.model.instance import InstanceExit
from aether.runtimes.firecracker import jail as jails
from aether.runtimes.firecracker.api import PAUSE, RESUME, SNAPSHOT, Api, Call, put_metadata
from aether.runtimes.firecracker.cgroups import Cgroups, end, remove
from aether.runtimes.firecracker.jail import Jail, Programs
from aether.runtimes.firecracker.mounts import Owners, with_files
from aether.runtimes.microvm import line
from aether.runtimes.microvm.console import Console, open_log
from aether.runtimes.microvm.line import Line
from aether.runtimes.microvm.network import Network, make_network
from aether.runtimes.process.shim.journal import Journal

_END_SECS = 5.0
"""For a guest to end after its function has."""
_JAIL_SECS = 10.0
_LISTEN_SECS, _LOOK_SECS = 5.0, 0.001
"""How long the monitor may take to listen, and how often it is looked whether it does: it has no way to say so."""
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Plan:
    """How to start a machine. `files` are shown in the jail by the names that are their keys; `calls` are made in
    their order, and are asked for at the moment they are made. `token` is where the guest looks for its assignment,
    which holds `secret`."""

    programs: Programs
    cgroups: Cgroups
    owners: Owners
    jail: Jail
    files: Mapping[str, Path]
    calls: Callable[[], Iterable[Call]]
    token: str
    secret: str
    level: str = "Error"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A machine that was stopped in its tracks: two files, mode 0600, and the boot token that its guest has.

    Only the same version of Firecracker loads it, with drives and sizes as they were."""

    state: Path
    memory: Path
    token: str


class Machine:
    """A started machine. `run` must be awaited by exactly one task, which ends the machine when it is cancelled.

    `running` is set once the guest's processors run, `ready` once its function listens, `gone` when nothing of the
    machine is left but the log."""

    def __init__(self, spec: FunctionSpec, log: Path, plan: Plan) -> None:
        self.spec = spec
        self.plan = plan
        self.began = time.monotonic()
        self.running = asyncio.Event()
        self.gone = asyncio.Event()
        self.failure = "the machine ended without a word"
        """Why it ended when /init did not say it."""
        self._log = log
        self._task: asyncio.Task[None] | None = None
        self._unwanted = False
        self._line = Line(plan.secret)
        self._network: Network | None = None
        self._jailer: subprocess.Popen[bytes] | None = None
        self._jailed = asyncio.Event()
        self._monitor = -1
        self._ended = asyncio.Event()
        self._api: Api | None = None
        self._consoles: list[Console] = []
        self._paused = False
        self._ready_ms: float | None = None

    @property
    def ready(self) -> asyncio.Event:
        return self._line.ready

    def status(self) -> FunctionStatus:
        phase = FunctionPhase.READY if self._line.ready.is_set() else FunctionPhase.STARTING
        ended = self.exit() if self.gone.is_set() else None
        if ended is not None:
            phase = FunctionPhase.EXITED
        reason = self.failure if ended is not None and self._line.ended is None else ""
        return FunctionStatus(self.spec.instance_id, self.spec.function, phase, self._ready_ms, ended, reason)

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

    async def call(self, call: Call) -> object:
        """What the monitor answers to `call`. Raises ServiceUnavailable."""
        if self._api is None:
            raise ServiceUnavailable(f"instance {self.spec.instance_id} is not running")
        return await self._api.make(call)

    async def pause(self) -> None:
        await self.call(PAUSE)
        self._paused = True

    async def resume(self) -> None:
        await self.call(RESUME)
        self._paused = False

    async def take_snapshot(self, state: Path, memory: Path) -> Snapshot:
        """Pause the machine and write it to two new files, on the file system of the data folder.

        Whether it is resumed after that or ended is the caller's: two machines that go on from here are the same one
        twice."""
        await self.pause()
        await self.call(SNAPSHOT)
        files = {jails.TAKEN_STATE: state, jails.TAKEN_MEMORY: memory}
        await _surely(asyncio.to_thread(jails.take_files, self.plan.jail, files))
        return Snapshot(state, memory, self.plan.token)

    async def stop(self, grace_secs: float) -> None:
        """End the function, and the machine with it; returns when it is gone."""
        if not self._paused and self._line.stop(grace_secs):
            with suppress(TimeoutError):
                async with asyncio.timeout(max(grace_secs, 0.0) + _END_SECS):
                    await self.gone.wait()
        self.kill()
        await self.gone.wait()

    def kill(self) -> None:
        """End the monitor at once, or the start of one that there is not yet."""
        self._unwanted = True
        if self._monitor >= 0:
            self._signal()
        elif self._task is not None:
            self._task.cancel()

    def _signal(self) -> None:
        if self._monitor >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._monitor, signal.SIGKILL)
        elif self._jailer is not None and self._jailer.returncode is None:
            self._jailer.kill()

    async def run(self) -> None:
        """Start the machine and return when all of it is gone. Raises ServiceUnavailable when it cannot start."""
        if self._unwanted:
            self.gone.set()
            return
        journal = open_log(self._log)
        self._task = asyncio.current_task()
        try:
            # a thread cannot be cancelled: what it makes is waited for and then taken away
            try:
                await _surely(asyncio.to_thread(self._spawn))
            except OSError as error:
                raise ServiceUnavailable(f"a machine's jail cannot be made: {error}") from error
            await self._live(journal)
        except ServiceUnavailable as error:
            self.failure = str(error)
            raise
        finally:
            self._task = None  # what ends it is not to be cut short
            try:
                await _surely(self._end())
            finally:
                journal.close()
                self.gone.set()

    def _spawn(self) -> None:
        plan, jail = self.plan, self.plan.jail
        self._network = network = make_network(jail.user)
        jails.make_jail(jail, list(plan.files), self.spec.instance_id)
        command = jails.jailer_command(
            plan.programs,
            jail,
            network=f"/proc/{os.getpid()}/fd/{network.namespace}",
            cgroup_version=plan.cgroups.version,
            memory_mb=self.spec.memory_mb,
            vcpus=self.spec.vcpus,
            level=plan.level,
        )

        def spawn() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                command,
                env={"PATH": os.defpath},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                umask=0o077,
            )

        files = {jail.root / name: source for name, source in plan.files.items()}
        self._jailer = with_files(files, plan.owners.namespace(jail.user), spawn)

    async def _live(self, journal: Journal) -> None:
        jailer, network = self._jailer, self._network
        assert jailer is not None
        assert network is not None
        loop = asyncio.get_running_loop()
        for pipe, name in ((jailer.stdout, b"stdout"), (jailer.stderr, b"stderr")):
            console = Console(journal, name)
            self._consoles.append(console)
            await loop.connect_read_pipe(lambda console=console: console, pipe)
        await self._until_jailed(jailer)
        handle = jails.open_monitor(self.plan.jail, self.plan.cgroups)
        self._monitor = handle
        loop.add_reader(handle, self._note_end)
        self._api = await self._connect()
        for call in self.plan.calls():
            await self._api.make(call)
        self.running.set()
        async with asyncio.TaskGroup() as tasks:
            serving = [
                tasks.create_task(self._line.serve(network.control)),
                tasks.create_task(self._forget()),
            ]
            await self._ended.wait()
            for task in serving:
                task.cancel()

    def _note_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._monitor)
        # whoever adopts orphans reaps it, which may be this process: as the first of a container it is
        with suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self._monitor, os.WEXITED | os.WNOHANG)
        self._ended.set()

    async def _until_jailed(self, jailer: subprocess.Popen[bytes]) -> None:
        """Return when the jailer has started the monitor and ended. Raises ServiceUnavailable."""
        handle = os.pidfd_open(jailer.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(handle, self._jailed.set)
        try:
            async with asyncio.timeout(_JAIL_SECS):
                await self._jailed.wait()
        except TimeoutError as error:
            raise ServiceUnavailable(f"the jailer did not start Firecracker within {_JAIL_SECS:g} seconds") from error
        finally:
            loop.remove_reader(handle)
            os.close(handle)
        if (code := jailer.wait()) != 0:
            how = f"exited with {code}" if code > 0 else f"was ended by signal {-code}"
            raise ServiceUnavailable(f"the jailer {how}; its reason is in the log")

    async def _connect(self) -> Api:
        try:
            async with asyncio.timeout(_LISTEN_SECS):
                while (made := jails.open_socket(self.plan.jail)) is None:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_LOOK_SECS):
                            await self._ended.wait()
                            raise ServiceUnavailable("Firecracker ended before it could be called")
        except TimeoutError as error:
            raise ServiceUnavailable(f"Firecracker did not listen within {_LISTEN_SECS:g} seconds") from error
        return await Api.over(made)

    async def _forget(self) -> None:
        """Once /init has what it needs, the function is not to find it again."""
        await self._line.up.wait()
        try:
            await self.call(put_metadata({}))
        except ServiceUnavailable:
            self.kill()  # a machine that would go on telling its secrets must not go on

    async def _end(self) -> None:
        self._signal()
        jailer = self._jailer
        if jailer is not None:
            await asyncio.to_thread(jailer.wait)
            if self._monitor < 0:
                # killed between starting the monitor and saying so, or what it said was not to be used
                await asyncio.to_thread(end, self.plan.cgroups, self.plan.jail.parent, self.plan.jail.name)
            else:
                await self._ended.wait()
                os.close(self._monitor)
                self._monitor = -1
            for console in self._consoles:
                await console.done.wait()
            for pipe in (jailer.stdout, jailer.stderr)[len(self._consoles) :]:
                if pipe is not None:
                    pipe.close()
        if self._api is not None:
            self._api.close()
        await asyncio.to_thread(self._clear)

    def _clear(self) -> None:
        plan = self.plan
        with ExitStack() as stack:  # each of these is done whatever becomes of the others
            if self._network is not None:
                stack.callback(self._network.close)
            stack.callback(jails.remove_jail, plan.jail)
            stack.callback(remove, plan.cgroups, plan.jail.parent, plan.jail.name)


async def _surely(work: Awaitable[Made]) -> Made:
    """The result of `work`, which goes on to its end however often the caller is cancelled."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from (None if task.cancelled() else task.exception())
    return task.result()
