"""A client connection over a transport in memory: however the bytes are cut, the same goes upstream."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.edge.body import ChunkedDecoder
from aether.edge.downstream import ClientConnection
from aether.edge.head import HEAD_END
from aether.edge.options import EdgeOptions, RequestRecord
from aether.edge.server import Edge
from aether.edge.table import RouteTable
from aether.edge.upstream import UpstreamConnection
from support.edge import PortInstance, Wire, quiet

TRACE = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Setup:
    """An edge whose one backend has one connection that is open already."""

    def __init__(self, options: EdgeOptions | None = None) -> None:
        self.records: list[RequestRecord] = []
        table = RouteTable()
        backend = table.add("a", PortInstance(1))
        table.route("a", [backend])
        edge = Edge(table, options, self.records.append)
        self.upstream = UpstreamConnection(backend, quiet)
        self.upwire = Wire()
        self.upstream.connection_made(self.upwire)  # pyright: ignore
        self.upstream.idle_until = float("inf")
        backend.give(self.upstream, 1)
        self.wire = Wire()
        self.client = ClientConnection(edge)
        self.client.connection_made(self.wire)  # pyright: ignore

    def feed(self, data: bytes, cuts: list[int]) -> None:
        at = 0
        for cut in [*sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]:
            if cut > at and not self.wire.closed:
                self.client.data_received(data[at:cut])
                at = cut


def request(fields: bytes, body: bytes = b"", method: bytes = b"PUT") -> bytes:
    fixed = b"Host: a.localhost\r\nX-Request-Id: r1\r\ntraceparent: " + TRACE + b"\r\n"
    return method + b" /p HTTP/1.1\r\n" + fixed + fields + b"\r\n" + body


FORWARDED = (
    b"X-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Host: a.localhost\r\n"
    b"X-Request-Id: r1\r\ntraceparent: " + TRACE + HEAD_END
)


@given(st.lists(st.integers(0, 400)))
def test_request_with_length_in_any_split(cuts: list[int]) -> None:
    raw = request(b"Accept: x\r\nContent-Length: 11\r\n", b"hello\r\n\r\nyou", b"PUT")
    setup = Setup()
    setup.feed(raw, cuts)
    assert setup.upwire.sent == (
        b"PUT /p HTTP/1.1\r\nHost: a.localhost\r\nAccept: x\r\nContent-Length: 11\r\n"
        + FORWARDED
        + b"hello\r\n\r\nyo"
    )


@given(st.lists(st.integers(0, 400)))
def test_chunked_request_in_any_split(cuts: list[int]) -> None:
    raw = request(b"Transfer-Encoding: chunked\r\n", b"5;x=y\r\nhello\r\n4\r\n\r\n\r\n\r\n0\r\nTrailer: 1\r\n\r\n")
    setup = Setup()
    setup.feed(raw, cuts)
    head, _, coded = setup.upwire.sent.partition(HEAD_END)
    assert head + HEAD_END == (b"PUT /p HTTP/1.1\r\nHost: a.localhost\r\nTransfer-Encoding: chunked\r\n" + FORWARDED)
    decoder = ChunkedDecoder()
    assert decoder.feed(coded) == b"hello\r\n\r\n"
    assert decoder.done
    assert decoder.rest == b""


@given(st.lists(st.integers(0, 400)), st.lists(st.integers(0, 100)))
def test_answer_in_any_split(cuts: list[int], answer_cuts: list[int]) -> None:
    setup = Setup()
    setup.feed(request(b"", method=b"GET"), cuts)
    answer = b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\nX: 1\r\nConnection: x\r\nX: 2\r\n"
    answer += b"Content-Length: 5\r\n\r\nhello"
    at = 0
    for cut in [*sorted({cut % (len(answer) + 1) for cut in answer_cuts}), len(answer)]:
        if cut > at:
            setup.upstream.data_received(answer[at:cut])
            at = cut
    assert setup.wire.sent == (
        b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Request-Id: r1\r\n\r\nhello"
    )
    assert [(r.app, r.status, r.bytes_out, r.aborted) for r in setup.records] == [("a", 200, 5, False)]


@given(
    st.lists(st.sampled_from([b"\n", b"\r", b"\x00", b"\r\n", b"A: b", b" ", b":"]), max_size=8),
    st.lists(st.integers(0, 99)),
)
def test_a_split_never_changes_whether_a_head_is_accepted(tail: list[bytes], cuts: list[int]) -> None:
    raw = b"GET / HTTP/1.1\r\nHost: a.localhost\r\n" + b"".join(tail) + b"\r\n\r\n"

    def status(cuts: list[int]) -> bytes:
        setup = Setup()
        setup.feed(raw, cuts)
        return setup.wire.sent[:13] or setup.upwire.sent[:13]

    assert status(cuts) == status([])


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03",
        b"GET / HTTP/1.1\nHost: a.localhost\n\n",
        b"GET / HTTP/1.1\r\nHost: a.localhost\rX: y",
    ],
)
def test_what_can_never_be_a_head_is_refused_without_waiting(raw: bytes) -> None:
    setup = Setup()
    setup.feed(raw, [])
    assert setup.wire.sent.startswith(b"HTTP/1.1 400 ")
    assert setup.wire.closed


def test_head_limit() -> None:
    for data in (b"GET /" + b"a" * 2000, b"GET /" + b"a" * 2000 + b" HTTP/1.1\r\nHost: a.localhost\r\n\r\n"):
        setup = Setup(EdgeOptions(max_head_bytes=1000))
        setup.feed(data, [])
        assert setup.wire.sent.startswith(b"HTTP/1.1 431 ")
        assert setup.wire.closed


def test_empty_line_before_a_request_is_ignored() -> None:
    setup = Setup()
    setup.feed(b"\r\n" + request(b"", method=b"GET"), list(range(300)))
    assert setup.upwire.sent.startswith(b"GET /p HTTP/1.1\r\n")
