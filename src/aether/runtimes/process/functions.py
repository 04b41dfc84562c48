"""Functions as sandboxed processes of this machine, for machines without virtual ones: fast, and kept apart as apps
are, by the one kernel that they share.

An instance is an instance of the process runtime (sandbox, cgroups, keeper, log) with a lifeline: its keeper ends it
when the server is gone. Folders: `<data>/code`, and those of `ProcessRuntime`.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import socket
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from aether.model.errors import Conflict, NotFound, ServiceUnavailable
from aether.model.function_instance import Code, FunctionPhase, FunctionSpec, FunctionStatus, RegisteredRuntimes
from aether.model.instance import InstanceExit, InstanceSpec, Limits, LogRecord
from aether.runtimes.interpreters import node_program, python_program
from aether.runtimes.microvm.assignment import encode
from aether.runtimes.microvm.console import LOG_BYTES, read_log
from aether.runtimes.process import egress
from aether.runtimes.process.egress import Egress
from aether.runtimes.process.instance import ProcessInstance
from aether.runtimes.process.report import SandboxReport
from aether.runtimes.process.runtime import ProcessRuntime, RuntimeOptions
from aether.runtimes.process.trees import TreeStore
from aether.runtimes.rules import check_name, check_spec
from aether.runtimes.trimming import trim_logs

FIRST_UID = 280_000
"""Sandboxes that root makes run as users from here on, one for each function, who own nothing."""
MAX_PROCESSES = 256
"""Processes and threads of one instance."""
_LOG_RATE = 1 << 20
"""Bytes in a second; more has to wait, as in a machine's console."""
_LOG_TAIL = 20
_ENV: Mapping[str, Mapping[str, str]] = {
    "node": {"NODE_ENV": "production"},
    # the code is read-only, and what is printed is a log
    "python": {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"},
}
_UNASKED = ("NODE_ENV", "NPM_CONFIG_UPDATE_NOTIFIER", "OLDPWD", "PWD", "SHLVL", "TMPDIR")
"""What apps are given, or shells set, and functions did not ask for."""
T = TypeVar("T")
_LOST = InstanceExit(code=None, signal=9)


class _Held:
    """One instance from the call of `start` until it was stopped."""

    def __init__(self, spec: FunctionSpec) -> None:
        self.spec = spec
        self.began = time.monotonic()
        self.launching: asyncio.Task[ProcessInstance] | None = None
        self.launched = asyncio.Event()
        """Set when there is a process, or will be none."""
        self.kept: ProcessInstance | None = None
        self.ready_ms: float | None = None
        self.exit: InstanceExit | None = None
        self.gone = asyncio.Event()
        self.removal: asyncio.Task[None] | None = None

    def ended(self, how: InstanceExit) -> None:
        self.exit = self.exit or how
        self.launched.set()
        self.gone.set()


class ProcessFunctions:
    """Implements `FunctionRuntime` with sandboxed processes; no root, no virtual machine."""

    def __init__(self, data_dir: Path, registered: RegisteredRuntimes | None = None) -> None:
        """`registered`: runtimes that only virtual machines can run."""
        self._registered = registered
        self._data = Path(os.path.abspath(data_dir))
        self._data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lifeline, self._our_end = os.pipe()
        self._processes = ProcessRuntime(
            self._data,
            RuntimeOptions(
                log_bytes=LOG_BYTES,
                log_rate=_LOG_RATE,
                tell_listening=True,
                egress=Egress(egress.NONE),
                first_uid=FIRST_UID,
                lifeline=self._lifeline,
            ),
        )
        self._trees = TreeStore(self._data / "code")
        self._programs: dict[str, Path] = {}
        self._held: dict[str, _Held] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def prepare(self, runtime: str, code: Code) -> None:
        await self._prepared(runtime, code)

    async def start(self, spec: FunctionSpec) -> None:
        check_spec(spec)
        if spec.instance_id in self._held:
            raise Conflict(f"there is an instance {spec.instance_id} already")
        held = self._held[spec.instance_id] = _Held(spec)
        try:
            program, tree = await self._prepared(spec.runtime, spec.code)
            spec_of_process = _instance(spec, program, tree)
            if held.removal is not None:
                raise ServiceUnavailable(f"instance {spec.instance_id} was stopped before it was started")
            held.launching = self._own(self._processes.start(spec_of_process))
            kept = await asyncio.shield(held.launching)
            held.kept = kept
            held.launched.set()
            await self._until_ready(held, kept, self._own(self._watch(held, kept)))
        except BaseException:
            await self._remove(held)
            raise

    async def connect(self, instance_id: str) -> socket.socket:
        held = self._get(instance_id)
        if held.kept is None or held.ready_ms is None:
            raise ConnectionRefusedError(f"instance {instance_id} does not listen yet")
        made = await held.kept.dial()
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    async def wait(self, instance_id: str) -> InstanceExit:
        held = self._get(instance_id)
        await held.gone.wait()
        return held.exit or _LOST

    async def stop(self, instance_id: str, grace_secs: float) -> InstanceExit:
        held = self._get(instance_id)
        await held.launched.wait()
        if held.kept is not None:
            held.ended(await held.kept.stop(grace_secs))
        await self._remove(held)
        return held.exit or _LOST

    async def status(self, instance_id: str) -> FunctionStatus:
        held = self._get(instance_id)
        phase = FunctionPhase.STARTING if held.ready_ms is None else FunctionPhase.READY
        if held.gone.is_set():
            phase = FunctionPhase.EXITED
        return FunctionStatus(instance_id, held.spec.function, phase, held.ready_ms, held.exit)

    async def list(self) -> Sequence[str]:
        return sorted(self._held)

    async def log(self, instance_id: str, tail: int = 100) -> Sequence[LogRecord]:
        check_name(instance_id)
        return await asyncio.to_thread(self._log, instance_id, tail)

    async def sweep(self) -> Sequence[str]:
        left = sorted(set(await self._processes.known()) - set(self._held))
        for instance_id in left:
            await self._processes.remove(instance_id)
        await asyncio.to_thread(self._trees.sweep)
        return left

    async def trim(self, unused_secs: float, logs: int) -> None:
        codes = {self._trees.key(held.spec.code) for held in self._held.values()}
        await asyncio.to_thread(self._trees.trim, unused_secs, codes)
        await asyncio.to_thread(trim_logs, self._data / "logs", set(self._held), logs)

    async def close(self) -> None:
        done = await asyncio.gather(*map(self._remove, list(self._held.values())), return_exceptions=True)
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._processes.close()
        for fd in (self._our_end, self._lifeline):
            if fd >= 0:
                os.close(fd)
        self._our_end = self._lifeline = -1
        for result in done:
            if isinstance(result, BaseException):
                raise result

    async def sandbox(self) -> SandboxReport:
        """What keeps functions apart here, and what is missing for it."""
        return await self._processes.probe()

    # --- starting ---------------------------------------------------------------------------------------------

    async def _prepared(self, runtime: str, code: Code) -> tuple[Path, Path]:
        """The interpreter and the folder of the code."""
        if runtime not in _ENV:
            if self._registered is not None and await self._registered.has(runtime):
                raise ServiceUnavailable(
                    f"the runtime '{runtime}' is a root file system, which needs virtual machines; this server runs "
                    "functions in sandboxes (AETHER_FUNCTION_RUNTIME=qemu or firecracker)"
                )
            raise NotFound(f"there is no runtime called '{runtime}'; here are {', '.join(_ENV)}")
        # owned, because the first that fails ends the waiting, and `close` is to find the others
        program, tree, found, _ = await asyncio.gather(
            self._own(self._program(runtime)),
            self._own(self._trees.get(code)),
            self._own(self.sandbox()),
            self._own(self._processes.warm()),
        )
        if not found.usable:
            raise ServiceUnavailable(f"functions cannot be run here: {found.reason}; {found.remedy}")
        return program, tree

    async def _program(self, runtime: str) -> Path:
        if runtime not in self._programs:
            self._programs[runtime] = await asyncio.to_thread(self._find_program, runtime)
        return self._programs[runtime]

    def _find_program(self, runtime: str) -> Path:
        view = self._processes.view
        found = node_program() if runtime == "node" else python_program()
        shown = [Path(folder) for folder in (*view.folders, *view.tools)]
        if any(folder in found.parents for folder in shown):
            return found
        # the server may run in an interpreter of its user's own, while the system has one for everybody
        if runtime == "python" and (other := shutil.which("python3", path=":".join(view.path))) is not None:
            return Path(other)
        raise ServiceUnavailable(
            f"functions cannot run here: {found} lies where no function may look; install '{runtime}' below /usr"
        )

    async def _until_ready(self, held: _Held, kept: ProcessInstance, watch: asyncio.Task[None]) -> None:
        """Return when the function listens. Raises ServiceUnavailable with the end of the log when it will not."""
        spec = held.spec
        listens = asyncio.ensure_future(kept.listens.wait())
        try:
            await asyncio.wait([listens, watch], timeout=spec.ready_secs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            listens.cancel()
        if kept.listens.is_set():
            held.ready_ms = (time.monotonic() - held.began) * 1000
            return
        if held.exit is not None:
            reason = f"it {held.exit} before it listened on port {spec.port}"
        else:
            reason = f"it did not listen on port {spec.port} within {spec.ready_secs:g} seconds"
        said = [item.text for item in await self.log(spec.instance_id, _LOG_TAIL)]
        raise ServiceUnavailable(f"instance {spec.instance_id} of {spec.function} failed: {reason}", {"log": said})

    async def _watch(self, held: _Held, kept: ProcessInstance) -> None:
        held.ended(await kept.wait())

    # --- the end ----------------------------------------------------------------------------------------------

    async def _remove(self, held: _Held) -> None:
        """Take away all of an instance but its log; a caller that goes away does not stop it."""
        if held.removal is None:
            held.removal = self._own(self._take_away(held))
        await asyncio.shield(held.removal)

    async def _take_away(self, held: _Held) -> None:
        try:
            if held.launching is not None:
                await asyncio.wait([held.launching])
                await self._processes.remove(held.spec.instance_id)
        finally:
            held.ended(_LOST)
            del self._held[held.spec.instance_id]

    def _own(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits has it; those that went away will not ask

    # --- finding ----------------------------------------------------------------------------------------------

    def _get(self, instance_id: str) -> _Held:
        if (held := self._held.get(instance_id)) is None:
            raise NotFound(f"there is no instance {instance_id}")
        return held

    def _log(self, instance_id: str, tail: int) -> list[LogRecord]:
        """Logs lie in a folder for each function, and only running instances say which theirs is."""
        found = [path.parent / f"{instance_id}.log" for path in (self._data / "logs").glob(f"*/{instance_id}.log*")]
        return read_log(max(found, key=_changed), tail) if found else []


def _changed(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _instance(spec: FunctionSpec, program: Path, tree: Path) -> InstanceSpec:
    """The function as the process runtime takes it. Raises BadRequest for variables that no guest can be given."""
    argv = (os.fspath(program), spec.entrypoint)
    env = {**_ENV[spec.runtime], **spec.env, "PORT": str(spec.port)}
    encode(argv, env, port=spec.port, secret="", time_ns=0)
    memory = spec.memory_mb << 20
    unasked = [name for name in _UNASKED if name not in env]
    return InstanceSpec(
        instance_id=spec.instance_id,
        app=spec.function,
        deployment_id="",
        release=0,
        digest=spec.code.digest,
        root=tree,
        command=f"unset {' '.join(unasked)}; exec {shlex.join(argv)}",
        port=spec.port,
        env=env,
        limits=Limits(memory_bytes=memory, cpus=float(spec.vcpus), pids=MAX_PROCESSES, tmp_bytes=memory // 2),
        process="function",
    )
