"""Streams through the edge: bounded memory, big uploads, tunnels, many connections, other clients and servers."""

from __future__ import annotations

import asyncio
import hashlib
import io
import resource
import shutil
import socket
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
import websockets
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from aether.edge.options import EdgeOptions
from support.edge import LIMIT_SECS, Client, Running, Upstream, echo_handler, ok, read_head, running, until

MIB = 1 << 20
GET = b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n"

NODE_SERVER = """
const http = require('http'), crypto = require('crypto');
const server = http.createServer((req, res) => {
  if (req.url === '/hash') {
    const hash = crypto.createHash('sha256'); let size = 0;
    req.on('data', (d) => { hash.update(d); size += d.length; });
    req.on('end', () => res.end(JSON.stringify({size, hash: hash.digest('hex')})));
  } else if (req.url === '/stream') {
    let n = 0;
    const t = setInterval(() => { res.write(`part ${n}\\n`); if (++n === 5) { clearInterval(t); res.end(); } }, 5);
  } else if (req.url === '/headers') { res.end(JSON.stringify(req.headers));
  } else if (req.url === '/big') {
    const block = Buffer.alloc(65536, 'x'); let left = 320;
    const more = () => {
      while (left > 0) { left--; if (!res.write(block)) { res.once('drain', more); return; } }
      res.end();
    };
    more();
  } else if (req.url === '/die') {
    res.writeHead(200, {'content-length': 100}); res.write('abc', () => res.socket.destroy());
  } else { res.end('hello'); }
});
server.keepAliveTimeout = 50;
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
"""


@asynccontextmanager
async def node() -> AsyncIterator[int]:
    program = shutil.which("node")
    if program is None:
        pytest.skip("component:node")
    child = await asyncio.create_subprocess_exec(program, "-e", NODE_SERVER, stdout=PIPE)
    try:
        assert child.stdout is not None
        async with asyncio.timeout(LIMIT_SECS):
            port = int(await child.stdout.readline())
        yield port
    finally:
        child.kill()
        await child.communicate()


def peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def buffered_bytes(run: Running) -> int:
    """What the edge holds for its clients."""
    return sum(each.transport.get_write_buffer_size() for each in run.edge._connections)


@pytest.mark.parametrize("coding", ["length", "chunked"])
async def test_a_slow_reader_of_a_large_stream_costs_little_memory(coding: str) -> None:
    total = 200 * MIB
    block = b"x" * (256 * 1024)
    sent = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_head(reader)
        if coding == "length":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while sent < total:
            writer.write(block if coding == "length" else b"%x\r\n%b\r\n" % (len(block), block))
            await writer.drain()
            sent += len(block)
        if coding == "chunked":
            writer.write(b"0\r\n\r\n")
            await writer.drain()

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        before = peak_rss_bytes()
        loop = asyncio.get_running_loop()
        sock = socket.create_connection(("127.0.0.1", run.port))
        sock.setblocking(False)
        await loop.sock_sendall(sock, GET)
        got, most, seen = 0, 0, b""
        # nobody reads until the stream has come to a standstill
        last = -1
        while last != sent or not sent:
            last = sent
            await asyncio.sleep(0.05)
        assert sent < 40 * MIB
        while True:
            data = await loop.sock_recv(sock, 4 * MIB)
            if not data:
                break
            got += len(data)
            seen = (seen + data)[-8:]
            most = max(most, buffered_bytes(run))
            if got >= total and (coding == "length" or seen.endswith(b"0\r\n\r\n")):
                break
        sock.close()
        assert got >= total
        assert most < 2 * MIB
        assert peak_rss_bytes() - before < 64 * MIB
        assert (await run.recorded(1))[0].bytes_out == total


