"""Functions in QEMU's microvm machines: real hardware virtualization where it works, emulation (TCG) elsewhere."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aether.model.errors import Conflict, NotFound, ServiceUnavailable
from aether.model.function_instance import Code, FunctionSpec, FunctionStatus, RegisteredRuntimes
from aether.model.instance import InstanceExit, LogRecord
from aether.runtimes.locks import locked
from aether.runtimes.microvm import leftovers
from aether.runtimes.microvm.acceleration import choose
from aether.runtimes.microvm.assignment import encode
from aether.runtimes.microvm.boot import Accelerator, kernel_arguments
from aether.runtimes.microvm.command import command_line, making_command_line, restoring_command_line
from aether.runtimes.microvm.console import read_log
from aether.runtimes.microvm.guest.store import Guest, GuestStore
from aether.runtimes.microvm.images import ImageStore
from aether.runtimes.microvm.machine import Launch, Machine, Restore, how
from aether.runtimes.microvm.metadata import Metadata
from aether.runtimes.microvm.qmp import MonitorError
from aether.runtimes.microvm.snapshot_making import Making, make_snapshot
from aether.runtimes.microvm.snapshots import (
    Snapshot,
    SnapshotLimits,
    SnapshotStore,
    function_snapshot_key,
    snapshot_key,
)
from aether.runtimes.rules import check_name, check_spec
from aether.runtimes.trimming import trim_logs

FIRST_UID = 260_000
"""Monitors run as users from here on, one each, who own nothing."""
PROGRAM = "qemu-system-x86_64"
_MAX_MACHINES = 10_000
_LOG_TAIL = 20
_MAKER = ".snapshot-"
"""Labels of makers begin so, which no instance's id does."""
_RESTORE_SECS = 20.0
"""A restored guest that has not called within this time is given up for a booted one."""
_MAX_REFUSED = 3
"""Snapshots that were of no use before no more are tried, until the server is started again."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class QemuOptions:
    """`accelerator`: auto (KVM if a probe that boots says so, else TCG), kvm or tcg. `kernel_root`: see
    `find_kernel`. `guests_dir` is where guests are kept, if not in the data folder. `snapshots`: whether machines go
    on from one, where there is one, and one is made where there is none; at most `snapshot_limits` are kept, in the
    data folder or `snapshots_dir`. `registered`: runtimes beside those that are shipped."""

    accelerator: str = "auto"
    kernel_root: Path = Path("/")
    guests_dir: Path | None = None
    snapshots: bool = True
    snapshots_dir: Path | None = None
    snapshot_limits: SnapshotLimits = field(default_factory=SnapshotLimits)
    registered: RegisteredRuntimes | None = None


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a machine is made of, however it starts."""

    guest: Guest
    accelerator: Accelerator
    vcpus: int
    memory_mb: int


class _NotRestored(Exception):
    """A machine did not go on from its snapshot; `damaged` when that will not become better."""

    def __init__(self, reason: str, *, damaged: bool) -> None:
        super().__init__(reason)
        self.damaged = damaged


