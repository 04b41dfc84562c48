"""The process runtime: starts instances, finds them again, removes them, reads their logs.

Folders: `<data>/instances/<id>/` (record, lock, socket, state), `<data>/logs/<app>/<id>.log` and `.log.1`. What keeps
running belongs to keepers (see `shim`), so closing this object, or killing its process, ends no instance.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aether.model.errors import BadRequest, ServiceUnavailable
from aether.model.instance import Console, InstanceSpec, KeptLog, Limits, LogRecord
from aether.runtimes.process import host, record, report, sandbox, seccomp
from aether.runtimes.process.cgroups import Cgroups, Group, detect
from aether.runtimes.process.egress import Egress
from aether.runtimes.process.instance import ProcessInstance
from aether.runtimes.process.logs import LogReader, kept_logs
from aether.runtimes.process.nursery import Nursery
from aether.runtimes.process.place import Place
from aether.runtimes.process.report import SandboxReport
from aether.runtimes.process.shim.plan import BUBBLEWRAP, NONE, Plan
from aether.runtimes.process.volumes import Volumes

FIRST_UID = 200_000
_IDLE_DATA_BYTES = 128 * 1024 * 1024
"""Allowed on top of the memory limit where only RLIMIT_DATA stands in for it: stacks that threads reserve unused."""
_START_SECS = 15.0
_PROBE_SECS = 15.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ERRORS = "keeper.err"
_BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from shim.keeper import main; main()"


_OPEN = Egress()


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """`sandbox`: auto, bubblewrap, or none (plain children). `log_bytes`: of one log file; one older one is kept.
    `lifeline`: the reading end of a pipe; instances are ended when its other end is closed, so when nobody has it;
    their keepers are then forked by a nursery. `log_rate`: bytes of output taken in a second, 0 for all that come.
    `tell_listening`: see `ProcessInstance.listens`."""

    sandbox: str = "auto"
    log_bytes: int = 10 * 1024 * 1024
    open_files: int = 65_536
    egress: Egress = _OPEN
    first_uid: int = FIRST_UID
    lifeline: int = -1
    log_rate: int = 0
    tell_listening: bool = False


class ProcessRuntime:
    """Implements `Runtime` with sandboxed processes of this machine."""

    def __init__(self, data_dir: Path, options: RuntimeOptions | None = None) -> None:
        self._data = Path(os.path.abspath(data_dir))
        self._options = options or RuntimeOptions()
        self._instances_dir = self._data / "instances"
        self._view = host.survey(self._data)
        self.volumes = Volumes(self._data)
        self._findings = report.look()
        self._cgroups: Cgroups | None = None
        self._report: SandboxReport | None = None
        self._probing = asyncio.Lock()
        self._held: dict[str, ProcessInstance] = {}
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        self._uid_lock = threading.Lock()
        self._starts: set[asyncio.Task[ProcessInstance]] = set()
        lifeline = self._options.lifeline
        self._nursery = Nursery(self._data, lifeline) if lifeline >= 0 else None

    # --- Runtime ----------------------------------------------------------------------------------------------

    async def start(self, spec: InstanceSpec) -> ProcessInstance:
        # a caller that gives up must not leave half a keeper: the start goes on by itself, to be adopted or removed
        task = asyncio.create_task(self._start(spec))
        self._starts.add(task)
        task.add_done_callback(self._started)
        return await asyncio.shield(task)

    def _started(self, task: asyncio.Task[ProcessInstance]) -> None:
        self._starts.discard(task)
        if not task.cancelled():
            task.exception()  # whoever called has it; one that gave up will not ask

    async def _start(self, spec: InstanceSpec) -> ProcessInstance:
        folder = self._folder(spec.instance_id)
        _check_name(spec.app)
        found = await self.probe()
        if not found.usable:
            raise ServiceUnavailable(f"apps cannot be run here: {found.reason}; {found.remedy}")
        async with self._only(spec.instance_id):
            if record.was_started(folder) and (known := self._adopt(spec.instance_id)) is not None:
                return known
            if (folder / record.LOCK).exists() and record.alive(folder):
                await self._settled_start(folder)
                if (known := self._adopt(spec.instance_id)) is not None:
                    return known
            await self._spawn(spec, folder)
            if (known := self._adopt(spec.instance_id)) is None:
                raise ServiceUnavailable(f"the folder of instance {spec.instance_id} vanished while it started")
            return known

    async def adopt(self, instance_id: str) -> ProcessInstance | None:
        async with self._only(instance_id):
            folder = self._folder(instance_id)
            if record.Record.read(folder) is None:
                return None
            await self._settled_start(folder)
            return self._adopt(instance_id)

    async def known(self) -> Sequence[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self._instances_dir) if entry.is_dir())
        except FileNotFoundError:
            return []

    async def remove(self, instance_id: str) -> None:
        folder = self._folder(instance_id)
        async with self._only(instance_id):
            held = self._adopt(instance_id)
            if held is not None:
                await held.stop(0.0)
                await held.record.group.remove()
                held.detach()
            elif self._kind != NONE or self._cgroups is not None:
                await self._groups.left_of(instance_id).remove()
            self._held.pop(instance_id, None)
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=not folder.exists())

    async def logs(
        self, instance_id: str, app: str, *, since_ns: int = 0, tail: int | None = None, follow: bool = False
    ) -> AsyncGenerator[LogRecord]:
        grew = asyncio.Event()
        place = await self.open_log(
            instance_id, app, since_ns=since_ns, tail=tail, grew=grew.set if follow else None
        )  # fmt: skip
        try:
            while True:
                grew.clear()
                over = place.ended
                while batch := await asyncio.to_thread(place.read):
                    for item in batch:
                        yield item
                if over:
                    return
                await grew.wait()
        finally:
            place.close()

    async def open_log(
        self,
        instance_id: str,
        app: str,
        *,
        since_ns: int = 0,
        tail: int | None = None,
        after: int | None = None,
        grew: Callable[[], None] | None = None,
    ) -> Place:
        reader = LogReader(self._log(instance_id, app), since_ns)
        held = await self.adopt(instance_id) if grew is not None else None
        place = Place(reader, held, grew)
        try:
            await asyncio.to_thread(reader.start, tail, after)
        except BaseException:
            place.close()
            raise
        return place

    async def drop_logs(self, instance_id: str, app: str) -> None:
        path = self._log(instance_id, app)
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".1").unlink(missing_ok=True)
        try:
            path.parent.rmdir()
        except OSError:
            return  # logs of other instances are in it, or it never was

    async def kept_logs(self) -> Sequence[KeptLog]:
        return await asyncio.to_thread(kept_logs, self._data / "logs")

    # --- beyond the port --------------------------------------------------------------------------------------

    @property
    def view(self) -> host.HostView:
        """What instances see of this machine's files."""
        return self._view

    async def probe(self) -> SandboxReport:
        """What the sandbox can do here, found by running one; remembered once it worked."""
        async with self._probing:
            if self._report is not None:
                return self._report
            found = await self._try()
            if found.usable:
                self._report = found
            return found

    async def warm(self) -> None:
        """Make what the next start would have to wait for. Raises ServiceUnavailable."""
        if self._nursery is not None:
            try:
                await self._nursery.ready()
            except OSError as error:
                raise ServiceUnavailable(f"instances cannot be started: {error}") from error

    async def describe(self) -> list[str]:
        """The probe's result for people, with toolchains shown from outside the system folders."""
        found = (await self.probe()).lines()
        return [*found, *(f"toolchain shown to apps: {prefix}" for prefix in self._view.tools)]

    async def close(self) -> None:
        """Let go of all instances; they go on running."""
        if self._starts:
            await asyncio.wait(self._starts)
        for held in self._held.values():
            held.detach()
        self._held.clear()
        if self._nursery is not None:
            await self._nursery.close()

    # --- starting ---------------------------------------------------------------------------------------------

    async def _spawn(self, spec: InstanceSpec, folder: Path) -> None:
        kind = self._kind
        self._check_possible(spec, kind)
        port = _free_port() if kind == NONE and spec.port else spec.port
        app_dir = os.fspath(spec.root) if kind == NONE else "/app"
        path = tuple(os.environ.get("PATH", os.defpath).split(":")) if kind == NONE else self._view.path
        variables = sandbox.environment(spec, path, app_dir=app_dir, port=port)
        groups = self._groups
        bounded = kind != NONE
        script = sandbox.script(
            variables,
            spec.command,
            kind=kind,
            pids=spec.limits.pids if bounded and not groups.enforces("pids") else 0,
            folder=app_dir,
            setsid=self._findings.tools.setsid if spec.console is Console.TERMINAL and self._findings.tools else "",
        )
        try:
            lock = await asyncio.to_thread(self._prepare, spec, folder, kind, port)
        except (BadRequest, OSError) as error:
            await self._groups.left_of(spec.instance_id).remove()
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            if isinstance(error, BadRequest):
                raise
            raise ServiceUnavailable(f"instance {spec.instance_id} cannot be prepared: {error}") from error
        try:
            made = record.Record.read(folder)
            group = made.group if made is not None else Group()
            data_bytes = spec.limits.memory_bytes if bounded and not groups.enforces("memory") else 0
            plan = Plan(
                kind=kind,
                argv=self._command(spec.app),
                options=[] if kind == NONE else self._sandbox_options(spec, folder),
                script=script,
                filter_hex="" if kind == NONE else seccomp.program(os.uname().machine).hex(),
                cgroups=[os.fsencode(item) for item in group.folders],
                memory_events=os.fsencode(group.memory_events) if group.memory_events else b"",
                log=os.fsencode(self._log(spec.instance_id, spec.app)),
                log_bytes=self._options.log_bytes,
                log_rate=self._options.log_rate,
                tell_listening=self._options.tell_listening,
                port=port,
                slirp=os.fsencode(self._slirp),
                refused=[str(network).encode() for network in self._options.egress.refused()],
                allowed=[str(network).encode() for network in self._options.egress.allowed],
                open_files=self._options.open_files,
                data_bytes=data_bytes + _IDLE_DATA_BYTES if data_bytes else 0,
                console=spec.console.value,
                expires_ms=int(spec.timeout_secs * 1000),
                owner=self._uid(spec.app) if kind != NONE and os.geteuid() == 0 else -1,
            )
            reason = await _run_keeper(plan, folder, lock, spec.instance_id, self._nursery)
        finally:
            os.close(lock)
        if reason is not None:
            await group.remove()
            await asyncio.to_thread(shutil.rmtree, folder)
            raise ServiceUnavailable(f"instance {spec.instance_id} could not be started: {reason}")

    def _prepare(self, spec: InstanceSpec, folder: Path, kind: str, port: int) -> int:
        """Everything on disk before the start; returns the instance's lock, taken."""
        for needed in (self._data, folder.parent, folder):
            needed.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = record.take_lock(folder)
        if lock is None:
            raise ServiceUnavailable(f"instance {spec.instance_id} is being started by another server")
        try:
            log_folder = self._log(spec.instance_id, spec.app).parent
            for needed in (log_folder.parent, log_folder):
                needed.mkdir(mode=0o700, exist_ok=True)
            etc = folder / "etc"
            etc.mkdir(mode=0o755, exist_ok=True)
            uid = self._uid(spec.app) if os.geteuid() == 0 else sandbox.USER_ID
            self.volumes.prepare(spec, self._view, uid if os.geteuid() == 0 else None)
            for name, text in sandbox.etc_files(spec, uid, egress=bool(self._slirp)).items():
                (etc / name).write_text(text)
                (etc / name).chmod(0o644)
            group = self._groups.create(spec.instance_id, spec.limits)
            record.Record(spec, kind, port, group).write(folder)
        except BaseException:
            os.close(lock)
            raise
        return lock

    def _command(self, app: str) -> list[bytes]:
        tools = self._findings.tools
        if self._kind == NONE or tools is None:
            return sandbox.plain_command()
        return sandbox.command(tools, self._uid(app) if os.geteuid() == 0 else None)

    def _sandbox_options(self, spec: InstanceSpec, folder: Path) -> list[bytes]:
        groups = self._groups.mounts(spec.instance_id)
        volumes = [(self.volumes.place(spec.app, volume.name), volume.path) for volume in spec.volumes]
        return sandbox.options(
            spec, self._view, folder / "etc", as_root=os.geteuid() == 0, groups=groups, volumes=volumes
        )

    def _check_possible(self, spec: InstanceSpec, kind: str) -> None:
        if spec.volumes and kind == NONE:
            raise ServiceUnavailable("volumes need the sandbox, and this server runs apps as plain children")
        tools = self._findings.tools
        if spec.console is Console.TERMINAL and kind != NONE and (tools is None or not tools.setsid):
            raise ServiceUnavailable("a terminal needs the program setsid; install the package 'util-linux'")

    def _uid(self, app: str) -> int:
        """A uid of the app's own, the same for all time on this machine."""
        with self._uid_lock:
            return self._uid_from(self._data / "uids.json", app)

    def _uid_from(self, path: Path, app: str) -> int:
        known: dict[str, int] = json.loads(path.read_bytes()) if path.exists() else {}
        if app not in known:
            known[app] = max(known.values(), default=self._options.first_uid) + 1
            part = path.with_name(path.name + ".part")
            part.write_text(json.dumps(known))
            part.replace(path)
        return known[app]

    @property
    def _kind(self) -> str:
        return NONE if self._options.sandbox == NONE else BUBBLEWRAP

    @property
    def _slirp(self) -> str:
        return self._findings.slirp if self._kind != NONE and self._options.egress.open else ""

    @property
    def _groups(self) -> Cgroups:
        if self._cgroups is None:
            self._cgroups = detect()
        return self._cgroups

    # --- finding ----------------------------------------------------------------------------------------------

    def _adopt(self, instance_id: str) -> ProcessInstance | None:
        if (held := self._held.get(instance_id)) is not None:
            return held
        folder = self._folder(instance_id)
        found = record.Record.read(folder)
        if found is None:
            return None
        instance = ProcessInstance(folder, found)
        try:
            instance.attach()
        except OSError:
            instance.mark_gone()
        self._held[instance_id] = instance
        return instance

    async def _settled_start(self, folder: Path) -> None:
        """Wait until an instance that a killed server was just starting has its keeper's socket, or is over."""
        try:
            async with asyncio.timeout(_START_SECS):
                while record.alive(folder) and not record.was_started(folder):
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise ServiceUnavailable(f"instance {folder.name} neither starts nor ends: its keeper hangs") from None

    async def _try(self) -> SandboxReport:
        groups, kind, slirp = self._groups, self._kind, self._findings.slirp
        reason, remedy = "", ""
        if kind == NONE:
            reason = "switched off: apps run as plain children with this user's rights"
        elif self._findings.tools is None:
            reason, remedy = self._findings.missing, self._findings.remedy
        else:
            reason = await self._rehearse()
            remedy = report.remedy_for(reason) if reason else ""
        return SandboxReport(
            kind=kind,
            usable=not remedy,
            reason=reason,
            remedy=remedy,
            limits=report.limits(groups, kind),
            egress=report.egress(kind, slirp, self._options.egress),
        )

    async def _rehearse(self) -> str:
        """Run `true` in a sandbox; returns why it failed, or nothing."""
        with tempfile.TemporaryDirectory(prefix="aether-probe-") as scratch:
            data = Path(scratch)
            (data / "app").mkdir()
            trial = ProcessRuntime(data, self._options)
            trial._cgroups = self._groups
            trial._report = SandboxReport(BUBBLEWRAP, True, "", "", {}, "")
            name = f"probe-{os.getpid()}-{os.urandom(4).hex()}"
            spec = InstanceSpec(
                instance_id=name,
                app="probe",
                deployment_id="",
                release=0,
                digest="",
                root=data / "app",
                command="true",
                port=1,
                limits=Limits(memory_bytes=64 * 1024 * 1024, tmp_bytes=1024 * 1024),
            )
            try:
                instance = await trial.start(spec)
                async with asyncio.timeout(_PROBE_SECS):
                    ended = await instance.wait()
                said = [item.text async for item in trial.logs(name, "probe")]
            except TimeoutError:
                return f"a trial sandbox did not end within {_PROBE_SECS:.0f} seconds"
            except ServiceUnavailable as error:
                return error.message
            finally:
                await trial.remove(name)
                await trial.close()
        return "" if ended.code == 0 else f"a trial sandbox {ended}: {' / '.join(said[-3:]) or 'it said nothing'}"

    def _folder(self, instance_id: str) -> Path:
        _check_name(instance_id)
        return self._instances_dir / instance_id

    def _log(self, instance_id: str, app: str) -> Path:
        _check_name(instance_id)
        _check_name(app)
        return self._data / "logs" / app / f"{instance_id}.log"

    @asynccontextmanager
    async def _only(self, instance_id: str) -> AsyncGenerator[None]:
        """One operation per instance at a time."""
        lock, users = self._locks.get(instance_id, (asyncio.Lock(), 0))
        self._locks[instance_id] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[instance_id]
            if users == 1:
                del self._locks[instance_id]
            else:
                self._locks[instance_id] = (lock, users - 1)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise BadRequest(f"'{name}' cannot name an instance or its app")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


