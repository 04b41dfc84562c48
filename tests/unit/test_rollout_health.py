"""The health gate against real sockets that answer well, badly, slowly or not at all."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from aether.model.instance import InstanceExit
from aether.rollout import health
from aether.rollout.health import Gate, HealthCheck, Healthy, wrong_port

CHECK = HealthCheck("shop.localhost", 8080)


class FakeInstance:
    """Connected to a handler by socket pairs; refuses until `listening` is set."""

    def __init__(self, handler: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object] | None) -> None:
        self._handler = handler
        self.listening = asyncio.Event()
        self.ended: asyncio.Future[InstanceExit] = asyncio.get_running_loop().create_future()
        self.dials = 0
        self.ports: Sequence[int] = ()
        self._tasks: list[asyncio.Task[None]] = []

    async def dial(self) -> socket.socket:
        self.dials += 1
        if self._handler is None or not self.listening.is_set():
            raise ConnectionRefusedError
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setblocking(False)
        self._tasks.append(asyncio.create_task(self._serve(theirs)))
        return ours

    async def _serve(self, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock)
        try:
            await self._handler(reader, writer)  # type: ignore[misc]
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.transport.abort()

    async def listening_ports(self) -> Sequence[int]:
        return self.ports

    async def wait(self) -> InstanceExit:
        return await asyncio.shield(self.ended)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)


@asynccontextmanager
async def answering(data: bytes | None, *, listening: bool = True) -> AsyncIterator[FakeInstance]:
    seen: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        if data is None:
            await reader.read()
        else:
            writer.write(data)

    instance = FakeInstance(handler)
    instance.seen = seen  # type: ignore[attr-defined]
    if listening:
        instance.listening.set()
    try:
        yield instance
    finally:
        await instance.close()


async def last_reason(gate: Gate, instance: FakeInstance, dials: int) -> str:
    running = asyncio.create_task(gate.run())
    async with asyncio.timeout(5):
        while instance.dials <= dials:
            await asyncio.sleep(0.005)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return gate.last.code


async def test_any_answer_below_500_is_healthy() -> None:
    async with answering(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n") as instance:
        assert await Gate(instance, CHECK).run() == Healthy(404)
        assert b"\r\nHost: shop.localhost\r\n" in instance.seen[0]  # type: ignore[attr-defined]
        assert instance.seen[0].startswith(b"GET / HTTP/1.1\r\n")  # type: ignore[attr-defined]


async def test_interim_answers_are_passed_over() -> None:
    async with answering(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\n\r\n") as instance:
        assert await Gate(instance, CHECK).run() == Healthy(200)


async def test_a_refused_connection_is_polled_until_it_listens() -> None:
    async with answering(b"HTTP/1.0 200 OK\r\n\r\n", listening=False) as instance:
        running = asyncio.create_task(Gate(instance, CHECK).run())
        while instance.dials < 3:
            await asyncio.sleep(0.005)
        instance.listening.set()
        assert await running == Healthy(200)


@pytest.mark.parametrize(
    ("data", "path", "code"),
    [
        (b"HTTP/1.1 500 Oh\r\n\r\n", None, "health_bad_status"),
        (b"HTTP/1.1 404 No\r\n\r\n", "/ok", "health_bad_status"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", None, "health_no_answer"),
        (b"HTTP/1.1 xyz\r\n\r\n", None, "health_no_answer"),
        (b"", None, "health_no_answer"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000, None, "health_no_answer"),
    ],
)
async def test_bad_answers_are_told_apart(data: bytes, path: str | None, code: str) -> None:
    async with answering(data) as instance:
        check = HealthCheck("shop.localhost", 8080, path)
        assert await last_reason(Gate(instance, check), instance, 1) == code


async def test_silence_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PROBE_TIMEOUT_SECS", 0.02)
    async with answering(None) as instance:
        assert await last_reason(Gate(instance, CHECK), instance, 1) == "health_timeout"


async def test_an_app_that_listens_is_never_said_not_to() -> None:
    async with answering(None) as instance:
        gate = Gate(instance, CHECK)
        running = asyncio.create_task(gate.run())
        async with asyncio.timeout(5):
            while not instance.seen:  # type: ignore[attr-defined]
                await asyncio.sleep(0.005)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert gate.last.code == "health_timeout"
        assert "has not answered GET /" in gate.last.message


async def test_an_end_is_not_waited_out() -> None:
    async with answering(None, listening=False) as instance:
        gate = Gate(instance, CHECK)
        running = asyncio.create_task(gate.run())
        await asyncio.sleep(0)
        instance.ended.set_result(InstanceExit(7, None))
        assert await running == InstanceExit(7, None)
        assert "process.env.PORT" in gate.last.message


async def test_the_port_listened_on_instead_is_named() -> None:
    async with answering(None, listening=False) as instance:
        assert await wrong_port(instance, CHECK) is None
        instance.ports = (3000, 8080)
        reason = await wrong_port(instance, CHECK)
        assert reason is not None
        assert "3000" in reason.message