class QemuRuntime:
    """Implements `FunctionRuntime`. Folders in `<data>`, mode 0700: guests, images, snapshots, logs."""

    def __init__(self, data_dir: Path, options: QemuOptions | None = None) -> None:
        self._data = Path(os.path.abspath(data_dir))
        self._data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._options = options or QemuOptions()
        self._guests_dir = self._options.guests_dir or self._data / "guests"
        self._guests = GuestStore(self._guests_dir, self._options.kernel_root, self._options.registered)
        self._images = ImageStore(self._data / "images")
        self._logs = self._data / "logs"
        self._scope = leftovers.scope(self._data)
        self._machines: dict[str, tuple[Machine, asyncio.Task[None], int]] = {}
        self._accelerator: Accelerator | None = None
        self._choosing = asyncio.Lock()
        self._snapshots = SnapshotStore(
            self._options.snapshots_dir or self._data / "snapshots", self._options.snapshot_limits
        )
        self._function_snapshots = SnapshotStore(self._data / "function-snapshots", self._options.snapshot_limits)
        self._making: dict[str, asyncio.Task[None]] = {}
        self._one_maker = asyncio.Lock()
        self._refused: dict[str, int] = {}

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
        began = time.monotonic()
        self._check_free(spec.instance_id)
        guest, image, accelerator = await asyncio.gather(
            self._guests.guest(spec.runtime), self._images.image(spec.code), self.accelerator()
        )
        plan = _Plan(guest, accelerator, spec.vcpus, spec.memory_mb)
        key = await asyncio.to_thread(self._key, plan) if self._options.snapshots else ""
        if key and spec.snapshot:
            await self._start_again(spec, plan, image.path, began, key)
        else:
            await self._start_anew(spec, plan, image.path, began, key)

    async def _start_again(self, spec: FunctionSpec, plan: _Plan, image: Path, began: float, key: str) -> None:
        """Start a machine from a snapshot of the function, which is of no use to anybody after, or else anew; then
        have another one made."""
        argv, env = _command(spec, plan.guest)
        own = function_snapshot_key(key, image.name, argv, env, spec.port)
        store = self._function_snapshots
        try:
            snapshot = await store.take(own)
        except OSError as error:
            _log.warning("a snapshot cannot be read: %s", error)
            snapshot = None
        if snapshot is None or not await self._restored(spec, plan, image, began, own, snapshot, store):
            await self._start_anew(spec, plan, image, began, key)
        self._make_snapshot(own, store, lambda: self._function_maker(own, spec, plan, image))

    async def _start_anew(self, spec: FunctionSpec, plan: _Plan, image: Path, began: float, key: str) -> None:
        """Start a machine and the function in it: from the runtime snapshot `key` if there is one, or boot."""
        store = self._snapshots
        snapshot = await self._found(key) if key else None
        if snapshot is not None and await self._restored(spec, plan, image, began, key, snapshot, store):
            return
        await self._start(spec, plan, image, began, None)
        if key:
            self._make_snapshot(key, store, lambda: self._maker(key, plan))

    async def _restored(
        self, spec: FunctionSpec, plan: _Plan, image: Path, began: float, key: str, snapshot: Snapshot,
        store: SnapshotStore,
    ) -> bool:  # fmt: skip
        """Start a machine from `snapshot`, which is `key` in `store`; False when it did not go on from there."""
        try:
            await self._start(spec, plan, image, began, snapshot, function=store is self._function_snapshots)
        except _NotRestored as error:
            _log.warning("instance %s was not restored and is booted: %s", spec.instance_id, error)
            if error.damaged:
                self._refused[key] = self._refused.get(key, 0) + 1
                await store.discard(key)
            return False
        return True

    def _check_free(self, instance_id: str) -> None:
        if instance_id in self._machines:
            raise Conflict(f"there is an instance {instance_id} already")

    async def _start(
        self, spec: FunctionSpec, plan: _Plan, image: Path, began: float, snapshot: Snapshot | None, *,
        function: bool = False,
    ) -> None:  # fmt: skip
        """Start a machine, from `snapshot` if there is one, and return when its function listens.

        Raises _NotRestored when it did not get as far as to ask what to run; with `function`, when the snapshot is
        one of the function, as far as to let that go on."""
        self._check_free(spec.instance_id)
        slot = self._free_slot()
        machine = self._machine(spec, plan, image, slot, snapshot, function)
        machine.began = began
        task = asyncio.create_task(machine.run())
        self._machines[spec.instance_id] = (machine, task, slot)
        try:
            if snapshot is not None:
                await self._until_restored(machine, task, machine.ready if function else machine.up)
            await self._until_ready(machine, task)
        except BaseException:
            task.cancel()
            await asyncio.wait([task])
            if self._machines.get(spec.instance_id, (None,))[0] is machine:
                del self._machines[spec.instance_id]
            raise

    async def make_snapshot(self, runtime: str, vcpus: int = 1, memory_mb: int = 128) -> bool:
        """Have what such instances go on from, made now if there is none; whether there is. Raises what `start` does
        for what is missing on this machine."""
        guest, accelerator = await asyncio.gather(self._guests.guest(runtime), self.accelerator())
        plan = _Plan(guest, accelerator, vcpus, memory_mb)
        key = await asyncio.to_thread(self._key, plan)
        if not self._snapshots.stored(key):
            self._make_snapshot(key, self._snapshots, lambda: self._maker(key, plan))
            await self.settle()
        return self._snapshots.stored(key)

    async def settle(self) -> None:
        """Return when no snapshot is being made that was begun because of a start."""
        while self._making:
            await asyncio.wait(list(self._making.values()))

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
        spare = {*self._machines, *(f"{_MAKER}{key}" for key in self._making)}
        found = await asyncio.to_thread(leftovers.end, self._scope, spare)
        for store in (self._images, self._guests, self._snapshots, self._function_snapshots):
            await asyncio.to_thread(store.sweep)
        return [name for name in found if not name.startswith(_MAKER)]

    async def trim(self, unused_secs: float, logs: int) -> None:
        codes = {self._images.key(machine.spec.code) for machine, *_ in self._machines.values()}
        await asyncio.to_thread(self._images.trim, unused_secs, codes)
        await asyncio.to_thread(trim_logs, self._logs, set(self._machines), logs)

    async def close(self) -> None:
        tasks = [*(task for _, task, _ in self._machines.values()), *self._making.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._machines.clear()

    def _machine(
        self, spec: FunctionSpec, plan: _Plan, image: Path, slot: int, snapshot: Snapshot | None, function: bool
    ) -> Machine:
        token, secret = secrets.token_hex(32), secrets.token_hex(32)
        guest = plan.guest
        document = _document(spec, guest, token, secret)
        what = self._what(spec.instance_id, plan)
        user = FIRST_UID + slot if os.geteuid() == 0 else None
        if snapshot is None:
            arguments = kernel_arguments(plan.accelerator, f"aether.token={token}")
            launch = Launch(
                files=(guest.kernel, guest.initramfs, guest.rootfs, image),
                command=lambda files, tap: command_line(*what, arguments, files, tap),
                user=user,
            )
        else:
            launch = Launch(
                files=(guest.rootfs, image),
                command=lambda files, tap: restoring_command_line(*what, files, tap, only_user=function),
                user=user,
                restore=Restore(snapshot, token),
            )
        self._logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Machine(spec, self._log(spec.instance_id), launch, document, secret)

    def _what(self, name: str, plan: _Plan) -> tuple[str, str, Accelerator, int, int]:
        return program(), leftovers.label(self._scope, name), plan.accelerator, plan.memory_mb, plan.vcpus

    def _key(self, plan: _Plan) -> str:
        return snapshot_key(plan.guest, plan.vcpus, plan.memory_mb, plan.accelerator, program())

    async def _found(self, key: str) -> Snapshot | None:
        try:
            return await self._snapshots.find(key)
        except OSError as error:
            _log.warning("a snapshot cannot be read: %s", error)
            return None

    def _make_snapshot(self, key: str, store: SnapshotStore, maker: Callable[[], Making]) -> None:
        """Have a snapshot made, unless that is under way or was in vain."""
        if key not in self._making and self._refused.get(key, 0) < _MAX_REFUSED:
            task = asyncio.create_task(self._make(key, store, maker))
            self._making[key] = task
            task.add_done_callback(lambda _: self._making.pop(key, None))

    async def _make(self, key: str, store: SnapshotStore, maker: Callable[[], Making]) -> None:
        async with self._one_maker:
            with locked(store.lock(key), wait=False) as held:
                if not held:
                    return  # another process makes it
                try:
                    if not store.stored(key):
                        await self._make_now(key, store, maker())
                except (MonitorError, ServiceUnavailable, TimeoutError, OSError) as error:
                    self._refused[key] = self._refused.get(key, 0) + 1
                    _log.warning("a snapshot was not made: %s", error)
                finally:
                    store.lock(key).unlink(missing_ok=True)

    async def _make_now(self, key: str, store: SnapshotStore, making: Making) -> None:
        memory, state = await make_snapshot(making)
        try:
            await store.keep(key, memory, state, to_take=store is self._function_snapshots)
        finally:
            os.close(memory)
            os.close(state)

    def _maker(self, key: str, plan: _Plan) -> Making:
        guest = plan.guest
        what = self._what(f"{_MAKER}{key}", plan)
        arguments = kernel_arguments(plan.accelerator, f"aether.snapshot={','.join(guest.rehearsal)}")
        return Making(
            files=(guest.kernel, guest.initramfs, guest.rootfs, guest.rootfs),
            command=lambda files, tap: making_command_line(*what, arguments, files, tap),
            user=FIRST_UID + _MAX_MACHINES if os.geteuid() == 0 else None,
            memory_mb=plan.memory_mb,
        )

    def _function_maker(self, key: str, spec: FunctionSpec, plan: _Plan, image: Path) -> Making:
        guest = plan.guest
        token, secret = secrets.token_hex(32), secrets.token_hex(32)
        what = self._what(f"{_MAKER}{key}", plan)
        arguments = kernel_arguments(plan.accelerator, f"aether.token={token}", "aether.park=1")
        return Making(
            files=(guest.kernel, guest.initramfs, guest.rootfs, image),
            command=lambda files, tap: making_command_line(*what, arguments, files, tap),
            user=FIRST_UID + _MAX_MACHINES if os.geteuid() == 0 else None,
            memory_mb=plan.memory_mb,
            function=(_document(spec, guest, token, secret), secret),
        )

    async def _until_restored(self, machine: Machine, task: asyncio.Task[None], restored: asyncio.Event) -> None:
        up = asyncio.create_task(restored.wait())
        try:
            limit = min(_RESTORE_SECS, machine.spec.ready_secs / 2)
            await asyncio.wait([up, task], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
        if restored.is_set() or machine.stopping:
            return
        if not task.done():
            raise _NotRestored(f"it did not go on within {limit:g} seconds", damaged=False)
        if not task.cancelled() and isinstance(error := task.exception(), ServiceUnavailable):
            raise error
        raise _NotRestored(machine.refusal or "its machine ended", damaged=True)

    async def _until_ready(self, machine: Machine, task: asyncio.Task[None]) -> None:
        """Return when the function listens. Raises ServiceUnavailable with the end of the log when it will not."""
        spec = machine.spec
        ready = asyncio.create_task(machine.ready.wait())
        try:
            left = max(machine.began + spec.ready_secs - time.monotonic(), 0.0)
            await asyncio.wait([ready, task], timeout=left, return_when=asyncio.FIRST_COMPLETED)
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


def _command(spec: FunctionSpec, guest: Guest) -> tuple[tuple[str, ...], dict[str, str]]:
    """What is run of the function, and its variables."""
    return (*guest.command, spec.entrypoint), {**dict(guest.env), **spec.env, "PORT": str(spec.port)}


def _document(spec: FunctionSpec, guest: Guest, token: str, secret: str) -> Metadata:
    """What a machine of the function is told. Raises BadRequest for what cannot be told."""
    argv, env = _command(spec, guest)

    def assignment() -> bytes:
        return encode(argv, env, port=spec.port, secret=secret, time_ns=time.time_ns())

    assignment()  # what cannot be told is refused before anything is started
    return Metadata(token, assignment)


def program() -> str:
    found = shutil.which(PROGRAM)
    if found is None:
        raise ServiceUnavailable(f"microVMs cannot run here: {PROGRAM} is missing; install qemu-system-x86")
    return found
