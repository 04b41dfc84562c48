"""Snapshots of booted guests, kept in a folder of this machine: what of them is stored, found, thrown away.

How they are made is in `snapshot_making`, how machines go on from them in `machine`. A snapshot is one folder, named
by its key, that appears when it is whole. What is used of it lies in sealed memory files: monitors open those as
users who own nothing, and none of them can change what the others start from.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from aether.runtimes.locks import LOCK, PART, locked, sweep_parts
from aether.runtimes.microvm.boot import MACHINE, Accelerator, processor
from aether.runtimes.microvm.guest.store import Guest
from aether.runtimes.microvm.tsc import tsc_khz

_FORMAT = "1"
_BLOCK, _MAX_MEMORY = 64 * 1024, 64 << 30
_MEMORY, _STATE, _NOTE = "memory", "state", "note.json"
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_KHZ = 10_000
"""Two measurements of one counter differ by less, those of two machines seldom."""


@dataclass(frozen=True, slots=True)
class SnapshotLimits:
    """What is kept at most; those used last stay. `max_resident_bytes` is of memory that no machine may need now."""

    max_count: int = 16
    max_bytes: int = 8 << 30
    max_resident_bytes: int = 1 << 30


class Damaged(Exception):
    """What lies in the folder of a snapshot is not what was put there."""


class Snapshot:
    """A snapshot in memory; its descriptors are closed with the last reference to it."""

    def __init__(self, memory: int, state: int, used: int, note: bytes = b"") -> None:
        self.memory = memory
        """Of the guest, as a memory file; sealed, unless it is for one machine alone."""
        self.note = note
        """What lies on disk beside it, where that decides whether it may be used."""
        self.used = used
        """Bytes of memory that it takes."""
        self._state = state
        weakref.finalize(self, _close, memory, state)

    def open_state(self) -> int:
        """A descriptor of its own of what the devices were in, read from the beginning."""
        return os.open(f"/proc/self/fd/{self._state}", os.O_RDONLY | os.O_CLOEXEC)


def snapshot_key(guest: Guest, vcpus: int, memory_mb: int, accelerator: Accelerator, program: str) -> str:
    """The name of the snapshot of a machine: another one whenever anything is another that it was made from."""
    seen = os.stat(program)
    cpu = Path("/proc/cpuinfo").read_text()
    flags = next((line for line in cpu.splitlines() if line.startswith("flags")), "")
    model = next((line for line in cpu.splitlines() if line.startswith("model name")), "")
    parts = (
        _FORMAT, guest.kernel.name, guest.initramfs.name, guest.rootfs.name, " ".join(guest.rehearsal),
        str(vcpus), str(memory_mb), accelerator, MACHINE, " ".join(processor(accelerator)),
        program, str(seen.st_size), str(seen.st_mtime_ns), model, flags, str(round(tsc_khz() / _KHZ)),
    )  # fmt: skip
    return sha256("\0".join(parts).encode()).hexdigest()[:40]


def function_snapshot_key(runtime: str, image: str, argv: Sequence[str], env: Mapping[str, str], port: int) -> str:
    """The name of the snapshots of a function that runs on what the runtime snapshot `runtime` would be of.

    After a restart of this machine it is another one: had the power gone, a used one might lie on the disk again."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    said = json.dumps([_FORMAT, runtime, boot, image, list(argv), dict(env), port], sort_keys=True)
    return sha256(said.encode()).hexdigest()[:40]