async def test_a_slow_upstream_holds_back_an_upload() -> None:
    total = 100 * MIB
    go = asyncio.Event()
    digest = hashlib.sha256()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        await go.wait()
        left = total
        while left:
            data = await reader.read(MIB)
            digest.update(data)
            left -= len(data)
        writer.write(ok(digest.hexdigest().encode()))
        await writer.drain()

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        expected = hashlib.sha256()
        sent = 0

        async def upload() -> None:
            nonlocal sent
            await client.send(b"PUT / HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: %d\r\n\r\n" % total)
            while sent < total:
                block = sent.to_bytes(8, "big") * (MIB // 8)
                expected.update(block)
                await client.send(block)
                sent += len(block)

        task = asyncio.create_task(upload())
        last = -1
        while last != sent or not sent:
            last = sent
            await asyncio.sleep(0.05)
        assert sent < 40 * MIB
        go.set()
        await task
        status, _, body = await client.answer()
        assert (status, body.decode()) == (200, expected.hexdigest())
        assert (await run.recorded(1))[0].bytes_in == total


async def test_a_pipelining_client_that_does_not_read_is_held_back() -> None:
    answered = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answered
        while True:
            await read_head(reader)
            writer.write(ok(b"x" * 65536))
            await writer.drain()
            answered += 1

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", run.port))
        await loop.sock_sendall(sock, GET * 1000)
        last = -1
        while last != answered or not answered:
            last = answered
            await asyncio.sleep(0.05)
        assert answered < 500
        assert buffered_bytes(run) < MIB
        left = 1000 * 65536
        while left > 0:
            left -= len(await loop.sock_recv(sock, MIB))
        await until(lambda: answered == 1000)
        sock.close()


async def test_a_client_that_never_reads_is_dropped() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    async with Upstream(handle) as upstream, running(EdgeOptions(idle_timeout_secs=0.2)) as run:
        run.serve("app", upstream)
        with socket.create_connection(("127.0.0.1", run.port)) as sock:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_sendall(sock, GET)
            await until(lambda: len(run.records) == 1)
            await until(lambda: not upstream.open)
        assert run.records[0].aborted


async def test_events_arrive_one_by_one() -> None:
    following = asyncio.Queue[bytes]()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(5):
            data = await following.get()
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await reader.read()

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        await client.send(GET)
        await read_head(client.reader)
        for number in range(5):
            event = b"data: %d\n\n" % number
            following.put_nowait(event)
            async with asyncio.timeout(LIMIT_SECS):
                assert await client.reader.readuntil(b"\n\n\r\n") == b"%x\r\n%b\r\n" % (len(event), event)
        client.writer.close()
        await until(lambda: not upstream.open)


async def test_both_directions_of_one_request_stream_at_once() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n")
            for _ in range(5):
                writer.write(await reader.readexactly(3))
            await writer.drain()

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        await client.send(b"POST / HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 15\r\n\r\n")
        assert b"connection: close" not in (await read_head(client.reader)).lower()
        for part in (b"abc", b"def", b"ghi", b"jkl", b"mno"):
            await client.send(part)
            async with asyncio.timeout(LIMIT_SECS):
                assert await client.reader.readexactly(3) == part
        # and the connection goes on
        await client.send(b"POST / HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 15\r\n\r\n")
        await read_head(client.reader)


@asynccontextmanager
async def websocket_app() -> AsyncIterator[int]:
    async def handle(socket: ServerConnection) -> None:
        assert socket.request is not None
        if socket.request.path == "/bye":
            await socket.send(str(socket.request.headers.get("X-Forwarded-Host")))
            return
        async for message in socket:
            await socket.send(message)

    async with serve(handle, "127.0.0.1", 0, max_size=None) as server:
        yield next(iter(server.sockets)).getsockname()[1]


async def test_websockets() -> None:
    async with websocket_app() as port, running() as run:
        run.serve("app", port)
        url = f"ws://app.localhost:{run.port}"
        async with connect(
            f"{url}/", host="127.0.0.1", port=run.port, max_size=None, compression=None, proxy=None
        ) as session:
            for message in ("hello", b"\x00" * 3 * MIB, ""):
                await session.send(message)
                assert await session.recv() == message
            assert run.edge.counters.tunnels == 1
            route = run.table.find(b"app.localhost")
            assert route is not None
            assert route.backends[0].in_flight == 1
            assert not await route.backends[0].drain(0.01)
        run.serve("app", port)
        async with connect(f"{url}/bye", host="127.0.0.1", port=run.port, proxy=None) as session:
            assert await session.recv() == f"app.localhost:{run.port}"
            with pytest.raises(websockets.ConnectionClosedOK):
                await session.recv()
        records = await run.recorded(2)
        assert {record.status for record in records} == {101}
        assert records[0].bytes_in > 3 * MIB
        await until(lambda: run.edge.open_connections == 0)


async def test_an_open_websocket_does_not_hold_up_the_end_but_a_request_does() -> None:
    asked, answer_now = asyncio.Event(), asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        asked.set()
        await answer_now.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone")
        await writer.drain()

    async with websocket_app() as port, Upstream(slow) as upstream, running() as run:
        run.serve("app", port)
        run.serve("slow", upstream)
        session = await connect(f"ws://app.localhost:{run.port}/", host="127.0.0.1", port=run.port, proxy=None)
        await session.send("hello")
        assert await session.recv() == "hello"
        client = await run.client()
        await client.send(b"GET / HTTP/1.1\r\nHost: slow.localhost\r\n\r\n")
        async with asyncio.timeout(LIMIT_SECS):
            await asked.wait()
            closing = asyncio.create_task(run.edge.close(LIMIT_SECS * 10))
            await session.send("still")
            assert await session.recv() == "still", "the tunnel goes on as long as a request is under way"
            answer_now.set()
            assert b"200 OK" in await read_head(client.reader)
            assert await client.reader.readexactly(4) == b"done"
            await closing
            with pytest.raises(websockets.ConnectionClosed):
                await session.recv()
        assert run.edge.open_connections == 0


async def tunnel(run: Running) -> Client:
    client = await run.client()
    await client.send(b"GET / HTTP/1.1\r\nHost: app.localhost\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\nearly ")
    head = await read_head(client.reader)
    assert head.startswith(b"HTTP/1.1 101 ")
    assert b"Upgrade: raw\r\n" in head
    return client


SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n"


async def test_other_tunnels_half_close_both_ways() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"Upgrade: raw\r\n" in await read_head(reader)
        writer.write(SWITCH + b"first ")
        everything = await reader.read()
        writer.write(b"got " + everything)
        await writer.drain()

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        client = await tunnel(run)
        await client.send(b"late")
        client.writer.write_eof()
        assert await client.rest() == b"first got early late"
        record = (await run.recorded(1))[0]
        assert (record.status, record.aborted) == (101, False)


async def test_a_tunnel_whose_upstream_dies_ends() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(SWITCH)
        await reader.readexactly(6)
        writer.transport.abort()

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        client = await tunnel(run)
        assert await client.rest() in (b"", b"(reset)")
        # a close looks like a half-close until something is sent to the one that has gone
        while not run.records:
            client.writer.write(b"anybody there?")
            await asyncio.sleep(0.005)


async def test_a_tunnel_with_a_slow_reader_holds_back_the_writer() -> None:
    sent = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_head(reader)
        writer.write(SWITCH)
        while sent < 100 * MIB:
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        client = await tunnel(run)
        last = -1
        while last != sent or not sent:
            last = sent
            await asyncio.sleep(0.05)
        assert sent < 40 * MIB
        got = 0
        while data := await client.reader.read(MIB):
            got += len(data)
        assert got == 100 * MIB


async def test_an_upgrade_that_is_refused_is_an_ordinary_answer() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno")
        await writer.drain()
        await reader.read()

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        status, fields, body = await client.ask(
            b"GET / HTTP/1.1\r\nHost: app.localhost\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n" + GET
        )
        assert (status, fields[b"connection"], body) == (401, b"close", b"no")
        assert await client.rest() == b""


async def test_idle_tunnels_are_ended_and_close_ends_all() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(SWITCH)
        await reader.read()

    async with Upstream(handle) as upstream, running(EdgeOptions(tunnel_idle_secs=0.1)) as run:
        run.serve("app", upstream)
        client = await tunnel(run)
        assert await client.rest() in (b"", b"(reset)")
        await run.recorded(1)
    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        client = await tunnel(run)
        await run.edge.close(0.05)
        assert await client.rest() in (b"", b"(reset)")
        assert run.edge.open_connections == 0


async def test_a_thousand_idle_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    async with Upstream(echo_handler()) as upstream, running() as run:
        run.serve("app", upstream)
        clients = [await run.client() for _ in range(1000)]
        await until(lambda: run.edge.open_connections == 1000)
        for _ in range(20):
            assert (await run.get())[0] == 200
        for client in clients[::100]:
            assert (await client.ask(GET))[0] == 200
        assert upstream.connections <= 3


async def test_node_behind_and_aiohttp_in_front() -> None:
    async with node() as port, running() as run, aiohttp.ClientSession() as session:
        run.serve("app", port)

        async def get(path: str) -> bytes:
            async with session.get(f"{base}{path}", headers=host) as answer:
                assert answer.status == 200
                return await answer.read()

        base, host = f"http://127.0.0.1:{run.port}", {"Host": "app.localhost"}
        assert await get("/") == b"hello"
        assert await get("/stream") == b"".join(b"part %d\n" % n for n in range(5))
        assert len(await get("/big")) == 320 * 65536
        assert b'"x-forwarded-host":"app.localhost"' in await get("/headers")
        payload = bytes(range(256)) * 40960

        async def parts() -> AsyncIterator[bytes]:
            for at in range(0, len(payload), 100_000):
                yield payload[at : at + 100_000]

        for data in (io.BytesIO(payload), parts()):
            async with session.post(f"{base}/hash", data=data, headers=host) as answer:
                found = await answer.json(content_type=None)
            assert found == {"size": len(payload), "hash": hashlib.sha256(payload).hexdigest()}
        with pytest.raises(aiohttp.ClientPayloadError):
            await get("/die")
        # Node.js closes idle connections after 50 ms here: requests meet closing connections all the time
        for round_number in range(30):
            assert await get("/") == b"hello"
            async with session.post(f"{base}/hash", data=b"x", headers=host) as answer:
                assert answer.status == 200
            await asyncio.sleep(0.045 + round_number % 6 * 0.002)

        async def many(count: int) -> None:
            for _ in range(count):
                assert await get("/") == b"hello"

        await asyncio.gather(*(many(20) for _ in range(20)))
