"""The short ways of the edge give what the long way gives: remembered requests, known answers, the express lane."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.edge import head
from aether.edge.downstream import ClientConnection
from aether.edge.headers import trace_id
from aether.edge.options import RequestRecord, new_record
from aether.edge.server import Edge
from aether.edge.table import RouteTable
from aether.edge.upstream import UpstreamConnection
from support.edge import PortInstance, Wire, quiet

GET = b"GET /p HTTP/1.1\r\nHost: a.localhost\r\nCookie: s=1\r\n\r\n"
REQUESTS = [
    GET.replace(b"/p", b"/q"),
    GET.replace(b"Cookie: s=1", b"Connection: keep-alive"),
    GET.replace(b"Cookie: s=1", b"Connection: cookie"),
    GET.replace(b"Cookie: s=1", b"Content-Length: 0"),
    GET.replace(b"Cookie: s=1", b"Content-Length: 2") + b"xy",
    GET.replace(b"Cookie: s=1", b"X-Request-Id: mine"),
    GET.replace(b"Cookie: s=1", b"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    GET.replace(b"Cookie: s=1", b"Connection: close"),
    GET.replace(b"HTTP/1.1", b"HTTP/1.0"),
    GET.replace(b"a.localhost", b"b.localhost"),
    GET.replace(b"GET", b"HEAD"),
    GET.replace(b"GET", b"OPTIONS"),
    GET.replace(b"GET", b"POST"),
    b"PUT /p HTTP/1.1\r\nHost: a.localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nxy\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a.localhost\r\nX: \x00\r\n\r\n",
    b"\r\n" + GET,
    GET + GET,
]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: 1\r\n\r\nhello"
ANSWERS = [
    OK,
    OK.replace(b"hello", b"other"),
    OK.replace(b"X: 1", b"X: 2"),
    OK.replace(b"X: 1", b"Connection: x"),
    OK.replace(b"X: 1", b"Keep-Alive: timeout=2"),
    OK.replace(b"X: 1", b"Keep-Alive: timeout=0"),
    OK.replace(b"X: 1", b"Connection: close"),
    OK.replace(b"HTTP/1.1", b"HTTP/1.0"),
    OK.replace(b"5", b"0").removesuffix(b"hello"),
    OK + b"more",
    OK.replace(b"200 OK", b"404 Not Found"),
    OK.replace(b"200 OK", b"304 Not Modified").removesuffix(b"hello"),
    OK.replace(b"200 OK", b"204 No Content").removesuffix(b"hello"),
    OK.replace(b"200 OK", b"304 Not Modified"),
    OK.replace(b"200 OK", b"204 No Content"),
    b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
]


@dataclass(frozen=True)
class Step:
    """A request, the answer to it, where each is cut, and what happens in between."""

    request: bytes = GET
    answer: bytes = OK
    request_cuts: tuple[int, ...] = ()
    answer_cuts: tuple[int, ...] = ()
    client: int = 0
    pause: bool = False
    """The client's send buffer fills before the answer comes."""
    full: bool = False
    """The upstream's send buffer is full when the answer comes."""
    resume: bool = False
    closing: bool = False
    """The edge begins to close before the answer comes."""


cuts = st.lists(st.integers(0, 200), max_size=3).map(tuple)
rarely = st.sampled_from([*[False] * 9, True])


@st.composite
def scripts(draw: st.DrawFn) -> list[Step]:
    """Steps that ask and answer the same few things again and again."""
    requests = [GET, *draw(st.lists(st.sampled_from(REQUESTS), max_size=2))]
    answers = draw(st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=2))
    step = st.builds(
        Step,
        request=st.sampled_from(requests),
        answer=st.sampled_from(answers),
        request_cuts=st.just(()) | rarely.flatmap(lambda cut: cuts if cut else st.just(())),
        answer_cuts=st.just(()) | rarely.flatmap(lambda cut: cuts if cut else st.just(())),
        client=st.sampled_from([0, 0, 1]),
        pause=rarely,
        full=rarely,
        resume=rarely,
        closing=st.sampled_from([*[False] * 20, True]),
    )
    return draw(st.lists(step, min_size=2, max_size=10))


