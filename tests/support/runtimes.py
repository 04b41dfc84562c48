"""Instances for tests of the process runtime: a runtime in a folder of its own, and short ways to use it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from aether.model.instance import InstanceExit, InstanceSpec, Limits
from aether.runtimes.process import ProcessRuntime, RuntimeOptions
from aether.runtimes.process.instance import ProcessInstance

NODE_SERVER = """
const server = require('http').createServer((request, response) => response.end('hello from node'));
server.listen(process.env.PORT, () => console.log('up'));
"""


class Bench:
    """A runtime and what it started; everything is gone when the test ends."""

    def __init__(self, data: Path, runtime: ProcessRuntime) -> None:
        self.data = data
        self.runtime = runtime
        self._count = 0

    def spec(
        self,
        command: str,
        *,
        files: Mapping[str, str | bytes] | None = None,
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
        app: str = "demo",
        instance_id: str = "",
    ) -> InstanceSpec:
        self._count += 1
        root = self.data / "releases" / f"r{self._count}"
        root.mkdir(parents=True)
        for name, content in (files or {}).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return InstanceSpec(
            instance_id=instance_id or f"i{self._count}",
            app=app,
            deployment_id="d",
            release=1,
            digest="0" * 64,
            root=root,
            command=command,
            port=3000,
            env=dict(env or {}),
            limits=limits or Limits(memory_bytes=256 * 1024**2, pids=128, tmp_bytes=16 * 1024**2),
        )

    async def run(self, command: str, **more: object) -> tuple[InstanceExit, list[str]]:
        """Run `command` to its end; returns how it ended and what it printed."""
        spec = self.spec(command, **more)  # type: ignore[arg-type]
        instance = await self.runtime.start(spec)
        async with asyncio.timeout(30):
            ended = await instance.wait()
        return ended, await self.lines(instance)

    async def lines(self, instance: ProcessInstance) -> list[str]:
        return [record.text async for record in self.runtime.logs(instance.spec.instance_id, instance.spec.app)]

    async def said(self, instance: ProcessInstance, text: str) -> None:
        """Return when the instance has printed a line that contains `text`."""
        spec = instance.spec
        async with asyncio.timeout(30), aclosing(self.runtime.logs(spec.instance_id, spec.app, follow=True)) as log:
            async for record in log:
                if text in record.text:
                    return
        raise AssertionError(f"the instance ended without saying {text!r}: {await self.lines(instance)}")


@asynccontextmanager
async def bench(data: Path, options: RuntimeOptions | None = None) -> AsyncIterator[Bench]:
    """A runtime under `data`; skips the test, naming the component, where no sandbox can be had."""
    data.mkdir(parents=True, exist_ok=True)
    runtime = ProcessRuntime(data, options)
    found = await runtime.probe()
    if not found.usable:
        pytest.skip(f"component: process sandbox ({found.reason})")
    try:
        yield Bench(data, runtime)
    finally:
        for name in await runtime.known():
            await runtime.remove(name)
        await runtime.close()


async def ask(instance: ProcessInstance, path: str = "/") -> str:
    """Body of an HTTP answer over a freshly dialled connection; waits while nothing listens yet."""
    async with asyncio.timeout(30):
        while True:
            try:
                sock = await instance.dial()
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.005)
        return await exchange(sock, path)


async def exchange(sock: socket.socket, path: str = "/") -> str:
    loop = asyncio.get_running_loop()
    with sock:
        await loop.sock_sendall(sock, f"GET {path} HTTP/1.0\r\n\r\n".encode())
        answer = b""
        while data := await loop.sock_recv(sock, 65536):
            answer += data
    return answer.partition(b"\r\n\r\n")[2].decode()


def processes_mentioning(text: str) -> list[int]:
    """Pids whose working directory or command line mentions `text` (a path of the test's own)."""
    found: list[int] = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                line = Path(f"/proc/{name}/cmdline").read_bytes().decode(errors="replace")
                place = os.readlink(f"/proc/{name}/cwd")
            except OSError:
                continue
            if text in line or text in place:
                found.append(int(name))
    return found


async def gone(text: str) -> None:
    """Return when no process mentions `text` any more; for helpers that end by themselves a moment later."""
    async with asyncio.timeout(3):
        while processes_mentioning(text):
            await asyncio.sleep(0.005)


def cgroups_named(instance_id: str) -> list[Path]:
    return [Path(folder) for folder, _, _ in os.walk("/sys/fs/cgroup") if folder.endswith(f"/{instance_id}")]
