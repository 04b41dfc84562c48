"""A registered runtime in a real machine: its root file system and its command, booted and from a snapshot."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from aether.functions.contents import Contents
from aether.functions.runtimes import MAX_IMAGE_BYTES, PREFIX, Runtimes
from aether.model.function_instance import StartKind
from aether.registry.locks import ArtifactLocks
from aether.runtimes.microvm import leftovers
from aether.runtimes.microvm.guest import rootfs
from aether.runtimes.microvm.guest.store import GuestStore
from aether.runtimes.microvm.images import make_image
from aether.runtimes.microvm.qemu import QemuRuntime
from aether.stores.database import snapshot
from support.microvm import KERNEL, cache, code, need_machines, options, spec
from support.served import digest_of, served

SERVER = """
require('http').createServer((request, response) => response.end(JSON.stringify({
  mine: global.mine, argv: process.argv, exec: process.execArgv, path: process.env.PATH,
  release: require('fs').readFileSync('/etc/os-release', 'utf8'),
}))).listen(process.env.PORT, '0.0.0.0');
"""
INIT = ("/usr/bin/node", "--require=/usr/lib/mine.js", "--no-warnings")


def image(folder: Path) -> bytes:
    """This machine's Node.js, as the shipped runtime has it, and something that the shipped one has not."""
    tree = folder / "tree"
    rootfs.make_tree("node", tree)
    (tree / "usr/lib/mine.js").write_text("global.mine = 'of the image';\n")
    (tree / "etc/os-release").write_text("ID=mine\n")
    make_image(tree, folder / "image")
    return (folder / "image").read_bytes()


async def ask(runtime: QemuRuntime, instance_id: str) -> Any:
    loop = asyncio.get_running_loop()
    with await runtime.connect(instance_id) as sock:
        await loop.sock_sendall(sock, b"GET / HTTP/1.0\r\n\r\n")
        answer = b""
        while data := await loop.sock_recv(sock, 65536):
            answer += data
    return json.loads(answer.partition(b"\r\n\r\n")[2])


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 1 << 20):
        yield data[at : at + (1 << 20)]


async def test_a_function_runs_on_a_registered_root_file_system(tmp_path: Path) -> None:
    need_machines()
    data = image(tmp_path)
    async with served(tmp_path) as api:
        images = Contents(
            tmp_path / "rt", api.objects, prefix=PREFIX, what="root file system", max_bytes=MAX_IMAGE_BYTES
        )
        await images.open()
        registered = Runtimes(api.database, images, ArtifactLocks(None))

        async with registered.arriving(pieces(data)) as arrived:
            await registered.add("mine", INIT, arrived, "ann")
        (tmp_path / "rt" / digest_of(data)).unlink()  # so that the first start has it fetched

        taken = snapshot.take(tmp_path / "aether.db", tmp_path / "copy.db")
        assert f"runtimes/{digest_of(data)}" in taken.objects, "a backup would lack the image"
        assert snapshot.check(tmp_path / "copy.db") == taken

        guests = GuestStore(cache() / "guests", KERNEL, registered)
        guest = await guests.guest("mine")
        assert guest.rootfs.name == digest_of(data), "the snapshot's key is made of this name"
        runtime = QemuRuntime(tmp_path / "data", replace(options(snapshots=True), registered=registered))
        try:
            some = code(tmp_path / "code.tgz", {"index.js": SERVER})
            for instance_id, kind in (("booted", StartKind.COLD), ("restored", StartKind.RESTORED)):
                await runtime.start(replace(spec(some, instance_id, runtime="mine"), entrypoint="index.js"))
                assert (await runtime.status(instance_id)).start is kind
                said = await ask(runtime, instance_id)
                assert (said["mine"], said["argv"][1], said["exec"]) == (
                    "of the image", "/app/index.js", list(INIT[1:]),
                )  # fmt: skip
                assert (said["release"], said["path"]) == ("ID=mine\n", "/usr/local/bin:/usr/bin:/bin")
                await runtime.stop(instance_id, 0.0)
                await runtime.settle()
        finally:
            await runtime.close()
            await images.close()
            assert leftovers.running(leftovers.scope(tmp_path / "data")) == {}