async def _run_keeper(plan: Plan, folder: Path, lock: int, instance_id: str, nursery: Nursery | None) -> str | None:
    """Start a keeper and wait until it vouches for the instance; returns why it does not, or None."""
    errors = os.open(folder / _ERRORS, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        if nursery is not None:
            answer = await nursery.keeper(plan.encode(), folder, lock, errors, _START_SECS)
        else:
            answer = await _start_keeper(plan, folder, lock, instance_id, errors)
    except TimeoutError:
        return f"its keeper did not answer within {_START_SECS:.0f} seconds"
    except OSError as error:
        return f"its keeper could not be started: {error}"
    finally:
        os.close(errors)
    if answer == b"ok\n":
        return None
    said = (folder / _ERRORS).read_text(errors="replace").strip()
    return said.rsplit("\n", 1)[-1] or "its keeper ended without a word"


async def _start_keeper(plan: Plan, folder: Path, lock: int, instance_id: str, errors: int) -> bytes:
    """What a keeper says that is a new process. Raises TimeoutError after it ended one that says nothing."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-I", "-S", "-E", "-c", _BOOT),
        *(os.fspath(Path(__file__).parent), str(lock), instance_id),
        cwd=folder,
        env={},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=errors,
        pass_fds=(lock,),
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(_START_SECS):
            answer, _ = await process.communicate(plan.encode())
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    return answer
