"""What the host serves to a guest, over real sockets, against a guest that means harm."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from aether.model.instance import InstanceExit
from aether.runtimes.microvm import line, metadata
from aether.runtimes.microvm.calls import MAX_CALLS
from aether.runtimes.microvm.console import Console, open_log, read_log
from aether.runtimes.microvm.line import Line
from aether.runtimes.microvm.metadata import Metadata


@asynccontextmanager
async def served(serve: Callable[[socket.socket], Awaitable[None]]) -> AsyncIterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        listener.setblocking(False)
        task = asyncio.ensure_future(serve(listener))
        try:
            yield listener.getsockname()[1]
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def say(port: int, text: bytes) -> bytes:
    """What comes back until the other side hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(text)
    writer.write_eof()
    try:
        async with asyncio.timeout(30):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


PUT = b"PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense\r\n\r\n",
        b"GET /\r\n\r\n",
        b"PUT /latest/api/token HTTP/2\r\n\r\n",
        PUT.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\nhello"),
        PUT.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n"),
        PUT.replace(b"X-meta", b" X-meta"),
        PUT.replace(b"\r\n\r\n", b"\r\nX-Metadata-Token-TTL-Seconds: 61\r\n\r\n"),
    ],
    ids=["nonsense", "no-version", "version", "body", "chunked", "folded", "twice"],
)
async def test_requests_that_are_none_are_refused_and_hung_up_on(request_: bytes) -> None:
    async with served(lambda listener: metadata.serve(listener, Metadata("boot", bytes))) as port:
        assert (await say(port, request_)).startswith(b"HTTP/1.1 400 ")


async def test_a_session_and_its_answer_share_a_connection_and_a_flood_of_header_gets_none() -> None:
    async with served(lambda listener: metadata.serve(listener, Metadata("boot", lambda: b"work"))) as port:
        assert await say(port, b"GET / HTTP/1.1\r\nA: " + b"x" * 100_000) == b""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(PUT)
        token = (await reader.readuntil(b"\r\n\r\n"), await reader.read(32))[1]
        writer.write(b"GET /latest/aether/boot HTTP/1.1\r\nX-metadata-token: " + token + b"\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        assert await reader.read(4) == b"work"
        writer.close()


async def test_a_guest_that_opens_many_connections_takes_no_more_than_its_share() -> None:
    async with served(lambda listener: metadata.serve(listener, Metadata("boot", bytes))) as port:
        before = len(os.listdir("/proc/self/fd"))
        ours = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
        try:
            for _ in range(50):
                await asyncio.sleep(0.001)
            assert len(os.listdir("/proc/self/fd")) - before - len(ours) <= MAX_CALLS
        finally:
            for item in ours:
                item.close()
        assert (await say(port, PUT)).startswith(b"HTTP/1.1 200 ")


async def test_only_init_is_listened_to_on_the_line_and_only_once() -> None:
    it = Line("secret")
    assert not it.stop(1.0)
    async with served(it.serve) as port:
        for text in (b"", b"ready\n", b"hello wrong\nready\n", b"hello secre\n", b"hello " + b"x" * 100_000):
            assert await say(port, text) == b""
            assert not it.up.is_set()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"hello secret\n")
        await it.up.wait()
        assert not it.ready.is_set()
        assert await say(port, b"hello secret\nexit 9\n") == b""
        writer.write(b"nonsense\nready\n")
        await it.ready.wait()
        assert it.stop(1.5)
        assert await reader.readline() == b"stop 1500\n"
        writer.write(b"exit 7\n")
        writer.write_eof()
        assert await reader.read() == b""
        assert it.ended == InstanceExit(7, None)
        assert not it.stop(1.0)
        writer.close()
    assert line.KILLED.signal == 9


async def test_a_flooded_console_is_bounded_and_keeps_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    journal = open_log(path)
    console = Console(journal, b"stdout")
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: console, pipe)
        flood = b"".join(b"%07d%s\r\n" % (number, b"x" * 93) for number in range(40_000))
        await asyncio.to_thread(_write_all, writing, flood)
        await console.done.wait()
        journal.close()
        transport.close()
    assert sum(item.stat().st_size for item in tmp_path.iterdir()) <= 2 * (1 << 20) + 4096
    assert (await asyncio.to_thread(read_log, path, 1))[0].text == "0039999" + "x" * 93
    assert {item.stat().st_mode & 0o777 for item in tmp_path.iterdir()} == {0o600}


def _write_all(fd: int, data: bytes) -> None:
    with os.fdopen(fd, "wb") as out:
        out.write(data)
