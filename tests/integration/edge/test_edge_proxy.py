"""The edge between real sockets: what passes, in both directions, and what the edge answers itself."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest

from aether.edge.options import EdgeOptions
from aether.edge.server import Edge
from aether.edge.table import RouteTable
from support.edge import (
    PortInstance,
    Upstream,
    echo_handler,
    ok,
    read_chunked,
    read_head,
    read_request,
    running,
    until,
)

GET = b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n"


async def test_fields_that_reach_the_app_and_the_client() -> None:
    async with Upstream(echo_handler()) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        status, fields, body = await client.ask(
            b"GET /p?q HTTP/1.1\r\nHost: App.localhost:99\r\nX-Forwarded-For: 6.6.6.6\r\nX-Aether-Role: admin\r\n"
            b"Forwarded: for=6.6.6.6\r\nX-Real-IP: 6.6.6.6\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\n"
            b"X-Request-Id: mine\r\nCookie: a=b\r\n\r\n"
        )
        seen = body.decode().split("\r\n")
        assert status == 200
        assert fields[b"x-request-id"] == b"mine"
        assert b"connection" not in fields
        assert seen[0] == "GET /p?q HTTP/1.1"
        assert set(seen[1:-2]) - {seen[-3]} == {
            "Host: App.localhost:99",
            "Cookie: a=b",
            "X-Forwarded-For: 127.0.0.1",
            "X-Forwarded-Proto: http",
            "X-Forwarded-Host: App.localhost:99",
            "X-Request-Id: mine",
        }
        assert seen[-3].startswith("traceparent: 00-")


async def test_connections_are_reused_on_both_sides_and_recorded() -> None:
    async with Upstream(echo_handler()) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        for _ in range(5):
            assert (await client.ask(GET))[0] == 200
        assert (upstream.connections, run.edge.counters.accepted) == (1, 1)
        records = await run.recorded(5)
        assert {(r.app, r.method, r.status, r.aborted) for r in records} == {("app", b"GET", 200, False)}
        assert all(0 < r.upstream_secs <= r.duration < 5 for r in records)


@pytest.mark.parametrize(
    ("host", "status", "code"),
    [(b"none.localhost", 404, "not_found"), (b"empty.localhost", 503, "service_unavailable")],
)
async def test_hosts_without_anything_behind(host: bytes, status: int, code: str) -> None:
    async with running() as run:
        run.table.route("empty", [])
        client = await run.client()
        for _ in range(2):
            got, fields, body = await client.ask(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
            envelope = json.loads(body)
            assert got == status
            assert envelope["code"] == code
            assert envelope["trace_id"] == fields[b"x-request-id"].decode()
            assert fields[b"content-type"] == b"application/json"
            assert fields.get(b"retry-after") == (b"1" if status == 503 else None)


async def test_trace_id_comes_from_the_traceparent() -> None:
    async with running() as run:
        client = await run.client()
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        field = f"traceparent: 00-{trace}-00f067aa0ba902b7-01\r\n".encode()
        _, fields, body = await client.ask(GET[:-2] + field + b"X-Request-Id: r\r\n\r\n")
        assert json.loads(body)["trace_id"] == trace
        assert fields[b"x-request-id"] == b"r"


async def test_nothing_listens_behind_the_app() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    async with running() as run:
        run.serve("app", port)
        status, _, body = await run.get()
        assert (status, json.loads(body)["code"]) == (502, "bad_gateway")


async def test_a_backend_that_cannot_be_dialled_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        dead = server.getsockname()[1]
    async with Upstream(echo_handler()) as upstream, running() as run:
        run.serve("app", dead, upstream)
        for _ in range(10):
            status, _, body = await run.get("/x")
            assert status == 200
        client = await run.client()
        status, _, body = await client.ask(
            b"POST / HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 5\r\n\r\nhello"
        )
        assert (status, body[-5:]) == (200, b"hello")


async def test_bodies_by_length_and_chunks() -> None:
    async with Upstream(echo_handler()) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        head = b"POST / HTTP/1.1\r\nHost: app.localhost\r\n"
        _, _, body = await client.ask(head + b"Content-Length: 5\r\n\r\nhello")
        assert body.endswith(b"\r\n\r\nhello")
        await client.send(head + b"Transfer-Encoding: chunked\r\n\r\n3;ext=1\r\nhel\r\n")
        _, _, body = await client.ask(b"2\r\nlo\r\n0\r\nX-Trailer: 1\r\n\r\n")
        assert body.endswith(b"\r\n\r\nhello")
        assert b"Trailer" not in body
        _, _, body = await client.ask(head + b"Content-Length: 0\r\n\r\n")
        assert b"Content-Length: 0\r\n" in body


async def test_answers_without_a_body_and_of_every_framing() -> None:
    answers = {
        "/204": b"HTTP/1.1 204 No Content\r\nContent-Length: 9\r\n\r\n",
        "/304": b"HTTP/1.1 304 Not Modified\r\nETag: x\r\nContent-Length: 9\r\n\r\n",
        "/chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nhel\r\n2\r\nlo\r\n0\r\nT:\r\n\r\n",
        "/close": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello",
        "/old": b"HTTP/1.0 200 OK\r\n\r\nhello",
        "/early": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        "/empty": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    }

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, _ = await read_request(reader)
            path = head.split(b" ")[1].decode()
            writer.write(
                answers[path] if not head.startswith(b"HEAD") else b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
            )
            await writer.drain()
            if path in ("/close", "/old") and not head.startswith(b"HEAD"):
                return

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()

        def ask(path: str, method: str = "GET", version: str = "1.1", fields: str = "") -> bytes:
            return f"{method} {path} HTTP/{version}\r\nHost: app.localhost\r\n{fields}\r\n".encode()

        for _ in range(2):
            status, fields, _ = await client.ask(ask("/204"))
            assert (status, b"content-length" in fields) == (204, False)
            status, fields, _ = await client.ask(ask("/304"))
            assert (status, fields[b"content-length"]) == (304, b"9")
            for path in ("/chunked", "/close", "/old"):
                status, fields, body = await client.ask(ask(path))
                assert (status, fields[b"transfer-encoding"], body) == (200, b"chunked", b"hello")
                assert b"connection" not in fields
            assert (await client.ask(ask("/empty")))[2] == b""
            await client.send(ask("/chunked", "HEAD"))
            status, fields, _ = await client.answer(bodyless=True)
            assert (status, fields[b"content-length"]) == (200, b"5")
            status, fields, _ = await client.ask(ask("/early"))
            assert (status, fields[b"link"]) == (103, b"</a>")
            assert (await client.answer())[2] == b"hello"
        # an HTTP/1.0 client gets no chunks and no early hints
        for path in ("/chunked", "/close", "/early"):
            old = await run.client()
            await old.send(ask(path, version="1.0"))
            answer = await old.rest()
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert answer.endswith(b"\r\n\r\nhello")
            assert b"chunked" not in answer
        old = await run.client()
        for _ in range(2):
            _, fields, body = await old.ask(ask("/early", version="1.0", fields="Connection: keep-alive\r\n"))
            assert (fields[b"connection"], body) == (b"keep-alive", b"hello")


async def test_expect_continue_goes_end_to_end() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await read_head(reader)
        assert b"Expect: 100-continue" in head
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        writer.write(ok(await reader.readexactly(5)))
        head = await read_head(reader)
        writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno")
        await writer.drain()
        await reader.read()

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        head = b"PUT / HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
        assert (await client.ask(head))[0] == 100
        assert (await client.ask(b"hello"))[2] == b"hello"
        # a refusal ends the connection: whether the body still comes cannot be known
        status, fields, body = await client.ask(head)
        assert (status, body) == (401, b"no")
        assert fields[b"connection"] == b"close"
        assert await client.rest() == b""


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with Upstream(echo_handler()) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        parts = [
            b"GET /%d HTTP/1.1\r\nHost: app.localhost\r\n\r\n" % n
            if n % 3
            else b"POST /%d HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 3\r\n\r\nabc" % n
            for n in range(200)
        ]
        await client.send(b"".join(parts) + GET[:20])
        for number in range(200):
            _, _, body = await client.answer()
            assert body.split(b" ")[1] == b"/%d" % number
        assert (await client.ask(GET[20:]))[0] == 200
        assert upstream.connections == 1


async def test_pipelining_stops_at_a_close() -> None:
    async with Upstream(echo_handler()) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        await client.send(GET[:-2] + b"Connection: close\r\n\r\n" + GET)
        status, fields, _ = await client.answer()
        assert (status, fields[b"connection"]) == (200, b"close")
        assert await client.rest() == b""
        assert len(await run.recorded(1)) == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"POST / HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc" + GET,
        b"POST / HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc" + GET,
        b"POST / HTTP/1.1\r\nHost: app.localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + GET,
        b"POST / HTTP/1.1\r\nHost: app.localhost\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + GET,
        b"POST / HTTP/1.1\r\nHost: app.localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n" + GET,
        b"POST / HTTP/1.1\r\nHost: app.localhost\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n" + GET,
        b"GET / HTTP/1.1\r\n\r\n" + GET,
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" + GET,
        b"\x00\x01\x02" + GET,
    ],
)
async def test_smuggling_is_refused_and_the_connection_closed(raw: bytes) -> None:
    async with Upstream(echo_handler()) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        status, fields, body = await client.ask(raw)
        assert (status, fields[b"connection"]) == (400, b"close")
        assert json.loads(body)["code"] == "bad_request"
        assert await client.rest() == b""
        assert upstream.connections == 0


async def test_a_coding_that_breaks_midway_ends_the_request() -> None:
    async with Upstream(echo_handler()) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        await client.send(
            b"POST / HTTP/1.1\r\nHost: app.localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
        )
        await until(lambda: upstream.connections == 1)
        status, _, _ = await client.ask(b"zz\r\n" + GET)
        assert status == 400
        assert await client.rest() == b""
        await until(lambda: not upstream.open)


async def test_body_limit_by_length_and_by_count() -> None:
    async with Upstream(echo_handler()) as upstream, running(EdgeOptions(max_body_bytes=10)) as run:
        run.serve("app", upstream)
        head = b"POST / HTTP/1.1\r\nHost: app.localhost\r\n"
        client = await run.client()
        status, _, body = await client.ask(head + b"Content-Length: 11\r\n\r\n")
        assert (status, json.loads(body)["code"]) == (413, "payload_too_large")
        assert await client.rest() == b""
        client = await run.client()
        await client.send(head + b"Transfer-Encoding: chunked\r\n\r\n6\r\nabcdef\r\n")
        status, _, _ = await client.ask(b"6\r\nabcdef\r\n")
        assert status == 413
        client = await run.client()
        assert (await client.ask(head + b"Content-Length: 10\r\n\r\n0123456789"))[0] == 200


async def test_the_api_is_reached_by_its_names_over_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    async with Upstream(echo_handler(), unix=path), running() as run:
        run.table.set_api(["localhost", "127.0.0.1"], path)
        for host in ("localhost:8080", "127.0.0.1", "LOCALHOST"):
            status, _, body = await run.get("/apps", host)
            assert (status, body.split(b" ")[1]) == (200, b"/apps")
        assert (await run.recorded(3))[0].app is None
        assert (await run.get("/", "app.localhost"))[0] == 404


async def test_port_in_use_and_given_sockets() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        edge = Edge(RouteTable())
        with pytest.raises(OSError, match="in use"):
            await edge.start("127.0.0.1", taken.getsockname()[1])
        await edge.close(0)
    sock = socket.create_server(("127.0.0.1", 0))
    edge = Edge(RouteTable())
    assert await edge.start(sockets=[sock]) == sock.getsockname()[1]
    await edge.close(0)
    await edge.close(0)


async def test_too_many_connections_are_told_so() -> None:
    async with running(EdgeOptions(max_connections=2)) as run:
        first, second = await run.client(), await run.client()
        await until(lambda: run.edge.open_connections == 2)
        third = await run.client()
        status, fields, _ = await third.answer()
        assert (status, fields[b"retry-after"], fields[b"connection"]) == (503, b"1", b"close")
        first.writer.close()
        third.writer.close()
        await until(lambda: run.edge.open_connections == 1)
        run.table.route("app", [])
        assert (await run.get())[0] == 503
        del second


async def test_close_finishes_what_is_under_way() -> None:
    go = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n")
        await go.wait()
        writer.write(b"2\r\nlo\r\n0\r\n\r\n")
        await writer.drain()
        await reader.read()

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        idle, busy = await run.client(), await run.client()
        await busy.send(GET)
        head = await read_head(busy.reader)
        assert b"chunked" in head
        closing = asyncio.create_task(run.edge.close(10))
        assert await idle.rest() == b""
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", run.port)
        go.set()
        assert await read_chunked(busy.reader) == b"hello"
        assert await busy.rest() == b""
        await closing
        assert run.edge.open_connections == 0


async def test_close_drops_what_does_not_end() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        await client.send(GET)
        await until(lambda: upstream.connections == 1)
        await run.edge.close(0.05)
        assert await client.rest() in (b"", b"(reset)")
        await until(lambda: not upstream.open)


async def test_instances_are_dialled_only_when_needed() -> None:
    async with Upstream(echo_handler()) as upstream, running() as run:
        instance = PortInstance(upstream.port)
        run.serve("app", instance)
        assert instance.dials == 0
        await asyncio.gather(*(run.get() for _ in range(8)))
        assert 1 <= instance.dials <= 8
        dials = instance.dials
        for _ in range(5):
            await run.get()
        assert instance.dials == dials


async def test_what_is_said_of_an_upload_reaches_the_api_and_no_app(tmp_path: Path) -> None:
    said = (
        b"X-Aether-Artifact-Digest: d\r\nx-aether-signature: s\r\nX-Aether-App: a\r\nX-Aether-Runtime: r\r\n"
        b"X_Aether_App: b\r\nX-Aether-Role: admin\r\nContent-Length: 0\r\n\r\n"
    )
    names = {"x-aether-artifact-digest", "x-aether-signature", "x-aether-app", "x-aether-runtime"}
    path = tmp_path / "api.sock"
    async with Upstream(echo_handler()) as upstream, Upstream(echo_handler(), unix=path), running() as run:
        run.serve("app", upstream)
        run.table.set_api(["localhost"], path)
        client = await run.client()
        for host, passed in ((b"app.localhost", set[str]()), (b"localhost", names), (b"app.localhost", set[str]())):
            status, _, body = await client.ask(b"POST / HTTP/1.1\r\nHost: " + host + b"\r\n" + said)
            assert status == 200
            seen = {line.partition(":")[0].lower() for line in body.decode().split("\r\n")}
            assert {name for name in seen if "aether" in name} == passed
