"""Functions in Firecracker's machines, each in a jail of its own."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aether.model.errors import Conflict, NotFound, ServiceUnavailable
from aether.model.function_instance import Code, CodeForm, FunctionSpec, FunctionStatus, RegisteredRuntimes
from aether.model.instance import InstanceExit, LogRecord
from aether.runtimes.firecracker import cgroups, jail
from aether.runtimes.firecracker.api import Body, Call, boot_calls, load_calls
from aether.runtimes.firecracker.jail import Jail, Programs
from aether.runtimes.firecracker.machine import Machine, Plan, Snapshot
from aether.runtimes.firecracker.mounts import Owners
from aether.runtimes.firecracker.users import Users
from aether.runtimes.microvm import leftovers
from aether.runtimes.microvm.acceleration import remembered
from aether.runtimes.microvm.assignment import encode
from aether.runtimes.microvm.boot import KVM, kernel_arguments
from aether.runtimes.microvm.console import read_log
from aether.runtimes.microvm.guest.store import Guest, GuestStore
from aether.runtimes.microvm.images import ImageStore
from aether.runtimes.microvm.machine import how
from aether.runtimes.rules import check_name, check_spec
from aether.runtimes.trimming import trim_logs

_LOG_TAIL = 20
_PROBE_SECS = 5.0
_ASK_AGAIN_SECS = 60.0
_PROBE_SAYS = "aether-init: this machine works"
_ARGUMENTS = "reboot=k pci=off i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd"
"""Beside those of every guest: a restart is asked of the keyboard controller, which ends the monitor, and nothing
else of that controller is there to be looked for. The last `reboot` counts."""


@dataclass(frozen=True, slots=True)
class FirecrackerOptions:
    """`programs` are looked up in PATH if not given. `kernel_root`: see `find_kernel`. `guests_dir` is where guests
    are kept, if not in the data folder. `level` is how much the monitor says in the log: Error, Warn, Info, Debug.
    `registered`: runtimes beside those that are shipped."""

    programs: Programs | None = None
    kernel_root: Path = Path("/")
    guests_dir: Path | None = None
    level: str = "Error"
    registered: RegisteredRuntimes | None = None


class FirecrackerRuntime:
    """Implements `FunctionRuntime`. Folders: `guests`, `images`, `logs` and `jails` in the data folder, mode 0700."""

    def __init__(self, data_dir: Path, options: FirecrackerOptions | None = None) -> None:
        self._data = Path(os.path.abspath(data_dir))
        self._data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._options = options or FirecrackerOptions()
        self._guests_dir = self._options.guests_dir or self._data / "guests"
        self._guests = GuestStore(self._guests_dir, self._options.kernel_root, self._options.registered)
        self._images = ImageStore(self._data / "images")
        self._logs = self._data / "logs"
        self._jails = self._data / "jails"
        self._scope = leftovers.scope(self._data)
        self._machines: dict[str, tuple[Machine, asyncio.Task[None]]] = {}
        self._owners = Owners()
        self._users = Users()
        self._works = False
        self._ask_again = 0.0
        self._asking = asyncio.Lock()

    async def prepare(self, runtime: str, code: Code) -> None:
        await asyncio.gather(self._guests.guest(runtime), self._images.image(code), self.check_machines())

    async def check_machines(self) -> None:
        """Raises ServiceUnavailable when guests do not start here, which a guest that is booted finds out.

        That they do is kept until the host is started again; that they do not, which may have been the host's bad
        moment, for a minute."""
        async with self._asking:
            if not self._works and time.monotonic() >= self._ask_again:
                programs = self.programs()
                kernel, initramfs = await self._guests.base()
                known = self._guests_dir / "firecracker.json"
                self._works = await remembered(
                    known,
                    (os.fspath(programs.firecracker), kernel, initramfs),
                    lambda: self._probe(kernel, initramfs),
                )
                if not self._works:
                    known.unlink(missing_ok=True)
                    self._ask_again = time.monotonic() + _ASK_AGAIN_SECS
            if not self._works:
                raise ServiceUnavailable(
                    "Firecracker's machines do not run by KVM here: a guest that was booted to find out did not start"
                )

    def programs(self) -> Programs:
        """Raises ServiceUnavailable when they are missing, or KVM is."""
        if (found := self._options.programs) is None:
            jailer, firecracker = shutil.which("jailer"), shutil.which("firecracker")
            if jailer is None or firecracker is None:
                missing = "jailer" if jailer is None else "firecracker"
                raise ServiceUnavailable(f"Firecracker cannot run here: {missing} is missing in PATH")
            found = Programs(Path(os.path.realpath(jailer)), Path(os.path.realpath(firecracker)))
        if os.geteuid() != 0 or not os.access("/dev/kvm", os.R_OK | os.W_OK):
            raise ServiceUnavailable("Firecracker cannot run here: it needs root and /dev/kvm")
        return found

    async def start(self, spec: FunctionSpec) -> None:
        check_spec(spec)
        self._refuse_taken(spec)
        self._assignment(spec, None, "")()
        await self.check_machines()
        machine = await self.launch(spec)
        try:
            await self._until_ready(machine)
        except BaseException:
            await self._remove(machine)
            raise

    async def launch(self, spec: FunctionSpec, snapshot: Snapshot | None = None) -> Machine:
        """Begin to start an instance, from its kernel or from `snapshot`; it is not waited for, and not asked whether
        guests start here."""
        check_spec(spec)
        self._refuse_taken(spec)
        plan = await self.plan(spec, snapshot)
        if spec.instance_id in self._machines:
            self._users.release(plan.jail.user)
            self._refuse_taken(spec)
        machine = Machine(spec, self._log(spec.instance_id), plan)
        task = asyncio.create_task(machine.run())
        # whoever waits for the machine sees why it failed; of one that nobody waits for, the log says it
        task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        task.add_done_callback(lambda _: self._users.release(plan.jail.user))
        task.add_done_callback(
            lambda _: machine.gone.set()
        )  # one that is cancelled before its first step is gone too
        self._machines[spec.instance_id] = (machine, task)
        return machine

    async def plan(self, spec: FunctionSpec, snapshot: Snapshot | None = None) -> Plan:
        """How the machine of `spec` is started; the user in it is taken until the machine has ended."""
        programs = self.programs()
        limited = await asyncio.to_thread(_cgroups)
        guest, image = await asyncio.gather(self._guests.guest(spec.runtime), self._images.image(spec.code))
        token = secrets.token_hex(32) if snapshot is None else snapshot.token
        secret = secrets.token_hex(32)
        assignment = self._assignment(spec, guest, secret)
        assignment()  # what cannot be told is refused before anything is started
        files = {jail.ROOTFS: guest.rootfs, jail.CODE: image.path}
        if snapshot is None:
            files |= {jail.KERNEL: guest.kernel, jail.INITRAMFS: guest.initramfs}
        else:
            files |= {jail.STATE: snapshot.state, jail.MEMORY: snapshot.memory}

        def calls() -> list[Call]:
            told = document(token, assignment())
            if snapshot is not None:
                return load_calls(told)
            arguments = kernel_arguments(KVM, _ARGUMENTS, f"aether.token={token}")
            return boot_calls(memory_mb=spec.memory_mb, vcpus=spec.vcpus, arguments=arguments, document=told)

        self._logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        place, level = self._jail(programs), self._options.level
        return Plan(programs, limited, self._owners, place, files, calls, token, secret, level)

    async def connect(self, instance_id: str) -> socket.socket:
        return await self._held(instance_id).connect()

    async def wait(self, instance_id: str) -> InstanceExit:
        machine = self._held(instance_id)
        await machine.gone.wait()
        return machine.exit()

    async def stop(self, instance_id: str, grace_secs: float) -> InstanceExit:
        machine = self._held(instance_id)
        await machine.stop(grace_secs)
        await self._remove(machine)
        return machine.exit()

    async def status(self, instance_id: str) -> FunctionStatus:
        return self._held(instance_id).status()

    async def list(self) -> Sequence[str]:
        return sorted(self._machines)

    async def log(self, instance_id: str, tail: int = 100) -> Sequence[LogRecord]:
        check_name(instance_id)
        return await asyncio.to_thread(read_log, self._log(instance_id), tail)

    async def sweep(self) -> Sequence[str]:
        spare = {machine.plan.jail.name for machine, _ in self._machines.values()}
        found = await asyncio.to_thread(self._sweep, spare)
        await asyncio.to_thread(self._images.sweep)
        await asyncio.to_thread(self._guests.sweep)
        return found

    async def trim(self, unused_secs: float, logs: int) -> None:
        codes = {self._images.key(machine.spec.code) for machine, _ in self._machines.values()}
        await asyncio.to_thread(self._images.trim, unused_secs, codes)
        await asyncio.to_thread(trim_logs, self._logs, set(self._machines), logs)

    async def close(self) -> None:
        tasks = [task for _, task in self._machines.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._machines.clear()
        self._owners.close()
        self._users.close()
        if self._jails.is_dir():
            await asyncio.to_thread(lambda: cgroups.remove_parent(_cgroups(), self._scope))

    async def _until_ready(self, machine: Machine) -> None:
        """Return when the function listens. Raises ServiceUnavailable with the end of the log when it will not."""
        spec, task = machine.spec, self._machines[machine.spec.instance_id][1]
        ready = asyncio.create_task(machine.ready.wait())
        try:
            await asyncio.wait([ready, task], timeout=spec.ready_secs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if machine.ready.is_set():
            machine.note_ready()
            return
        reason = f"it did not listen on port {spec.port} within {spec.ready_secs:g} seconds"
        if task.done():
            reason = f"{how(machine.exit())} before it listened on port {spec.port}"
            if not task.cancelled() and (error := task.exception()) is not None:
                if not isinstance(error, ServiceUnavailable):
                    raise error
                reason = str(error)
        said = [record.text for record in await self.log(spec.instance_id, _LOG_TAIL)]
        raise ServiceUnavailable(f"instance {spec.instance_id} of {spec.function} failed: {reason}", {"log": said})

    async def _remove(self, machine: Machine) -> None:
        held = self._machines.get(machine.spec.instance_id)
        if held is not None and held[0] is machine:
            held[1].cancel()
            await asyncio.wait([held[1]])
            self._machines.pop(machine.spec.instance_id, None)

    async def _probe(self, kernel: Path, initramfs: Path) -> bool:
        """Boot a guest that only says that it works, in a jail as every other; whether it did."""
        programs = self.programs()
        limited = await asyncio.to_thread(_cgroups)
        arguments = kernel_arguments(KVM, _ARGUMENTS, "aether.probe=1")
        spec = FunctionSpec("probe", "probe", "", Code(Path(), CodeForm.TAR_GZ, ""), "")
        plan = Plan(
            programs,
            limited,
            self._owners,
            self._jail(programs),
            {jail.KERNEL: kernel, jail.INITRAMFS: initramfs},
            lambda: boot_calls(memory_mb=spec.memory_mb, vcpus=spec.vcpus, arguments=arguments, document=None),
            token="",
            secret=secrets.token_hex(32),
        )
        self._logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = self._logs / ".probe.log"  # no instance can be called so
        log.unlink(missing_ok=True)
        task = asyncio.create_task(Machine(spec, log, plan).run())
        try:
            await asyncio.wait([task], timeout=_PROBE_SECS)
        finally:
            task.cancel()
            await asyncio.wait([task])
            self._users.release(plan.jail.user)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
        return any(record.text.startswith(_PROBE_SAYS) for record in await asyncio.to_thread(read_log, log, 100))

    def _assignment(self, spec: FunctionSpec, guest: Guest | None, secret: str) -> Callable[[], bytes]:
        """What the guest is told, with the time at which it is asked for."""
        command, env = (guest.command, dict(guest.env)) if guest is not None else ((), {})
        argv = (*command, spec.entrypoint)
        env = {**env, **spec.env, "PORT": str(spec.port)}
        return lambda: encode(argv, env, port=spec.port, secret=secret, time_ns=time.time_ns())

    def _jail(self, programs: Programs) -> Jail:
        return Jail(self._jails, programs.firecracker.name, self._scope, secrets.token_hex(8), self._users.take())

    def _sweep(self, spare: set[str]) -> list[str]:
        prefix = f"{self._scope}-"
        left = [
            Jail(self._jails, folder.parent.name, self._scope, folder.name.removeprefix(prefix), 0)
            for folder in self._jails.glob(f"*/{prefix}*")
            if folder.name not in spare
        ]
        for key, processes in leftovers.running(self._scope, jail.LABEL_FLAG).items():
            if prefix + key not in spare:
                for pid, start in processes:
                    leftovers.kill(pid, start)
        found: list[str] = []
        for place in left:
            cgroups.end(_cgroups(), self._scope, place.name)
            cgroups.remove(_cgroups(), self._scope, place.name)
            found.append(jail.instance_of(place))
            jail.remove_jail(place)
        return sorted(found)

    def _refuse_taken(self, spec: FunctionSpec) -> None:
        if spec.instance_id in self._machines:
            raise Conflict(f"there is an instance {spec.instance_id} already")

    def _held(self, instance_id: str) -> Machine:
        if (held := self._machines.get(instance_id)) is None:
            raise NotFound(f"there is no instance {instance_id}")
        return held[0]

    def _log(self, instance_id: str) -> Path:
        return self._logs / f"{instance_id}.log"


def document(token: str, assignment: bytes) -> Body:
    """What the metadata service is given: the guest finds its assignment at the path that ends in its boot token."""
    return {"latest": {"aether": {token: assignment.decode("ascii")}}}


def _cgroups() -> cgroups.Cgroups:
    return cgroups.find_cgroups(Path("/proc/self/mounts").read_text())
