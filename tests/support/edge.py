"""What the edge's tests need: instances on given ports, raw upstreams, raw clients with time limits, and wires."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aether.edge.options import EdgeOptions, RequestRecord
from aether.edge.server import Edge
from aether.edge.table import RouteTable
from aether.model.instance import InstanceExit, InstanceSpec

LIMIT_SECS = 20.0
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class PortInstance:
    """An instance as the edge sees it: something to dial."""

    def __init__(self, port: int, name: str = "i1") -> None:
        self.port = port
        self.dials = 0
        self.spec = InstanceSpec(name, "app", "d", 1, "0" * 64, Path("/app"), "run", port)

    async def dial(self) -> socket.socket:
        self.dials += 1
        sock = socket.socket()
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        except BaseException:
            sock.close()
            raise
        return sock

    async def wait(self) -> InstanceExit:
        raise NotImplementedError

    async def stop(self, grace_secs: float) -> InstanceExit:
        raise NotImplementedError


class Upstream:
    """A TCP server whose every connection is a test's own coroutine."""

    def __init__(self, handler: Handler, port: int = 0, unix: Path | None = None) -> None:
        self._handler = handler
        self._unix = unix
        self.port = port
        self.connections = 0
        self.open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Upstream:
        if self._unix is not None:
            self._server = await asyncio.start_unix_server(self._accept, self._unix, limit=1 << 20)
            return self
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in list(self.open):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        await asyncio.sleep(0)

    def stop_listening(self) -> None:
        self._server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.open.add(writer)
        try:
            await self._handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        except asyncio.CancelledError:
            # the server of the standard library would log the cancellation of its own task
            return
        finally:
            self.open.discard(writer)
            self._tasks.discard(task)
            writer.close()


async def read_head(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(LIMIT_SECS):
        return await reader.readuntil(b"\r\n\r\n")


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of one request."""
    head = await read_head(reader)
    lower = head.lower()
    if b"transfer-encoding: chunked" in lower:
        return head, await read_chunked(reader)
    if b"content-length: " in lower:
        size = int(lower.split(b"content-length: ")[1].split(b"\r\n")[0])
        return head, await reader.readexactly(size)
    return head, b""


async def read_chunked(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while True:
        async with asyncio.timeout(LIMIT_SECS):
            size = int(await reader.readuntil(b"\r\n"), 16)
            data = await reader.readexactly(size + 2)
        assert data.endswith(b"\r\n")
        if not size:
            return body
        body += data[:-2]


def ok(body: bytes = b"ok", extra: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%b\r\n%b" % (len(body), extra, body)


def echo_handler(name: bytes = b"") -> Handler:
    """Answers every request with `name`, the head it got and the body."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, body = await read_request(reader)
            writer.write(ok(name + head + body))
            await writer.drain()

    return handle


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.sent = b""
        self.closed = False
        self.paused = False

    def write(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def write_eof(self) -> None:
        self.closed = True

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def set_write_buffer_limits(self, high: int) -> None:
        assert high > 0

    def get_extra_info(self, name: str) -> Any:
        return ("192.0.2.7", 1) if name == "peername" else None


def quiet(size: int, flags: int) -> bytes:
    """What `socket.recv` says of a connection without news."""
    raise BlockingIOError


class Client:
    """A raw client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, *, bodyless: bool = False) -> tuple[int, dict[bytes, bytes], bytes]:
        """Status, fields (lower-case names) and body of one answer."""
        head = await read_head(self.reader)
        first, *lines = head[:-4].split(b"\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        status = int(first.split(b" ")[1])
        if bodyless or status < 200 or status in (204, 304):
            return status, fields, b""
        async with asyncio.timeout(LIMIT_SECS):
            if fields.get(b"transfer-encoding") == b"chunked":
                return status, fields, await read_chunked(self.reader)
            if b"content-length" in fields:
                return status, fields, await self.reader.readexactly(int(fields[b"content-length"]))
            return status, fields, await self.reader.read()

    async def ask(self, data: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
        await self.send(data)
        return await self.answer()

    async def rest(self) -> bytes:
        """Everything until the end; a reset counts as the end."""
        async with asyncio.timeout(LIMIT_SECS):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b"(reset)"


class Running:
    """An edge under test."""

    def __init__(self, edge: Edge, table: RouteTable, port: int, records: list[RequestRecord]) -> None:
        self.edge = edge
        self.table = table
        self.port = port
        self.records = records
        self._clients: list[Client] = []

    def serve(self, app: str, *upstreams: Upstream | PortInstance | int) -> list[PortInstance]:
        """Route `app` to these."""
        instances = [_instance(each, f"i{number}") for number, each in enumerate(upstreams)]
        self.table.route(app, [self.table.add(app, instance) for instance in instances])
        return instances

    async def client(self) -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        client = Client(reader, writer)
        self._clients.append(client)
        return client

    async def get(self, path: str = "/", host: str = "app.localhost") -> tuple[int, dict[bytes, bytes], bytes]:
        """One request on a connection of its own."""
        client = await self.client()
        answer = await client.ask(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        client.writer.close()
        return answer

    async def recorded(self, count: int) -> list[RequestRecord]:
        await until(lambda: len(self.records) >= count)
        return self.records

    async def close(self) -> None:
        for client in self._clients:
            client.writer.close()
            client.writer.transport.abort()
        await self.edge.close(0.5)


def _instance(what: Upstream | PortInstance | int, name: str) -> PortInstance:
    if isinstance(what, PortInstance):
        return what
    return PortInstance(what if isinstance(what, int) else what.port, name)


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until `condition` holds."""
    async with asyncio.timeout(LIMIT_SECS):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def running(options: EdgeOptions | None = None) -> AsyncIterator[Running]:
    records: list[RequestRecord] = []
    table = RouteTable()
    edge = Edge(table, options, records.append)
    port = await edge.start()
    run = Running(edge, table, port, records)
    try:
        yield run
    finally:
        await run.close()
