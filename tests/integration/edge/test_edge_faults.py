"""The edge when one side misbehaves: dead and slow upstreams, slow and vanishing clients, swaps under load."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from aether.edge.options import EdgeOptions
from support.edge import (
    LIMIT_SECS,
    Client,
    PortInstance,
    Upstream,
    echo_handler,
    ok,
    read_head,
    read_request,
    running,
    until,
)

GET = b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 2\r\n\r\nhi"


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reads and never answers."""
    await reader.read(100_000)
    await reader.read()


@pytest.mark.parametrize("request_bytes", [GET, POST])
async def test_upstream_that_closes_without_an_answer(request_bytes: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        for _ in range(2):
            status, _, body = await client.ask(request_bytes)
            assert (status, json.loads(body)["code"]) == (502, "bad_gateway")
        assert upstream.connections == 2  # a fresh connection is not tried again


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA\x00: b\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000,
        b"HTTP/1.1 102 Processing\r\n\r\n" * 50,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_upstream_that_talks_nonsense(answer: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer)
        await writer.drain()
        await reader.read()

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        status = 102
        await client.send(GET)
        while status == 102:
            status, _, body = await client.answer()
        assert (status, json.loads(body)["code"]) == (502, "bad_gateway")
        await until(lambda: not upstream.open)


@pytest.mark.parametrize(
    ("head", "version"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhel", b"1.1"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n", b"1.1"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\nzz", b"1.1"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n", b"1.0"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhel", b"1.0"),
    ],
)
async def test_an_answer_cut_short_is_never_ended_cleanly(head: bytes, version: bytes) -> None:
    die = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(head)
        await die.wait()
        writer.transport.abort()

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        await client.send(GET.replace(b"1.1", version) if version == b"1.0" else GET)
        answer = await read_head(client.reader)
        die.set()
        rest = await client.rest()
        assert b"0\r\n\r\n" not in rest
        assert not rest.endswith(b"0\r\n\r\n")
        if version == b"1.0" and b"Content-Length" not in answer:
            assert rest == b"(reset)"
        assert (await run.recorded(1))[0].aborted


async def test_no_answer_in_time() -> None:
    async with Upstream(hang) as upstream, running(EdgeOptions(upstream_timeout_secs=0.1)) as run:
        run.serve("app", upstream)
        client = await run.client()
        status, _, body = await client.ask(GET)
        assert (status, json.loads(body)["code"]) == (504, "gateway_timeout")
        await until(lambda: not upstream.open)
        assert (await client.ask(GET))[0] == 504  # and the client connection goes on


async def test_no_connection_in_time() -> None:
    class Unreachable(PortInstance):
        async def dial(self) -> None:
            await asyncio.Event().wait()

    async with running(EdgeOptions(connect_timeout_secs=0.05)) as run:
        run.serve("app", Unreachable(1))
        assert (await run.get())[0] == 504


async def test_a_driver_that_breaks_its_promise(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(PortInstance):
        async def dial(self) -> None:
            raise ValueError("driver bug")

    async with running() as run:
        (instance,) = run.serve("app", Broken(1))
        assert (await run.get())[0] == 502
        assert "driver bug" in caplog.text
        route = run.table.find(b"app.localhost")
        assert route is not None
        assert [backend.in_flight for backend in route.backends] == [0]
        del instance


async def test_silence_within_an_answer_ends_it_and_flow_does_not() -> None:
    more = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, _ = await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        if b"/silent" not in head:
            for number in range(12):
                writer.write(b"data: %d\n\n" % number)
                await writer.drain()
                await asyncio.sleep(0.05)
            return
        await more.wait()

    options = EdgeOptions(stream_idle_secs=0.25, upstream_timeout_secs=0.25, idle_timeout_secs=0.25)
    async with Upstream(handle) as upstream, running(options) as run:
        run.serve("app", upstream)
        _, _, body = await run.get("/flow")
        assert body.endswith(b"data: 11\n\n")
        client = await run.client()
        await client.send(b"GET /silent HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
        await read_head(client.reader)
        assert b"0\r\n\r\n" not in await client.rest()


async def test_slow_heads_are_ended_and_do_not_hinder_others() -> None:
    options = EdgeOptions(header_timeout_secs=0.3, linger_secs=5)
    async with Upstream(echo_handler()) as upstream, running(options) as run:
        run.serve("app", upstream)
        slow = [await run.client() for _ in range(50)]

        async def drip(client: Client) -> bytes:
            try:
                for byte in GET[:-3]:
                    await client.send(bytes([byte]))
                    await asyncio.sleep(0.02)
            except ConnectionError:
                pass
            return await client.rest()

        drips = asyncio.gather(*(drip(client) for client in slow))
        while not drips.done():
            assert (await run.get())[0] == 200
            await asyncio.sleep(0.02)
        answers = await drips
        assert sum(answer.startswith(b"HTTP/1.1 408 ") for answer in answers) >= 45
        assert run.edge.counters.errors[408] == 50
        assert upstream.connections < 10


async def test_a_refused_client_that_goes_on_dripping_is_dropped() -> None:
    async with running(EdgeOptions(header_timeout_secs=0.1, linger_secs=0.2)) as run:
        client = await run.client()
        await client.send(b"GET / HTTP/1.1\r\nX: ")
        status, _, _ = await client.answer()
        assert status == 408
        async with asyncio.timeout(LIMIT_SECS):
            while run.edge.counters.connections:
                with contextlib.suppress(ConnectionError):
                    await client.send(b"x")
                await asyncio.sleep(0.02)


async def test_slow_bodies_and_idle_connections_are_ended() -> None:
    async with Upstream(hang) as upstream, running(EdgeOptions(idle_timeout_secs=0.1)) as run:
        run.serve("app", upstream)
        idle = await run.client()
        client = await run.client()
        await client.send(b"POST / HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 20\r\n\r\nab")
        status, _, _ = await client.answer()
        assert status == 408
        assert await client.rest() == b""
        assert await idle.rest() in (b"", b"(reset)")
        await until(lambda: not upstream.open)


async def test_a_client_that_leaves_ends_the_upstream_request() -> None:
    async with Upstream(hang) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        await client.send(GET)
        await until(lambda: upstream.connections == 1)
        client.writer.close()
        await until(lambda: not upstream.open)
        assert [(r.status, r.aborted) for r in await run.recorded(1)] == [(499, True)]


async def test_a_client_that_leaves_while_dialling() -> None:
    dialled = asyncio.Event()

    class Slow(PortInstance):
        async def dial(self) -> None:
            dialled.set()
            await asyncio.Event().wait()

    async with running() as run:
        run.serve("app", Slow(1))
        client = await run.client()
        await client.send(GET)
        await dialled.wait()
        client.writer.close()
        assert (await run.recorded(1))[0].status == 499
        route = run.table.find(b"app.localhost")
        assert route is not None
        assert route.backends[0].in_flight == 0


async def closing_after_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Promises keep-alive and closes when the second request comes: what a server's idle time-out looks like."""
    await read_request(reader)
    writer.write(ok())
    await writer.drain()
    await read_head(reader)


async def test_a_stale_connection_is_replaced_for_idempotent_requests_only() -> None:
    async with Upstream(closing_after_one) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        for _ in range(5):
            assert (await client.ask(GET))[0] == 200
        assert run.edge.counters.retries == 4
        # whether the app has acted on this one cannot be known
        status, _, _ = await client.ask(POST)
        assert status == 502
        assert run.edge.counters.retries == 4


async def test_a_connection_known_to_be_closed_is_not_used_for_a_post() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(ok())
        await writer.drain()

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        for number in range(20):
            assert (await client.ask(POST))[0] == 200
            await until(lambda n=number: len(upstream.open) == 0 and upstream.connections == n + 1)


async def test_pooled_connections_are_closed_before_the_upstream_would() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(ok(extra=b"Keep-Alive: timeout=1\r\n"))

    async with Upstream(handle) as upstream, running(EdgeOptions(pool_idle_secs=0.1)) as run:
        run.serve("app", upstream)
        assert (await run.get())[0] == 200
        assert len(upstream.open) == 1
        await until(lambda: not upstream.open)


async def test_surplus_bytes_after_an_answer_never_reach_another_request() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(ok(b"ok") + ok(b"forged"))
        await writer.drain()
        await reader.read()

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        for number in range(3):
            assert (await client.ask(GET))[2] == b"ok"
            assert upstream.connections == number + 1


async def test_an_answer_before_the_end_of_the_upload() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
        await writer.drain()

    async with Upstream(handle) as upstream, running() as run:
        run.serve("app", upstream)
        client = await run.client()
        await client.send(b"POST / HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 3000000\r\n\r\n")
        status, fields, body = await client.answer()
        assert (status, fields[b"connection"], body) == (413, b"close", b"big")
        # what the client is still sending is taken in for a while, so that it can read the answer
        await client.send(b"x" * 1_000_000)
        assert await client.rest() == b""


async def test_swap_under_load_fails_no_request() -> None:
    async with running() as run:
        stop = False
        failures: list[object] = []
        done = 0

        async def load(number: int) -> None:
            nonlocal done
            client = await run.client()
            while not stop:
                try:
                    if number % 2:
                        status, _, body = await client.ask(POST)
                    else:
                        status, _, body = await client.ask(GET)
                except (OSError, asyncio.IncompleteReadError) as error:
                    failures.append(error)
                    return
                if status != 200:
                    failures.append((status, body))
                done += 1
                if number % 8 == 0:
                    client.writer.close()
                    client = await run.client()

        current = await Upstream(echo_handler(b"v0 ")).__aenter__()
        run.serve("app", current)
        clients = [asyncio.create_task(load(number)) for number in range(16)]
        for version in range(1, 12):
            before = done
            await until(lambda b=before: done >= b + 60 or bool(failures))
            following = await Upstream(echo_handler(b"v%d " % version)).__aenter__()
            old_route = run.table.find(b"app.localhost")
            assert old_route is not None
            old = old_route.backends
            run.serve("app", following)
            assert all([await backend.drain(5) for backend in old])
            # drained: nothing can be under way, so taking it away hurts nobody
            await current.__aexit__()
            current = following
            assert b"v%d " % version in (await run.get())[2]
        stop = True
        await asyncio.gather(*clients)
        await current.__aexit__()
        assert failures == []
        assert done > 600


async def test_drain_lets_a_long_answer_end() -> None:
    go = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
        await go.wait()
        writer.write(b"cd")
        await writer.drain()
        await reader.read()

    async with Upstream(handle) as old, Upstream(echo_handler(b"new ")) as new, running() as run:
        run.serve("app", old)
        route = run.table.find(b"app.localhost")
        assert route is not None
        (backend,) = route.backends
        client = await run.client()
        await client.send(GET)
        await until(lambda: backend.in_flight == 1)
        run.serve("app", new)
        assert not await backend.drain(0.05)
        assert (await run.get())[2].startswith(b"new ")
        go.set()
        assert await backend.drain(5)
        assert (await client.answer())[2] == b"abcd"
        assert (await client.ask(GET))[2].startswith(b"new ")
        await until(lambda: not old.open)


async def test_a_request_waiting_for_a_vanished_backend_goes_to_its_successor() -> None:
    dialled = asyncio.Event()
    vanish = asyncio.Event()

    class Vanishing(PortInstance):
        async def dial(self) -> None:
            dialled.set()
            await vanish.wait()
            raise ConnectionRefusedError

    async with Upstream(echo_handler(b"new ")) as new, running() as run:
        run.serve("app", Vanishing(1))
        client = await run.client()
        await client.send(POST)
        await dialled.wait()
        run.serve("app", new)
        vanish.set()
        status, _, body = await client.answer()
        assert (status, body[:4], body[-2:]) == (200, b"new ", b"hi")
