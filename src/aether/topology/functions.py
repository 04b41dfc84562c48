"""Functions in one server process: which runtime this machine can have, and everything that runs them."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from aether.edge.functions import FunctionTable
from aether.functions.engine import FunctionEngine, FunctionOptions
from aether.functions.gateway import Waiting
from aether.functions.instance_state import Limits
from aether.functions.ports import FunctionRuntime
from aether.functions.scaling import Rules
from aether.functions.services import FunctionServices
from aether.functions.worker import WorkerOptions
from aether.model.errors import ConfigError, ServiceUnavailable
from aether.model.function_instance import RegisteredRuntimes
from aether.observability.logging import logger
from aether.runtimes.firecracker.runtime import FirecrackerOptions, FirecrackerRuntime
from aether.runtimes.microvm.guest.kernel import find_kernel
from aether.runtimes.microvm.qemu import PROGRAM, QemuOptions, QemuRuntime
from aether.runtimes.process.functions import ProcessFunctions
from aether.settings import Settings
from aether.stores.kv.sqlite import SqliteKV
from aether.stores.queue.sqlite import SqliteQueue

_TOOLS = ((PROGRAM, "qemu-system-x86"), ("mksquashfs", "squashfs-tools"), ("lz4", "lz4"), ("cc", "gcc"))
KEPT_MB = 256
"""Of the machine's memory, for everything else."""
_log = logger(__name__)


def lacks_for_machines(settings: Settings) -> str:
    """What this machine needs to run functions in virtual machines; empty when nothing is missing."""
    missing = [package for program, package in _TOOLS if shutil.which(program) is None]
    try:
        find_kernel(settings.function_kernel_root)
    except ServiceUnavailable:
        missing.append("linux-image-cloud-amd64")
    if os.geteuid() != 0:
        missing.append("root")
    elif not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        missing.append("/dev/net/tun")
    return ", ".join(missing)


def open_runtime(
    settings: Settings, data: Path, registered: RegisteredRuntimes | None = None
) -> tuple[FunctionRuntime, str]:  # fmt: skip
    """The runtime, and what it is in words. Raises ConfigError when the one that was asked for cannot be had."""
    lacks = lacks_for_machines(settings)
    if settings.function_runtime == "qemu" and lacks:
        raise ConfigError(f"AETHER_FUNCTION_RUNTIME=qemu: this machine lacks {lacks}")
    if settings.function_runtime == "firecracker":
        jailed = FirecrackerRuntime(
            data / "firecracker",
            FirecrackerOptions(kernel_root=settings.function_kernel_root, registered=registered),
        )
        try:
            jailed.programs()
        except ServiceUnavailable as error:
            raise ConfigError(f"AETHER_FUNCTION_RUNTIME=firecracker: {error}") from error
        return jailed, "functions in a Firecracker machine each"
    if settings.function_runtime == "process" or (settings.function_runtime == "auto" and lacks):
        if settings.function_runtime == "auto":
            _log.info("functions run in sandboxes, not in virtual machines", lacking=lacks)
        return ProcessFunctions(data / "process", registered), "functions in a sandbox each"
    options = QemuOptions(kernel_root=settings.function_kernel_root, registered=registered)
    machines = QemuRuntime(data / "qemu", options)
    return machines, "functions in a virtual machine each"


@asynccontextmanager
async def running_functions(
    settings: Settings, services: FunctionServices, router: FunctionTable
) -> AsyncGenerator[tuple[FunctionEngine, str]]:
    """Run functions inside the context, for a server that has the data folder to itself.

    Raises ConfigError and ServiceUnavailable. Records of instances and jobs are of no use to anybody after the server
    has ended, so they are in no backup."""
    data = settings.data_dir / "functions"
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        kv, queue = SqliteKV(data / "kv.db"), SqliteQueue(data / "queue.db")
        await kv.open()
        stack.push_async_callback(kv.close)
        await queue.open()
        stack.push_async_callback(queue.close)
        runtime, words = open_runtime(settings, data, services.runtimes)
        stack.push_async_callback(runtime.close)
        engine = FunctionEngine(
            kv, queue, services.catalogue, services.invocations, runtime, router, _options(settings)
        )  # fmt: skip
        services.run_by(engine)
        await stack.enter_async_context(engine.running())
        yield engine, words


def free_mb() -> int | None:
    """Memory that can be had without swapping, less what the machine itself should keep; None without /proc."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found.split()[1]) // 1024 - KEPT_MB


def _options(settings: Settings) -> FunctionOptions:
    return FunctionOptions(
        waiting=Waiting(settings.function_wait_secs, settings.function_max_waiting),
        rules=Rules(
            target=settings.function_target,
            idle_secs=settings.function_idle_secs,
            last_idle_secs=settings.function_last_idle_secs,
        ),
        worker=WorkerOptions(
            "local",
            parallel_starts=settings.function_parallel_starts or os.cpu_count() or 1,
            free_mb=free_mb,
            ready_secs=settings.function_start_secs,
            limits=Limits(
                start_secs=math.inf,
                drain_secs=settings.drain_timeout_secs,
                stop_secs=settings.stop_grace_secs,
            ),
        ),
    )