class Soon:
    """A loop that only keeps what is to be called."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def call_soon(self, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def run(self) -> None:
        while self.calls:
            self.calls.pop(0)()


class World:
    """Two client connections, an edge, and a backend with connections enough never to dial; `now` is its clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.records: list[RequestRecord] = []
        table = RouteTable()
        self.table = table
        self.backend = table.add("a", PortInstance(1))
        table.route("a", [self.backend])
        self.edge = Edge(table, None, self.records.append)
        self.loop = Soon()
        self.edge.loop = self.loop  # pyright: ignore
        self.upstreams: list[UpstreamConnection] = []
        self.upwires: list[Wire] = []
        for _ in range(40):
            connection, wire = UpstreamConnection(self.backend, quiet), Wire()
            connection.connection_made(wire)  # pyright: ignore
            connection.idle_until = 1e9
            self.backend.give(connection, 1000)
            self.upstreams.append(connection)
            self.upwires.append(wire)
        self.wires: list[Wire] = []
        self.clients: list[ClientConnection] = []
        for _ in range(2):
            self.wires.append(Wire())
            self.clients.append(ClientConnection(self.edge))
            self.clients[-1].connection_made(self.wires[-1])  # pyright: ignore
        self.wire, self.client = self.wires[0], self.clients[0]

    def clock(self) -> float:
        return self.now

    def play(self, step: Step) -> None:
        client, wire = self.clients[step.client], self.wires[step.client]
        self.now += 0.25
        for part in split(step.request, step.request_cuts):
            if not wire.closed:
                client.data_received(part)
                self.loop.run()
        self.now += 0.5
        if step.pause and not client.write_paused:
            client.pause_writing()
        self.edge.closing = self.edge.closing or step.closing
        for _ in range(2):  # a pipelined request is sent when the one before is answered
            busy = next((one for one in self.upstreams if one.exchange is not None), None)
            if busy is not None and step.full:
                busy.pause_writing()
            for part in split(step.answer, step.answer_cuts):
                if busy is not None and busy.exchange is not None:
                    busy.data_received(part)
            self.loop.run()
        if step.resume and client.write_paused:
            client.resume_writing()
            self.loop.run()

    def seen(self) -> dict[str, Any]:
        """All that anyone outside can notice."""
        return {
            "to the clients": [wire.sent for wire in self.wires],
            "clients": [(wire.closed, wire.paused) for wire in self.wires],
            "to the upstreams": [wire.sent for wire in self.upwires],
            "upstreams": [(wire.closed, wire.paused) for wire in self.upwires],
            "kept until": [(one.idle_until, one.reused, one.closed) for one in self.upstreams],
            "idle": self.backend.idle_connections,
            "in flight": self.backend.in_flight,
            "active": [client.exchange.active for client in self.clients],
            "records": [record._replace(backend=None, trace=trace_id(record.trace)) for record in self.records],
            "counters": self.edge.counters,
        }


def split(data: bytes, at: tuple[int, ...]) -> list[bytes]:
    places = [0, *sorted({cut % (len(data) + 1) for cut in at}), len(data)]
    return [part for one, two in pairwise(places) if (part := data[one:two])]


