"""Requests to functions at the edge: the way to an instance, its hard limit, the line in front of it, the records."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from aether.edge.functions import FunctionTable
from aether.edge.options import EdgeOptions
from aether.functions.ports import RouteRules, ServingInstance
from aether.model.function_instance import Invocation, StartKind
from aether.topology.edge_metrics import EdgeMetrics
from support.edge import Handler, PortInstance, Running, Upstream, echo_handler, ok, read_request, running, until

HOST = "127.0.0.1"


class Functions:
    """The table of an edge under test, and what it told."""

    def __init__(self, edge: Running) -> None:
        self.edge = edge
        self.table = FunctionTable()
        self.waits: list[str] = []
        self.unreachable: list[str] = []
        self.hung: list[str] = []
        self.drained: list[str] = []
        self.invocations: list[Invocation] = []
        self.table.on_wait = self.waits.append
        self.table.on_unreachable = lambda _, name: self.unreachable.append(name)
        self.table.on_hung = lambda _, name: self.hung.append(name)
        self.table.on_drained = lambda _, name: self.drained.append(name)
        self.table.on_invocation = self.invocations.append
        edge.edge.functions = self.table

    def serve(self, *instances: PortInstance, start: StartKind = StartKind.COLD, **rules: object) -> None:
        known = {"name": "hello", "version": 3, "concurrency": 2, "timeout_secs": 20.0, "wait_secs": 20.0}
        made = RouteRules(**{**known, "max_waiting": 100, **rules})  # type: ignore[arg-type]
        self.table.serve("id-1", made, [_serving(each, start) for each in instances])

    async def get(self, path: str = "/functions/hello/") -> tuple[int, dict[bytes, bytes], bytes]:
        return await self.edge.get(path, HOST)


def _serving(instance: PortInstance, start: StartKind) -> ServingInstance:
    return ServingInstance(instance.spec.instance_id, 3, start, instance.dial)


@asynccontextmanager
async def functions(tmp_path: Path, options: EdgeOptions | None = None) -> AsyncIterator[Functions]:
    async with running(options) as edge:
        edge.edge.on_record = EdgeMetrics().record
        edge.table.set_api([HOST], tmp_path / "api.sock")
        yield Functions(edge)


class Busy:
    """A handler that answers when it is let, and knows how many requests it has at once."""

    def __init__(self, name: bytes = b"") -> None:
        self.name = name
        self.now = self.most = self.total = 0
        self.go = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            self.now += 1
            self.total += 1
            self.most = max(self.most, self.now)
            await self.go.wait()
            self.now -= 1
            writer.write(ok(self.name))
            await writer.drain()


async def test_a_function_sees_the_rest_of_the_path(tmp_path: Path) -> None:
    async with functions(tmp_path) as it, Upstream(echo_handler()) as upstream:
        it.serve(PortInstance(upstream.port))
        for path, seen in (
            ("/functions/hello", b"GET / HTTP/1.1"),
            ("/functions/hello/", b"GET / HTTP/1.1"),
            ("/functions/hello?a=/b", b"GET /?a=/b HTTP/1.1"),
            ("/functions/hello/a/b?c", b"GET /a/b?c HTTP/1.1"),
            ("/functions/id-1//x", b"GET //x HTTP/1.1"),
        ):
            status, _, body = await it.get(path)
            assert (status, body.split(b"\r\n")[0]) == (200, seen)
        client = await it.edge.client()
        status, _, body = await client.ask(
            b"POST /functions/hello/p HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Aether-App: a\r\nContent-Length: 4\r\n\r\nbody"
        )
        assert (status, body.split(b"\r\n")[0]) == (200, b"POST /p HTTP/1.1")
        assert body.endswith(b"body")
        assert b"X-Aether-App" not in body, "what is for the API reaches no function"
        status, _, body = await it.get("/functions/nobody/x")
        assert (status, json.loads(body)["message"]) == (404, "there is no function 'nobody'")
        await until(lambda: len(it.invocations) == 6)
        paths = [(each.path, each.method, each.status, each.version, each.start) for each in it.invocations]
        assert paths[0] == ("/functions/hello", "GET", 200, 3, StartKind.WARM)
        assert paths[2][0] == "/functions/hello"
        assert len(it.invocations) == 6


async def test_no_instance_gets_more_than_its_share_and_all_are_served(tmp_path: Path) -> None:
    busy = [Busy(), Busy()]
    async with functions(tmp_path) as it, Upstream(busy[0]) as one, Upstream(busy[1]) as two:
        it.serve(PortInstance(one.port, "i1"), PortInstance(two.port, "i2"))
        asked = [asyncio.create_task(it.get()) for _ in range(20)]
        await until(lambda: it.table.load("id-1").waiting == 16)
        await until(lambda: (busy[0].now, busy[1].now) == (2, 2))
        assert it.table.load("id-1").in_flight == {"i1": 2, "i2": 2}
        for each in busy:
            each.go.set()
        assert [status for status, _, _ in await asyncio.gather(*asked)] == [200] * 20
        assert max(each.most for each in busy) <= 2
        assert sum(each.total for each in busy) == 20
        assert it.table.load("id-1").waiting == 0
        await until(lambda: len(it.invocations) == 20)
        assert {each.start for each in it.invocations} == {StartKind.WARM}


async def test_a_request_waits_for_the_first_instance(tmp_path: Path) -> None:
    async with functions(tmp_path) as it, Upstream(echo_handler()) as upstream:
        it.serve()
        asked = [asyncio.create_task(it.get()) for _ in range(5)]
        await until(lambda: it.table.load("id-1").waiting == 5)
        assert set(it.waits) == {"id-1"}
        it.serve(PortInstance(upstream.port), start=StartKind.RESTORED)
        assert [status for status, _, _ in await asyncio.gather(*asked)] == [200] * 5
        await it.get()
        await until(lambda: len(it.invocations) == 6)
        starts = [each.start for each in it.invocations]
        assert starts[-1] is StartKind.WARM
        assert starts.count(StartKind.RESTORED) == 2, "those who got the first places"


async def test_who_waits_too_long_is_told_and_a_full_line_refuses(tmp_path: Path) -> None:
    async with functions(tmp_path) as it:
        it.serve(max_waiting=2, wait_secs=0.6)
        late = [asyncio.create_task(it.get()) for _ in range(2)]
        await until(lambda: it.table.load("id-1").waiting == 2)
        status, fields, body = await it.get()
        assert (status, fields[b"retry-after"]) == (503, b"1")
        assert "wait for function hello already" in json.loads(body)["message"]
        assert [status for status, _, _ in await asyncio.gather(*late)] == [504, 504]
        assert it.table.load("id-1").waiting == 0
        it.serve(wait_secs=20.0)
        asked = asyncio.create_task(it.get())
        await until(lambda: it.table.load("id-1").waiting == 1)
        it.table.fail_waiting("id-1", "function hello could not be started: no", 7)
        status, fields, body = await asked
        assert (status, fields[b"retry-after"]) == (503, b"7")
        await until(lambda: len(it.invocations) == 4)
        assert [each.status for each in it.invocations] == [503, 504, 504, 503]
        assert {each.instance_id for each in it.invocations} == {""}


async def test_who_leaves_the_line_takes_no_place(tmp_path: Path) -> None:
    busy = Busy()
    async with functions(tmp_path) as it, Upstream(busy) as upstream:
        it.serve()
        first = await it.edge.client()
        await first.send(b"GET /functions/hello/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await until(lambda: it.table.load("id-1").waiting == 1)
        others = [asyncio.create_task(it.get()) for _ in range(2)]
        await until(lambda: it.table.load("id-1").waiting == 3)
        first.writer.close()
        await until(lambda: it.table.load("id-1").waiting == 2)
        it.serve(PortInstance(upstream.port))
        await until(lambda: busy.now == 2)
        busy.go.set()
        assert [status for status, _, _ in await asyncio.gather(*others)] == [200, 200]
        assert busy.total == 2
        await until(lambda: sorted(each.status for each in it.invocations) == [200, 200, 499])


async def test_who_leaves_just_when_a_place_is_given_leaves_it_to_the_next(tmp_path: Path) -> None:
    async with functions(tmp_path) as it, Upstream(echo_handler()) as upstream:
        it.serve(concurrency=1)
        leaving = [await it.edge.client() for _ in range(10)]
        for client in leaving:
            await client.send(b"GET /functions/hello/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await until(lambda: it.table.load("id-1").waiting == 10)
        staying = asyncio.create_task(it.get())
        await until(lambda: it.table.load("id-1").waiting == 11)
        for client in leaving:
            client.writer.transport.abort()
        it.serve(PortInstance(upstream.port), concurrency=1)
        status, _, _ = await staying
        assert status == 200
        await until(lambda: it.table.load("id-1").in_flight == {"i1": 0})


async def test_an_instance_that_takes_no_connection_is_told_of_and_another_serves(tmp_path: Path) -> None:
    async with functions(tmp_path) as it, Upstream(echo_handler()) as upstream:
        gone = Upstream(echo_handler())
        async with gone:
            port = gone.port
        it.serve(PortInstance(port, "gone"))
        asked = asyncio.create_task(it.get())
        await until(lambda: it.unreachable == ["gone"])
        await until(lambda: it.table.load("id-1").waiting == 1)
        it.serve(PortInstance(upstream.port, "there"))
        assert (await asked)[0] == 200
        await until(lambda: [each.instance_id for each in it.invocations] == ["there"])


async def test_an_instance_that_is_taken_out_finishes_what_it_has(tmp_path: Path) -> None:
    busy = Busy(b"old")
    async with functions(tmp_path) as it, Upstream(busy) as old, Upstream(echo_handler()) as new:
        it.serve(PortInstance(old.port, "old"))
        asked = [asyncio.create_task(it.get()) for _ in range(4)]
        await until(lambda: busy.now == 2)
        it.serve(PortInstance(new.port, "new"))
        assert [(await each)[0] for each in asked[2:]] == [200, 200], "those who waited go to the new one"
        await until(lambda: it.table.load("id-1").in_flight == {"old": 2, "new": 0})
        assert it.drained == []
        busy.go.set()
        assert [(await each)[2] for each in asked[:2]] == [b"old", b"old"]
        await until(lambda: it.drained == ["old"])
        await until(lambda: it.table.load("id-1").in_flight == {"new": 0})


async def test_an_instance_that_comes_back_still_has_its_requests(tmp_path: Path) -> None:
    busy = Busy()
    async with functions(tmp_path) as it, Upstream(busy) as upstream:
        instance = PortInstance(upstream.port)
        it.serve(instance)
        asked = [asyncio.create_task(it.get()) for _ in range(2)]
        await until(lambda: busy.now == 2)
        it.serve()
        third = asyncio.create_task(it.get())
        await until(lambda: it.table.load("id-1").waiting == 1)
        it.serve(instance)
        await asyncio.sleep(0)
        assert it.table.load("id-1").waiting == 1, "it is full"
        busy.go.set()
        assert [status for status, _, _ in await asyncio.gather(*asked, third)] == [200] * 3
        assert busy.most == 2


async def test_a_function_has_a_time_limit_of_its_own(tmp_path: Path) -> None:
    busy = Busy()
    async with functions(tmp_path) as it, Upstream(busy) as upstream:
        it.serve(PortInstance(upstream.port), timeout_secs=0.3)
        status, _, body = await it.get()
        assert (status, json.loads(body)["message"]) == (504, "the function did not answer in time")
        await until(lambda: [each.status for each in it.invocations] == [504])


async def test_an_instance_that_answers_nothing_is_told_of_after_some_calls(tmp_path: Path) -> None:
    async def sometimes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, _ = await read_request(reader)
            if head.startswith(b"GET /own"):
                writer.write(b"HTTP/1.1 504 Gateway Timeout\r\nContent-Length: 0\r\n\r\n")
            elif not head.startswith(b"GET /hang"):
                writer.write(ok())
            await writer.drain()

    async with functions(tmp_path) as it, Upstream(sometimes) as upstream:
        it.serve(PortInstance(upstream.port), timeout_secs=0.2)
        for path in ("hang", "hang", "good", "hang", "hang", "own", "own", "own"):
            await it.get(f"/functions/hello/{path}")
        assert it.hung == [], "it has answered now and then, if only that something else was late"
        for _ in range(3):
            assert (await it.get("/functions/hello/hang"))[0] == 504
        assert it.hung == ["i1"]
        asked = asyncio.create_task(it.get())
        await until(lambda: it.table.load("id-1").waiting == 1)
        it.serve(PortInstance(upstream.port, "i2"))
        assert (await asked)[0] == 200


async def test_what_may_not_be_sent_twice_is_not(tmp_path: Path) -> None:
    heads: list[bytes] = []

    async def once_then_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await read_request(reader))[0])
        if heads[-1].startswith(b"GET /first"):
            writer.write(ok())
            await writer.drain()
            heads.append((await read_request(reader))[0])
        writer.close()

    async with functions(tmp_path) as it, Upstream(once_then_close) as upstream:
        it.serve(PortInstance(upstream.port))
        assert (await it.get("/functions/hello/first"))[0] == 200
        client = await it.edge.client()
        status, _, _ = await client.ask(
            b"POST /functions/hello/ HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\n\r\nx"
        )
        assert status == 502
        assert sum(head.startswith(b"POST") for head in heads) == 1


async def test_streams_and_web_sockets_pass(tmp_path: Path) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, _ = await read_request(reader)
        if b"Upgrade: websocket" in head:
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
            writer.write((await reader.readexactly(4)).upper())
            await writer.drain()
            await reader.read()
            return
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        await writer.drain()
        await read_next.wait()
        writer.write(b"6\r\nsecond\r\n0\r\n\r\n")
        await writer.drain()

    read_next = asyncio.Event()
    handler: Handler = speak
    async with functions(tmp_path) as it, Upstream(handler) as upstream:
        it.serve(PortInstance(upstream.port))
        client = await it.edge.client()
        await client.send(b"GET /functions/hello/s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b"200 OK" in await client.reader.readuntil(b"first")
        assert it.table.load("id-1").in_flight == {"i1": 1}
        read_next.set()
        await client.reader.readuntil(b"0\r\n\r\n")
        client = await it.edge.client()
        await client.send(
            b"GET /functions/hello/ws HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\nping"
        )
        assert (await client.reader.readuntil(b"PING")).startswith(b"HTTP/1.1 101")
        assert it.table.load("id-1").in_flight == {"i1": 1}, "a tunnel is a request under way"
        client.writer.close()
        await until(lambda: it.table.load("id-1").in_flight == {"i1": 0})


async def test_a_function_that_is_dropped_is_unknown(tmp_path: Path) -> None:
    async with functions(tmp_path) as it:
        it.serve()
        asked = asyncio.create_task(it.get())
        await until(lambda: it.table.load("id-1").waiting == 1)
        it.table.drop("id-1")
        assert (await asked)[0] == 404
        assert (await it.get())[0] == 404
        assert (await it.get("/functions/id-1/"))[0] == 404


async def test_requests_under_way_at_a_dropped_function_go_on_and_are_known(tmp_path: Path) -> None:
    busy = Busy()
    async with functions(tmp_path) as it, Upstream(busy) as upstream:
        it.serve(PortInstance(upstream.port))
        asked = asyncio.create_task(it.get())
        await until(lambda: busy.now == 1)
        it.table.drop("id-1")
        assert it.table.load("id-1").in_flight == {"i1": 1}
        busy.go.set()
        assert (await asked)[0] == 200
        await until(lambda: it.drained == ["i1"])
        assert it.table.load("id-1").in_flight == {}


async def test_a_server_that_ends_keeps_nobody_waiting(tmp_path: Path) -> None:
    async with functions(tmp_path) as it:
        it.serve()
        asked = asyncio.create_task(it.get())
        await until(lambda: it.table.load("id-1").waiting == 1)
        async with asyncio.timeout(10):
            await it.edge.edge.close(60)
        status, fields, _ = await asked
        assert (status, fields[b"retry-after"]) == (503, b"5")


async def test_a_thousand_first_requests_make_one_line(tmp_path: Path) -> None:
    names: Sequence[str] = [f"i{number}" for number in range(4)]
    busy = Busy()
    busy.go.set()
    async with functions(tmp_path) as it, Upstream(busy) as upstream:
        it.serve(max_waiting=1000, concurrency=10)
        asked = [asyncio.create_task(it.get()) for _ in range(1000)]
        await until(lambda: it.table.load("id-1").waiting == 1000)
        it.serve(*(PortInstance(upstream.port, name) for name in names), max_waiting=1000, concurrency=10)
        assert {status for status, _, _ in await asyncio.gather(*asked)} == {200}
        assert busy.total == 1000
        before = time.time()
        assert all(before - 100 < each.started_at < before for each in it.invocations)
