"""Functions in QEMU's microvm machines: real hardware virtualization where it works, emulation (TCG) elsewhere."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aether.model.errors import Conflict, NotFound, ServiceUnavailable
from aether.model.function_instance import Code, FunctionSpec, FunctionStatus
from aether.model.instance import InstanceExit, LogRecord
from aether.runtimes.microvm import leftovers
from aether.runtimes.microvm.acceleration import choose
from aether.runtimes.microvm.assignment import encode
from aether.runtimes.microvm.boot import MACHINE, Accelerator, kernel_arguments, processor
from aether.runtimes.microvm.console import read_log
from aether.runtimes.microvm.guest.store import Guest, GuestStore
from aether.runtimes.microvm.images import ImageStore
from aether.runtimes.microvm.machine import Launch, Machine, how
from aether.runtimes.microvm.metadata import Metadata
from aether.runtimes.microvm.network import GUEST_MAC
from aether.runtimes.rules import check_name, check_spec

FIRST_UID = 260_000
"""Monitors run as users from here on, one each, who own nothing."""
PROGRAM = "qemu-system-x86_64"
_MAX_MACHINES = 10_000
_LOG_TAIL = 20


@dataclass(frozen=True, slots=True)
class QemuOptions:
    """`accelerator`: auto (KVM if a probe that boots says so, else TCG), kvm or tcg. `kernel_root`: see
    `find_kernel`. `guests_dir` is where guests are kept, if not in the data folder."""

    accelerator: str = "auto"
    kernel_root: Path = Path("/")
    guests_dir: Path | None = None


def command_line(
    program: str, name: str, accelerator: Accelerator, memory_mb: int, vcpus: int, arguments: str,
    files: Sequence[int], tap: int,
) -> list[str]:  # fmt: skip
    """QEMU's command line; `files` are descriptors of kernel, initramfs, root file system and code."""
    kernel, initramfs, root, code = files
    drive = "driver=file,read-only=on,locking=off,filename=/dev/fdset"
    # the last transport is found first and becomes vda; the first is left out, its interrupt reaches no guest
    return [
        program,
        *("-name", name),
        *("-machine", MACHINE),
        *processor(accelerator),
        *("-m", str(memory_mb), "-smp", str(vcpus)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-kernel", f"/proc/self/fd/{kernel}", "-initrd", f"/proc/self/fd/{initramfs}", "-append", arguments),
        *("-serial", "stdio"),
        *("-global", "virtio-mmio.force-legacy=false"),
        *("-add-fd", f"fd={root},set=1", "-blockdev", f"{drive}/1,node-name=root"),
        *("-add-fd", f"fd={code},set=2", "-blockdev", f"{drive}/2,node-name=code"),
        *("-device", "virtio-blk-device,drive=root,bus=virtio-mmio-bus.3"),
        *("-device", "virtio-blk-device,drive=code,bus=virtio-mmio-bus.2"),
        *("-netdev", f"tap,id=net,fd={tap}"),
        *("-device", f"virtio-net-device,netdev=net,mac={GUEST_MAC},bus=virtio-mmio-bus.1"),
    ]


class QemuRuntime:
    """Implements `FunctionRuntime`. Folders: `<data>/guests`, `<data>/images`, `<data>/logs`, mode 0700."""

    def __init__(self, data_dir: Path, options: QemuOptions | None = None) -> None:
        self._data = Path(os.path.abspath(data_dir))
        self._data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._options = options or QemuOptions()
        self._guests_dir = self._options.guests_dir or self._data / "guests"
        self._guests = GuestStore(self._guests_dir, self._options.kernel_root)
        self._images = ImageStore(self._data / "images")
        self._logs = self._data / "logs"
        self._scope = leftovers.scope(self._data)
        self._machines: dict[str, tuple[Machine, asyncio.Task[None], int]] = {}
        self._accelerator: Accelerator | None = None
        self._choosing = asyncio.Lock()

    async def prepare(self, runtime: str, code: Code) -> None:
        await asyncio.gather(self._guests.guest(runtime), self._images.image(code), self.accelerator())

    async def accelerator(self) -> Accelerator:
        """What machines run on here. Raises ServiceUnavailable when QEMU is missing, or what was asked for is."""
        async with self._choosing:
            if self._accelerator is None:
                kernel, initramfs = await self._guests.base()
                self._accelerator = await choose(
                    self._options.accelerator, program(), kernel, initramfs, self._guests_dir
                )
            return self._accelerator

    async def start(self, spec: FunctionSpec) -> None:
        check_spec(spec)
        if spec.instance_id in self._machines:
            raise Conflict(f"there is an instance {spec.instance_id} already")
        guest, image, accelerator = await asyncio.gather(
            self._guests.guest(spec.runtime), self._images.image(spec.code), self.accelerator()
        )
        if spec.instance_id in self._machines:
            raise Conflict(f"there is an instance {spec.instance_id} already")
        slot = self._free_slot()
        machine = self._machine(spec, guest, image.path, accelerator, slot)
        task = asyncio.create_task(machine.run())
        self._machines[spec.instance_id] = (machine, task, slot)
        try:
            await self._until_ready(machine, task)
        except BaseException:
            task.cancel()
            await asyncio.wait([task])
            del self._machines[spec.instance_id]
            raise

    async def connect(self, instance_id: str) -> socket.socket:
        return await self._held(instance_id).connect()

    async def wait(self, instance_id: str) -> InstanceExit:
        machine = self._held(instance_id)
        await machine.gone.wait()
        return machine.exit()

    async def stop(self, instance_id: str, grace_secs: float) -> InstanceExit:
        machine = self._held(instance_id)
        await machine.stop(grace_secs)
        if (held := self._machines.get(instance_id)) is not None and held[0] is machine:
            await asyncio.wait([held[1]])
            self._machines.pop(instance_id, None)
        return machine.exit()

    async def status(self, instance_id: str) -> FunctionStatus:
        return self._held(instance_id).status()

    async def list(self) -> Sequence[str]:
        return sorted(self._machines)

    async def log(self, instance_id: str, tail: int = 100) -> Sequence[LogRecord]:
        check_name(instance_id)
        return await asyncio.to_thread(read_log, self._log(instance_id), tail)

    async def sweep(self) -> Sequence[str]:
        found = await asyncio.to_thread(leftovers.end, self._scope, set(self._machines))
        await asyncio.to_thread(self._images.sweep)
        await asyncio.to_thread(self._guests.sweep)
        return found

    async def close(self) -> None:
        tasks = [task for _, task, _ in self._machines.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._machines.clear()

    def _machine(self, spec: FunctionSpec, guest: Guest, image: Path, accelerator: Accelerator, slot: int) -> Machine:
        token, secret = secrets.token_hex(32), secrets.token_hex(32)
        env = {**dict(guest.env), **spec.env, "PORT": str(spec.port)}
        argv = (*guest.command, spec.entrypoint)

        def assignment() -> bytes:
            return encode(argv, env, port=spec.port, secret=secret, time_ns=time.time_ns())

        assignment()  # what cannot be told is refused before anything is started
        path, name = program(), leftovers.label(self._scope, spec.instance_id)
        arguments = kernel_arguments(accelerator, f"aether.token={token}")
        launch = Launch(
            files=(guest.kernel, guest.initramfs, guest.rootfs, image),
            command=lambda files, tap: command_line(
                path, name, accelerator, spec.memory_mb, spec.vcpus, arguments, files, tap
            ),
            user=FIRST_UID + slot if os.geteuid() == 0 else None,
        )
        self._logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Machine(spec, self._log(spec.instance_id), launch, Metadata(token, assignment), secret)

    async def _until_ready(self, machine: Machine, task: asyncio.Task[None]) -> None:
        """Return when the function listens. Raises ServiceUnavailable with the end of the log when it will not."""
        spec = machine.spec
        ready = asyncio.create_task(machine.ready.wait())
        try:
            await asyncio.wait([ready, task], timeout=spec.ready_secs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if machine.ready.is_set():
            machine.note_ready()
            return
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            raise error
        reason = f"it did not listen on port {spec.port} within {spec.ready_secs:g} seconds"
        if task.done():
            reason = f"{how(machine.exit())} before it listened on port {spec.port}"
        said = [record.text for record in await self.log(spec.instance_id, _LOG_TAIL)]
        raise ServiceUnavailable(f"instance {spec.instance_id} of {spec.function} failed: {reason}", {"log": said})

    def _held(self, instance_id: str) -> Machine:
        if (held := self._machines.get(instance_id)) is None:
            raise NotFound(f"there is no instance {instance_id}")
        return held[0]

    def _free_slot(self) -> int:
        taken = {slot for _, _, slot in self._machines.values()}
        slot = next((number for number in range(_MAX_MACHINES) if number not in taken), None)
        if slot is None:
            raise ServiceUnavailable(f"{_MAX_MACHINES} machines run here already")
        return slot

    def _log(self, instance_id: str) -> Path:
        return self._logs / f"{instance_id}.log"


def program() -> str:
    found = shutil.which(PROGRAM)
    if found is None:
        raise ServiceUnavailable(f"microVMs cannot run here: {PROGRAM} is missing; install qemu-system-x86")
    return found