def zeros(size: int) -> bytes:
    """In the place of random bytes: the same each time, yet no two ids are equal."""
    return b"".join(number.to_bytes(16, "big") for number in range(1, size // 16 + 1)) or b"\1" * size


def played(script: list[Step], *, express_lane: bool) -> World:
    """The world after `script`; without the lane no request counts as plain, so that nothing takes a short way."""
    with ExitStack() as stack:
        world = World()
        stack.enter_context(mock.patch("aether.edge.headers.os.urandom", zeros))
        for module in ("downstream", "exchange", "express", "upstream"):
            stack.enter_context(mock.patch(f"aether.edge.{module}.monotonic", world.clock))
        if not express_lane:
            stack.enter_context(mock.patch.object(head, "_PLAIN", frozenset[bytes]()))
            stack.enter_context(mock.patch("aether.edge.downstream.recall", return_value=None))
        for step in script:
            world.play(step)
    return world


@settings(max_examples=400)
@given(scripts())
def test_short_and_long_ways_give_the_same(script: list[Step]) -> None:
    assert played(script, express_lane=True).seen() == played(script, express_lane=False).seen()


@given(st.lists(st.tuples(cuts, cuts), min_size=2, max_size=6))
def test_any_split_gives_the_same(places: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    whole = played([Step() for _ in places], express_lane=True)
    assert whole.seen() == played([Step(GET, OK, *cut) for cut in places], express_lane=True).seen()
    assert len(whole.records) == len(places)


def events(*parts: bytes, express_lane: bool) -> World:
    """A world that has seen GET and OK, then what client (GET…) and upstream (else) send, each in one read."""
    world = played([Step()], express_lane=express_lane)
    with ExitStack() as stack:
        if not express_lane:
            stack.enter_context(mock.patch.object(head, "_PLAIN", frozenset[bytes]()))
            stack.enter_context(mock.patch("aether.edge.downstream.recall", return_value=None))
        for module in ("downstream", "exchange", "express", "upstream"):
            stack.enter_context(mock.patch(f"aether.edge.{module}.monotonic", world.clock))
        for part in parts:
            busy = next((one for one in world.upstreams if one.exchange is not None), None)
            if part.startswith(b"GET "):
                world.client.data_received(part)
            elif busy is not None:
                busy.data_received(part)
            world.loop.run()
    return world


@pytest.mark.parametrize(
    "parts",
    [
        (GET, OK.replace(b"5", b"%d" % len(OK)).removesuffix(b"hello"), OK),
        (GET, b"HTTP/1.1 200 OK\r\nX: ", OK),
        (GET, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", OK),
        (GET, OK.replace(b"X: 1", b"X: 2")),
        (GET, OK.replace(b"X: 1", b"X:\x00 ")),
        (GET.replace(b"Cookie: s=1", b"Connection: close"), OK),
        (GET.replace(b"GET", b"GET ", 1), OK),
        (b"GET /q HTTP/1.1\r\nX: ", GET, OK),
        (GET, GET, OK, OK),
        (GET, GET, GET, OK, OK, OK),
        (GET + GET, OK, OK),
        (GET, OK + OK),
    ],
    ids=[
        "a known answer within a body",
        "a known answer within a head",
        "a known answer in the place of a chunk",
        "another head as long as the known one",
        "a bad head as long as the known one",
        "the client wants to close",
        "a malformed request",
        "a known request within a head",
        "a known request too early",
        "two known requests too early",
        "a known request twice in one read",
        "a known answer twice in one read",
    ],
)
def test_what_only_looks_known_goes_the_long_way(parts: tuple[bytes, ...]) -> None:
    assert events(*parts, express_lane=True).seen() == events(*parts, express_lane=False).seen()


def test_repeated_requests_take_the_short_ways() -> None:
    world = World()
    world.play(Step())
    with (
        mock.patch("aether.edge.downstream.parse_request", side_effect=AssertionError("parsed again")),
        mock.patch.object(UpstreamConnection, "_take_head", side_effect=AssertionError("the lane was not taken")),
    ):
        for _ in range(3):
            world.play(Step())
        world.play(Step(answer=OK.replace(b"hello", b"other")))
    assert world.wire.sent.count(b"HTTP/1.1 200 OK") == 5
    assert world.wire.sent.endswith(b"other")
    assert {record.status for record in world.records} == {200}


def test_repeated_requests_have_ids_of_their_own() -> None:
    world = World()
    for _ in range(600):
        world.play(Step())
    ids = [record.request_id for record in world.records]
    assert len(set(ids)) == 600
    sent = b"".join(wire.sent for wire in world.upwires)
    for each in ids:
        assert sent.count(b"X-Request-Id: %b\r\ntraceparent: 00-%b-" % (each, each)) == 1
        assert world.wire.sent.count(b"X-Request-Id: %b\r\n" % each) == 1


def test_a_remembered_request_goes_by_the_routes_of_the_moment() -> None:
    world = World()
    world.play(Step())
    other = world.table.add("a", PortInstance(2))
    connection, wire = UpstreamConnection(other, quiet), Wire()
    connection.connection_made(wire)  # pyright: ignore
    connection.idle_until = 1e9
    other.give(connection, 1)
    world.table.route("a", [other])
    world.client.data_received(GET)
    assert wire.sent.startswith(b"GET /p HTTP/1.1\r\n")
    connection.data_received(OK)
    world.table.drop("a")
    world.client.data_received(GET)
    assert [record.status for record in world.records] == [200, 200, 404]


def test_each_backend_has_its_own_known_answer() -> None:
    one, two = World(), World()
    one.play(Step())
    two.play(Step(answer=OK.replace(b"200 OK", b"500 Oh")))
    one.play(Step())
    two.play(Step(answer=OK.replace(b"200 OK", b"500 Oh")))
    assert [record.status for record in one.records + two.records] == [200, 200, 500, 500]


@pytest.mark.parametrize(
    "request_head",
    [
        GET.replace(b"/p", b"/" + b"p" * 5000),
        GET.replace(b"GET", b"POST"),
        GET.replace(b"Cookie: s=1", b"X-Request-Id: mine"),
    ],
    ids=["long", "not safe", "id of its own"],
)
def test_other_requests_are_not_remembered(request_head: bytes) -> None:
    world = World()
    world.play(Step(request_head))
    with mock.patch("aether.edge.downstream.parse_request", wraps=head.parse_request) as parse:
        world.client.data_received(request_head)
    assert parse.call_count == 1


def test_records_are_what_their_class_makes() -> None:
    fields = ("a", b"GET", 200, 0.5, 0.25, 1, 2, b"id", False, b"h", b"/", b"::1", b"trace", None, 3.5)
    record = new_record(RequestRecord, fields)
    assert type(record) is RequestRecord
    assert record == RequestRecord(*fields)
    assert record.bytes_out == 2
