"""A familiar head is read as the grammar would read it, and nothing else is familiar."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.edge import familiar
from aether.edge.downstream import ClientConnection
from aether.edge.familiar import learn, recall
from aether.edge.head import HEAD_END, RequestHead, parse_request
from aether.edge.headers import upstream_start
from aether.edge.lines import HeadError
from aether.edge.options import EdgeOptions
from aether.edge.server import Edge
from aether.edge.table import RouteTable
from support.edge import Wire

HEAD = b"GET /p HTTP/1.1\r\nHost: a.localhost\r\nAccept: */*\r\nCookie: s=1\r\nTE: x\r\nUser-Agent: u\r\n\r\n"
BARE = b"GET /p HTTP/1.1\r\nHost: a.localhost\r\nAccept: */*\r\n\r\n"
FORWARDED = b"X-Forwarded-For: 1\r\nX-Forwarded-Host: "
ODD = st.sampled_from([b"\r\n", b"\n", b"\r", b"\x00", b"\xff", b" ", b":", b"?", b"Cookie: t=2\r\n", b"Host: b\r\n"])


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    familiar._known.clear()  # pyright: ignore
    familiar._twice._marks.clear()  # pyright: ignore


def read(data: bytes) -> RequestHead:
    return parse_request(data, data.index(HEAD_END))


def taught(data: bytes) -> None:
    """`data` as it comes from a client twice."""
    for _ in range(2):
        if len(data) == data.index(HEAD_END) + 4 and (head := read(data)).plain:
            learn(data, head)


def agrees(data: bytes) -> bool:
    """True when `data` is familiar; fails unless the grammar reads it in the same way."""
    found = recall(data, FORWARDED)
    if found is None:
        return False
    assert data.index(HEAD_END) + 4 == len(data)
    head = read(data)
    assert head.plain
    assert found.start == upstream_start(head, FORWARDED)
    for name in set(RequestHead.__annotations__) - {"lines", "start"}:
        assert getattr(found, name) == getattr(head, name), name
    return True


@pytest.mark.parametrize("head", [HEAD, HEAD.replace(b"Cookie: s=", b"authorization: Bearer "), BARE])
def test_another_path_and_credential_are_familiar(head: bytes) -> None:
    assert not agrees(head)
    learn(head, read(head))
    assert not agrees(head), "what came once need not come again"
    learn(head, read(head))
    assert agrees(head)
    assert agrees(head.replace(b"/p", b"//other?a=%20").replace(b"s=1", b"s=2; t=\xff ").replace(b"Bearer 1", b""))
    assert not agrees(head.replace(b"Accept: */*", b"Accept: a/b"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"GET", b"POST"),
        (b"GET", b"OPTIONS"),
        (b"HTTP/1.1", b"HTTP/1.0"),
        (b"/p", b"http://b/p"),
        (b"/p", b"*"),
        (b"/p", b"/p /q"),
        (b"/p", b"/\x80"),
        (b"/p", b"/\x00"),
        (b"/p HTTP/1.1\r\n", b"/p HTTP/1.1\n"),
        (b"s=1", b"s=\x00"),
        (b"s=1", b"s=1\nX: 1"),
        (b"s=1", b"s=1\rX: 1"),
        (b"s=1", b"s=1\r\nTransfer-Encoding: chunked"),
        (b"s=1", b"s=1\r\n folded"),
        (b"Cookie: s=1", b"Cookie : s=1"),
        (b"Cookie: s=1", b"Cookie: s=1\r\nCookie: s=2"),
        (b"Cookie: s=1\r\n", b""),
        (b"Cookie: s=1", b"Host: b"),
        (b"\r\n\r\n", b"\r\n\r\nGET /2 HTTP/1.1\r\n\r\n"),
        (b"\r\n\r\n", b"\r\n"),
    ],
)
def test_other_heads_are_not_familiar(old: bytes, new: bytes) -> None:
    taught(HEAD)
    assert agrees(HEAD)
    assert recall(HEAD.replace(old, new), FORWARDED) is None


@pytest.mark.parametrize(
    "line",
    [
        b"Content-Length: 0",
        b"Cookie: t=2",
        b"COOKIE: t=2",
        b"Authorization: Basic eA==",
        b"authorization:x",
        b"Proxy-Authorization: x",
        b"Connection: cookie",
        b"Connection: close",
        b"X-Request-Id: mine",
        b"Expect: 100-continue",
        b"X: " + b"x" * 1024,
    ],
)
def test_some_heads_are_never_learnt(line: bytes) -> None:
    for head in (HEAD.replace(b"TE: x", line), HEAD.replace(b"Accept: */*", line)):
        taught(head)
        if b"Basic" not in line or head.index(b"Cookie") < head.index(b"Basic"):
            assert recall(head, FORWARDED) is None
    assert b"Basic" not in repr(familiar._known).encode()  # pyright: ignore


def test_credentials_are_not_kept() -> None:
    taught(HEAD)
    assert agrees(HEAD.replace(b"Cookie: s=1", b"Authorization: s=1"))
    taught(BARE)
    assert len(familiar._known) == 2  # pyright: ignore
    assert "s=1" not in repr(familiar._known)  # pyright: ignore


def test_what_is_kept_is_bounded() -> None:
    for number in range(3000):
        taught(HEAD.replace(b"*/*", b"*/%d" % number))
        assert len(familiar._known) <= 1024  # pyright: ignore
    assert agrees(HEAD.replace(b"*/*", b"*/2999"))


LINES = st.lists(
    st.sampled_from(
        [
            b"Accept: */*",
            b"Cookie: s=1",
            b"cookie: s=2",
            b"Authorization: x",
            b"Connection: keep-alive",
            b"Connection: accept",
            b"Connection: cookie",
            b"X-Forwarded-For: 1",
            b"Content-Length: 0",
            b"Upgrade: websocket",
            b"tracestate: a=1",
            b"Expect: nothing",
            b"X:  spaced ",
        ]
    ),
    max_size=5,
)


@settings(max_examples=400)
@given(LINES, st.integers(0, 5), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 3), ODD), max_size=2))
def test_what_is_familiar_is_read_as_the_grammar_reads_it(
    lines: list[bytes], at: int, edits: list[tuple[int, int, bytes]]
) -> None:
    lines.insert(at, b"Host: a.localhost")
    data = b"GET /a HTTP/1.1\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n"
    forget()
    with contextlib.suppress(HeadError):
        taught(data)
    agrees(data)
    agrees(data.replace(b"/a", b'/b?"c"').replace(b"s=1", b"s=3"))
    for place, cut, odd in edits:
        data = data[: place % len(data)] + odd + data[place % len(data) + cut :]
    try:
        read(data)
    except (HeadError, ValueError):
        assert recall(data, FORWARDED) is None
    else:
        agrees(data)


def test_a_familiar_head_keeps_to_the_limit_and_to_its_client() -> None:
    taught(HEAD)
    wire = Wire()
    client = ClientConnection(Edge(RouteTable(), EdgeOptions(max_head_bytes=len(HEAD))))
    client.connection_made(wire)  # pyright: ignore
    client.data_received(HEAD.replace(b"s=1", b"s=1" * 10))
    assert wire.sent.startswith(b"HTTP/1.1 431 ")
    mine, other = recall(HEAD, b"X-Forwarded-For: 1\r\n"), recall(HEAD, b"X-Forwarded-For: 2\r\n")
    assert mine is not None
    assert other is not None
    assert (b"For: 1" in mine.start, b"For: 2" in mine.start) == (True, False)
    assert (b"For: 1" in other.start, b"For: 2" in other.start) == (False, True)


def test_a_client_of_strange_heads_is_asked_of_seldom_and_one_of_familiar_heads_is_not_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wire, calls = Wire(), 0
    client = ClientConnection(Edge(RouteTable()))
    client.connection_made(wire)  # pyright: ignore

    def counted(data: bytes, forwarded: bytes) -> RequestHead | None:
        nonlocal calls
        calls += 1
        return recall(data, forwarded)

    monkeypatch.setattr("aether.edge.downstream.recall", counted)
    for number in range(160):
        client.data_received(HEAD.replace(b"User-Agent: u", b"Referer: /%d" % number))
    assert 16 <= calls <= 32
    for number in range(64):
        client.data_received(HEAD.replace(b"/p", b"/%d" % number))
    calls = 0
    monkeypatch.delattr("aether.edge.downstream.parse_request")
    for number in range(20):
        client.data_received(HEAD.replace(b"/p", b"/x%d" % number))
    assert calls == 20
    assert wire.sent.count(b"HTTP/1.1 404 ") == 244
