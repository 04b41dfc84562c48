"""Whether guests can run on the processor itself (KVM), found out by booting one.

That /dev/kvm can be opened says little: under some hosts it takes machines whose guests then hang. The answer is kept
until the machine is started again or QEMU, the kernel or /init change.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from aether.model.errors import ServiceUnavailable
from aether.runtimes.microvm.boot import KVM, MACHINE, TCG, Accelerator, kernel_arguments, processor

_PROBE_SECS = 5.0
_WORKS = b"aether-init: this machine works"
_FILE = "acceleration.json"


async def choose(wanted: str, program: str, kernel: Path, initramfs: Path, folder: Path) -> Accelerator:
    """What machines run on: `wanted` is auto, kvm or tcg. Raises ServiceUnavailable when KVM is wanted and fails."""
    if wanted == TCG:
        return TCG
    works = os.access("/dev/kvm", os.R_OK | os.W_OK)
    if works:
        works = await remembered(
            folder / _FILE, (program, kernel, initramfs), lambda: probe(program, kernel, initramfs)
        )
    if not works and wanted == KVM:
        raise ServiceUnavailable("machines do not run by KVM here: a guest that was booted to find out did not start")
    return KVM if works else TCG


async def remembered(file: Path, made_of: tuple[str, Path, Path], ask: Callable[[], Awaitable[bool]]) -> bool:
    """The answer that `file` holds for a monitor, kernel and first archive since the machine was started, or a new
    one, which is kept in it."""
    key = await asyncio.to_thread(_key, *made_of)
    known = await asyncio.to_thread(_read, file)
    works = known[key] if key in known else await ask()
    await asyncio.to_thread(_write, file, {key: works})
    return works


async def probe(
    program: str, kernel: Path, initramfs: Path, *, accelerator: Accelerator = KVM, secs: float = _PROBE_SECS
) -> bool:
    """Boot a guest that only says that it works; whether it did within `secs`."""
    process = await asyncio.create_subprocess_exec(
        program,
        *("-machine", MACHINE),
        *processor(accelerator),
        *("-m", "128", "-smp", "1"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
        *("-kernel", os.fspath(kernel), "-initrd", os.fspath(initramfs)),
        *("-append", kernel_arguments(accelerator, "aether.probe=1")),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    handle = os.pidfd_open(process.pid)
    try:
        async with asyncio.timeout(secs):
            while text := await process.stdout.readline():
                if text.startswith(_WORKS):
                    return True
    except TimeoutError:
        return False
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
        await process.wait()
    return False


def _key(program: str, kernel: Path, initramfs: Path) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    seen = os.stat(program)
    text = f"{boot} {program} {seen.st_size} {seen.st_mtime_ns} {kernel.name} {initramfs.name}"
    return sha256(text.encode()).hexdigest()


def _read(path: Path) -> dict[str, bool]:
    try:
        return {str(key): bool(value) for key, value in json.loads(path.read_bytes()).items()}
    except (FileNotFoundError, ValueError, AttributeError):
        return {}


def _write(path: Path, known: dict[str, bool]) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(known))
    part.replace(path)
