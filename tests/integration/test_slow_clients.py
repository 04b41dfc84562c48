"""A thousand clients that are slow on purpose, at the apps and at the API: others are served as if they were not
there, memory stays bounded, and when their time is up all that they held is given back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from support.server import Server, hello, server

EACH = 250
HEADER_SECS, IDLE_SECS = 6, 8
JSON = "Host: HOST\r\nContent-Type: application/json\r\n"
MIB = 1 << 20

APP = """
const http = require('http'), { Readable } = require('stream');
const block = Buffer.alloc(65536, 120);
http.createServer((request, response) => {
  if (request.url === '/large') {
    let left = 800;
    Readable.from((function* () { while (left--) yield block; })()).pipe(response);
  } else if (request.method === 'POST') {
    request.on('data', () => {}).on('end', () => response.end('taken'));
  } else response.end('quick');
}).listen(process.env.PORT);
process.on('SIGTERM', () => process.exit(0));
"""


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    if wanted < 2 * 4 * EACH:
        pytest.skip("component: two thousand descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    settings = {
        "AETHER_EDGE_HEADER_TIMEOUT_SECS": str(HEADER_SECS),
        "AETHER_EDGE_IDLE_TIMEOUT_SECS": str(IDLE_SECS),
        "AETHER_API_BODY_TIMEOUT_SECS": str(IDLE_SECS),
    }
    try:
        with server(tmp_path_factory.mktemp("slow"), **settings) as it:
            assert it.deploy("shop", {"server.js": APP})["status"] == "active"
            assert it.deploy("other", hello("other"))["status"] == "active"
            yield it
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def rss(up: Server) -> int:
    assert up.process is not None
    with open(f"/proc/{up.process.pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def descriptors(up: Server) -> int:
    assert up.process is not None
    return len(os.listdir(f"/proc/{up.process.pid}/fd"))


class Slow:
    """Connections that dawdle in one way each, half of them at an app and half at the API."""

    def __init__(self, up: Server) -> None:
        self._up = up
        self._port = up.port
        self.most = 0
        self._hosts = [f"shop.localhost:{up.port}", f"127.0.0.1:{up.port}"]
        self.writers: list[asyncio.StreamWriter] = []
        self.readers: list[asyncio.StreamReader] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self, opening: str, drip: bytes, *, read: bool, hosts: list[str] | None = None) -> None:
        for number in range(EACH):
            host = (hosts or self._hosts)[number % len(hosts or self._hosts)]
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1024)
            writer.write(opening.replace("HOST", host).encode())
            self.writers.append(writer)
            self.readers.append(reader)
            if drip:
                self._tasks.append(asyncio.create_task(self._drip(writer, drip)))
            if not read:
                writer.transport.pause_reading()
        self.most = max(self.most, descriptors(self._up))

    async def _drip(self, writer: asyncio.StreamWriter, drip: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            while not writer.is_closing():
                await asyncio.sleep(1)
                writer.write(drip)
                await writer.drain()

    async def all_ended(self, secs: float) -> int:
        """How many are still open after at most `secs`."""
        async with asyncio.timeout(secs + 5):
            results = await asyncio.gather(*(self._ended(reader, secs) for reader in self.readers))
        return results.count(False)

    async def _ended(self, reader: asyncio.StreamReader, secs: float) -> bool:
        try:
            async with asyncio.timeout(secs):
                while await reader.read(65536):
                    pass
        except TimeoutError:
            return False
        except ConnectionError:
            return True
        return True

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self.writers:
            writer.transport.abort()
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def slow(up: Server) -> AsyncIterator[Slow]:
    it = Slow(up)
    try:
        yield it
    finally:
        await it.close()


async def ask(up: Server, host: str, path: str, token: str = "", body: bytes = b"") -> tuple[int, float]:
    """Status of one quick request on a connection of its own, and the seconds it took."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", up.port)
    head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: {host}:{up.port}\r\nConnection: close\r\n"
    if token:
        head += f"Authorization: Bearer {token}\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    try:
        writer.write(head.encode() + b"\r\n" + body)
        async with asyncio.timeout(30):
            answer = await reader.read()
        return int(answer.split(b" ")[1]), time.monotonic() - began
    finally:
        writer.transport.abort()


async def latencies(up: Server, count: int) -> list[float]:
    """Of ordinary clients of an app that nobody plays with, and of the API, one after the other."""
    token = (up.data / "admin-token").read_text().strip()
    took: list[float] = []
    for number in range(count):
        for host, path, bearer in (("other.localhost", "/", ""), ("127.0.0.1", "/apps", token)):
            status, secs = await ask(up, host, path, bearer)
            assert status == 200, (host, path, status)
            took.append(secs)
        if number % 10 == 0:
            body = json.dumps({"web": 1}).encode()
            status, secs = await ask(up, "127.0.0.1", "/apps/other/scale", token, body)
            assert status == 200
            took.append(secs)
    return sorted(took)


async def given_back(up: Server, wanted: int) -> None:
    """Return when the server holds that few descriptors."""
    async with asyncio.timeout(60):
        while descriptors(up) > wanted:
            await asyncio.sleep(0.1)


async def test_a_thousand_slow_clients(up: Server) -> None:
    quiet = await latencies(up, 30)
    before, held = rss(up), descriptors(up)
    async with slow(up) as clients:
        await clients.begin("GET / HTTP/1.1\r\nHost: HOST\r\nX-Slow: ", b"x", read=True)
        await clients.begin(
            f"POST /auth/login HTTP/1.1\r\n{JSON}Content-Length: 1000\r\n\r\n",
            b"x",
            read=True,
        )
        await clients.begin("GET /large HTTP/1.1\r\nHost: HOST\r\n\r\n", b"", read=False, hosts=clients._hosts[:1])
        await clients.begin("GET /healthz HTTP/1.1\r\nHost: HOST\r\n\r\n", b"", read=True)
        # on a busy machine the first to come have used up their time when the last ones are there
        assert clients.most >= held + 2 * EACH
        during = await latencies(up, 40)
        grown = rss(up) - before
        print(f"p50 {quiet[len(quiet) // 2]:.4f} -> {during[len(during) // 2]:.4f} s, "
              f"worst {quiet[-1]:.3f} -> {during[-1]:.3f} s, memory +{grown / MIB:.0f} MiB")  # fmt: skip
        assert during[len(during) // 2] < max(0.25, 10 * quiet[len(quiet) // 2])
        assert during[-1] < 3
        # the app in question has 250 large answers to begin; its own clients wait for that and for nothing else
        assert (await ask(up, "shop.localhost", "/"))[0] == 200
        assert grown < 256 * MIB
        # uploads to an app may go on for as long as they move: a byte a second is for the app to judge
        await given_back(up, held + 2 * EACH // 2 + 20)
    await given_back(up, held + 20)
    assert (await latencies(up, 5))[-1] < 5


async def test_slow_bodies_hold_no_place_of_others(up: Server) -> None:
    """More than AETHER_MAX_CONCURRENT_CONTROL clients that need no token begin a body and never end it."""
    token = (up.data / "admin-token").read_text().strip()
    opening = f"POST /auth/login HTTP/1.1\r\n{JSON}Content-Length: 900\r\n\r\n{{"
    async with slow(up) as clients:
        await clients.begin(opening, b" ", read=True, hosts=[f"127.0.0.1:{up.port}"])
        for _ in range(5):
            status, secs = await ask(up, "127.0.0.1", "/apps/other/scale", token, b'{"web": 1}')
            assert (status, secs < 3) == (200, True), (status, secs)
        assert await clients.all_ended(IDLE_SECS + 6) == 0
