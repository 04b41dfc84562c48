"""Real microVMs for tests: guests are made once per machine and kept in the cache of dev.sh."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from aether.model.function_instance import Code, CodeForm, FunctionSpec
from aether.runtimes.microvm import leftovers
from aether.runtimes.microvm.qemu import QemuOptions, QemuRuntime


def cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("AETHER_DEV_CACHE") or f"{home}/aether-dev")


KERNEL = cache() / "kernel"


def need_guest_tools() -> None:
    """Skips, naming the component, where guests cannot be made."""
    for program, package in (("mksquashfs", "squashfs-tools"), ("lz4", "lz4"), ("cc", "gcc"), ("node", "node")):
        if shutil.which(program) is None:
            pytest.skip(f"component: {package}")
    if not list((KERNEL / "boot").glob("vmlinuz-*")):
        pytest.skip("component: linux-image-cloud-amd64")


def need_machines() -> None:
    """Skips, naming the component, where no machine can be started."""
    need_guest_tools()
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("component: qemu-system-x86")
    if os.geteuid() != 0 or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("component: root and /dev/net/tun")


def options(accelerator: str = "tcg", *, snapshots: bool = False) -> QemuOptions:
    return QemuOptions(
        accelerator=accelerator, kernel_root=KERNEL, guests_dir=cache() / "guests", snapshots=snapshots
    )  # fmt: skip


@asynccontextmanager
async def machines(data: Path, accelerator: str = "tcg", *, snapshots: bool = False) -> AsyncIterator[QemuRuntime]:
    """A runtime under `data`; when it ends, no machine of it is left."""
    need_machines()
    runtime = QemuRuntime(data, options(accelerator, snapshots=snapshots))
    try:
        yield runtime
    finally:
        await runtime.close()
        assert leftovers.running(leftovers.scope(data)) == {}


def code(path: Path, files: Mapping[str, str]) -> Code:
    """An uploaded tar.gz of `files`."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    path.write_bytes(out.getvalue())
    return Code(path, CodeForm.TAR_GZ, sha256(out.getvalue()).hexdigest())


def spec(code: Code, instance_id: str = "i1", *, runtime: str = "node", **more: object) -> FunctionSpec:
    entrypoint = "index.js" if runtime == "node" else "main.py"
    return FunctionSpec(instance_id, "hello", runtime, code, entrypoint, **{"ready_secs": 120.0, **more})  # type: ignore[arg-type]
