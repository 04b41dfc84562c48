"""What guests boot from is made the same twice, and what goes wrong in a guest ends it before the function runs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from aether.model.errors import ServiceUnavailable
from aether.runtimes.microvm import acceleration, leftovers, qemu
from aether.runtimes.microvm.acceleration import choose, probe
from aether.runtimes.microvm.boot import TCG
from aether.runtimes.microvm.guest import initramfs, kernel, rootfs
from aether.runtimes.microvm.guest.store import GuestStore
from aether.runtimes.microvm.images import make_image
from support.microvm import KERNEL, cache, code, machines, need_guest_tools, options, spec


def test_the_first_archive_and_the_root_file_system_are_the_same_when_made_again(tmp_path: Path) -> None:
    need_guest_tools()
    modules = kernel.module_files(kernel.find_kernel(KERNEL))
    names = [file.stem for file in modules]
    assert {"virtio_mmio", "virtio_blk", "virtio_net", "squashfs", "virtio", "virtio_ring"} <= set(names)
    assert names.index("virtio_ring") < names.index("virtio_blk")
    first, second = (initramfs.initramfs(initramfs.compile_init(), modules) for _ in range(2))
    assert first == second
    digests: set[str] = set()
    for number in range(2):
        rootfs.make_tree("node", tmp_path / f"tree{number}")
        make_image(tmp_path / f"tree{number}", tmp_path / f"image{number}")
        digests.add(sha256((tmp_path / f"image{number}").read_bytes()).hexdigest())
    assert len(digests) == 1
    tree = tmp_path / "tree0"
    assert {item.name for item in tree.iterdir()} == {"app", "dev", "etc", "lib", "lib64", "proc", "tmp", "usr"}
    assert [item.name for item in (tree / "usr/bin").iterdir()] == ["node"]


def test_a_missing_kernel_is_said_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ServiceUnavailable, match="linux-image-cloud-amd64"):
        kernel.find_kernel(tmp_path)


def test_kernels_that_are_none_are_refused() -> None:
    for image in (b"", b"\0" * 600, b"\0" * 0x202 + b"HdrS" + bytes(600)):
        with pytest.raises(ServiceUnavailable):
            kernel.unpack_kernel(image)


async def test_a_guest_that_gets_no_assignment_stops_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token on the kernel's command line is not the one that the host knows."""
    arguments = qemu.kernel_arguments
    monkeypatch.setattr(
        qemu, "kernel_arguments", lambda accelerator, _: arguments(accelerator, "aether.token=" + "0" * 64)
    )
    work = code(tmp_path / "in", {"index.js": "console.log('user code runs')"})
    async with machines(tmp_path / "data") as runtime:
        with pytest.raises(ServiceUnavailable, match="its machine ended before it listened") as caught:
            await runtime.start(spec(work))
        said = "\n".join(record.text for record in await runtime.log("i1"))
        assert "aether-init: FATAL: the metadata service refuses: 404" in said
        assert "user code runs" not in said
        assert caught.value.details is not None
        assert any("FATAL" in text for text in caught.value.details["log"])


async def test_what_a_killed_server_left_is_swept(tmp_path: Path) -> None:
    data = tmp_path / "data"
    work = code(tmp_path / "in", {"index.js": ""})
    async with machines(data) as runtime:
        await runtime.prepare("node", work)
    script = f"""
import asyncio
from pathlib import Path
from support.microvm import options, spec
from aether.model.function_instance import Code, CodeForm
from aether.runtimes.microvm.qemu import QemuRuntime
work = Code(Path({str(work.archive)!r}), CodeForm.TAR_GZ, {work.digest!r})
asyncio.run(QemuRuntime(Path({str(data)!r}), options()).start(spec(work, "left")))
"""
    server = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    )
    scope = leftovers.scope(data)
    try:
        async with asyncio.timeout(60):
            while "left" not in leftovers.running(scope):
                await asyncio.sleep(0.01)
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()
    assert leftovers.running(leftovers.scope(tmp_path)) == {}
    async with machines(data) as runtime:
        assert await runtime.sweep() == ["left"]
        assert leftovers.running(scope) == {}
        assert await runtime.sweep() == []


async def test_a_probe_boots_and_its_answer_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with machines(tmp_path / "data"):
        pass
    image, archive = await GuestStore(cache() / "guests", KERNEL).base()
    program = qemu.program()
    assert await probe(program, image, archive, accelerator=TCG, secs=100.0)
    assert not await probe(program, archive, archive, accelerator=TCG, secs=5.0)
    found = await choose("auto", program, image, archive, tmp_path)
    calls: list[object] = []

    async def again(*arguments: object) -> bool:
        calls.append(arguments)
        return False

    monkeypatch.setattr(acceleration, "probe", again)
    assert await choose("auto", program, image, archive, tmp_path) == found
    assert calls == []
    assert options("tcg").accelerator == await choose("tcg", program, image, archive, tmp_path)