class SnapshotStore:
    """Snapshots by their key. `find` and `keep` may be called by any number of tasks at once."""

    def __init__(self, folder: Path, limits: SnapshotLimits | None = None) -> None:
        self.folder = folder
        self._limits = limits or SnapshotLimits()
        self._resident: dict[str, Snapshot] = {}
        self._loading: dict[str, asyncio.Task[Snapshot | None]] = {}

    async def find(self, key: str) -> Snapshot | None:
        """The snapshot, or None when there is none; a damaged one is thrown away. Raises OSError of the disk."""
        if (found := self._resident.pop(key, None)) is not None:
            self._resident[key] = found  # used last
            return found
        task = self._loading.get(key)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self._load, key))
            self._loading[key] = task
            task.add_done_callback(lambda done: self._loaded(key, done))
        return await asyncio.shield(task)

    async def take(self, key: str) -> Snapshot | None:
        """The snapshot, which nobody is given a second time, also when this process is killed now; None when there
        is none or it is damaged. Its memory is the taker's to write. Raises OSError of the disk."""
        return await asyncio.shield(asyncio.to_thread(self._take, key, self._resident.pop(key, None)))

    async def keep(self, key: str, memory: int, state: int, *, to_take: bool = False) -> None:
        """Store what the descriptors hold. The caller holds `lock`, and closes them. Raises OSError.

        With `to_take`, it stays in memory for `take`."""
        storing = asyncio.ensure_future(asyncio.to_thread(self._store, key, memory, state))
        try:
            await asyncio.shield(storing)
        except asyncio.CancelledError:
            await asyncio.wait([storing])  # the descriptors are closed next
            raise
        if to_take:
            used = os.fstat(memory).st_blocks * 512
            self._hold(key, Snapshot(os.dup(memory), os.dup(state), used, storing.result()))

    async def discard(self, key: str) -> None:
        """Throw a snapshot away; machines that were started from it go on."""
        self._resident.pop(key, None)
        await asyncio.to_thread(self._remove, key)

    def lock(self, key: str) -> Path:
        """The lock file that who makes this snapshot holds."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self.folder / (key + LOCK)

    def keys(self) -> list[str]:
        """What is stored, used last first. Blocks."""
        found: list[tuple[int, str]] = []
        for note in self.folder.glob(f"*/{_NOTE}"):
            with suppress(FileNotFoundError):
                found.append((note.stat().st_mtime_ns, note.parent.name))
        return [name for _, name in sorted(found, reverse=True) if PART not in name]

    def sweep(self) -> int:
        """Remove what killed makers left; returns how many. Safe beside makers at work. Blocks."""
        removed = 0
        for left in self.folder.glob(f"*{PART}*"):
            with locked(self.lock(left.name.partition(PART)[0]), wait=False) as held:
                if held:
                    shutil.rmtree(left, ignore_errors=True)  # who removes a snapshot now takes it away as well
                    removed += 1
        if self.folder.is_dir():
            sweep_parts(self.folder)  # locks that nobody holds
        return removed

    def stored(self, key: str) -> bool:
        return (self.folder / key / _NOTE).exists()

    def _loaded(self, key: str, task: asyncio.Task[Snapshot | None]) -> None:
        del self._loading[key]
        if task.cancelled() or task.exception() is not None or (found := task.result()) is None:
            return
        self._hold(key, found)

    def _hold(self, key: str, found: Snapshot) -> None:
        self._resident[key] = found
        over = sum(item.used for item in self._resident.values()) - self._limits.max_resident_bytes
        for name, item in list(self._resident.items()):
            if over <= 0 or name == key:
                break
            over -= item.used
            del self._resident[name]

    def _load(self, key: str) -> Snapshot | None:
        place = self.folder / key
        try:
            found = _read(place)
        except FileNotFoundError:
            if place.exists():
                self._remove(key)
            return None
        except Damaged:
            self._remove(key)
            return None
        os.utime(place / _NOTE)
        return found

    def _take(self, key: str, held: Snapshot | None) -> Snapshot | None:
        try:
            with tempfile.TemporaryDirectory(prefix=key + PART, dir=self.folder) as work:
                taken = Path(work) / "taken"
                (self.folder / key).rename(taken)  # who has renamed it is the only one who may use it
                # another process may have used what is held here, and have made the one that was taken
                if held is not None and (taken / _NOTE).read_bytes() == held.note:
                    return held
                return _read(taken, sealed=False)
        except (FileNotFoundError, Damaged):
            return None

    def _store(self, key: str, memory: int, state: int) -> bytes:
        with tempfile.TemporaryDirectory(prefix=key + PART, dir=self.folder) as work:
            place = Path(work) / "snapshot"
            place.mkdir(mode=0o700)
            note = _write(place, memory, state)
            self._remove(key)
            place.rename(self.folder / key)
        self._evict(key)
        return note

    def _evict(self, spare: str) -> None:
        size = 0
        for count, key in enumerate(self.keys(), start=1):
            with suppress(FileNotFoundError):
                size += sum(item.stat().st_size for item in (self.folder / key).iterdir())
            if key != spare and (count > self._limits.max_count or size > self._limits.max_bytes):
                self._remove(key)

    def _remove(self, key: str) -> None:
        # renamed first: a folder that has its name is whole
        with (
            suppress(FileNotFoundError),
            tempfile.TemporaryDirectory(prefix=key + PART, dir=self.folder) as work,
        ):
            (self.folder / key).rename(Path(work) / "removed")


def new_memory(size: int) -> int:
    """A memory file of `size` bytes, all zero, that takes memory for what is written."""
    fd = os.memfd_create("aether-guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def _write(place: Path, memory: int, state: int) -> bytes:
    """Memory as those of its blocks that are not empty, one after the other; which ones is in the note, which is
    returned."""
    size = os.fstat(memory).st_size
    blocks: list[int] = []
    hashed = sha256()
    with _create(place / _MEMORY) as fd:
        for number in _blocks(memory, size):
            data = os.pread(memory, _BLOCK, number * _BLOCK)
            if data.count(0) == len(data):
                continue
            blocks.append(number)
            hashed.update(data)
            _all(fd, data)
        os.fsync(fd)
    saved = os.pread(state, os.fstat(state).st_size, 0)
    with _create(place / _STATE) as fd:
        _all(fd, saved)
        os.fsync(fd)
    told = {"size": size, "blocks": blocks, "memory": hashed.hexdigest(), "state": sha256(saved).hexdigest()}
    note = json.dumps(told).encode()
    with _create(place / _NOTE) as fd:
        _all(fd, note)
        os.fsync(fd)
    return note


def _read(place: Path, *, sealed: bool = True) -> Snapshot:
    """Raises Damaged, and FileNotFoundError when there is none."""
    try:
        note = json.loads((place / _NOTE).read_bytes())
        size, blocks = int(note["size"]), [int(number) for number in note["blocks"]]
        wanted = str(note["memory"]), str(note["state"])
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"the note of a snapshot cannot be read: {error}") from error
    if not 0 < size <= _MAX_MEMORY or size % _BLOCK:
        raise Damaged("the note of a snapshot has no size of a memory")
    saved = (place / _STATE).read_bytes()
    hashed, last = sha256(), size // _BLOCK
    memory = new_memory(size)
    state = os.memfd_create("aether-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(place / _MEMORY, "rb", buffering=0) as source:
            for number in blocks:
                data = source.read(_BLOCK)
                if len(data) != _BLOCK or not 0 <= number < last:
                    raise Damaged("the memory of a snapshot is not whole")
                hashed.update(data)
                os.pwrite(memory, data, number * _BLOCK)
        if (hashed.hexdigest(), sha256(saved).hexdigest()) != wanted or os.fstat(memory).st_size != size:
            raise Damaged("a snapshot does not have its digest")
        _all(state, saved)
        for fd in (memory, state) if sealed else ():
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        _close(memory, state)
        raise
    return Snapshot(memory, state, len(blocks) * _BLOCK)


def _blocks(fd: int, size: int) -> Iterator[int]:
    """Numbers of the blocks of a memory file that may hold something."""
    at, after = 0, -1
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # nothing but a hole from here on
            return
        at = os.lseek(fd, begin, os.SEEK_HOLE)
        for number in range(max(begin // _BLOCK, after + 1), -(-at // _BLOCK)):
            after = number
            yield number


def _all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


class _create:
    """A new file, mode 0600, as its descriptor."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _close(*descriptors: int) -> None:
    for fd in descriptors:
        os.close(fd)
