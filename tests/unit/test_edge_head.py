"""Request and response heads: what is accepted, what is refused, and that a second parser agrees."""

from __future__ import annotations

import re

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.edge.head import HEAD_END, HeadError, RequestHead, ResponseHead, parse_request, parse_response

OK = b"GET / HTTP/1.1\r\nHost: a.localhost\r\n"

SMUGGLING = {
    "both lengths": OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
    "both lengths, other order": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
    "differing lengths": OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n",
    "repeated length": OK + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\n",
    "length list": OK + b"Content-Length: 3, 3\r\n\r\n",
    "negative length": OK + b"Content-Length: -1\r\n\r\n",
    "signed length": OK + b"Content-Length: +1\r\n\r\n",
    "hexadecimal length": OK + b"Content-Length: 0x10\r\n\r\n",
    "empty length": OK + b"Content-Length: \r\n\r\n",
    "length with underscore": OK + b"Content-Length: 1_0\r\n\r\n",
    "superscript length": OK + b"Content-Length: \xb2\r\n\r\n",
    "length beyond 64 bits": OK + b"Content-Length: 99999999999999999999\r\n\r\n",
    "coding identity": OK + b"Transfer-Encoding: identity\r\n\r\n",
    "coding list": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    "coding twice in a list": OK + b"Transfer-Encoding: chunked, chunked\r\n\r\n",
    "coding twice": OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    "coding then identity": OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n",
    "coding with parameter": OK + b"Transfer-Encoding: chunked;q=1\r\n\r\n",
    "coding with vertical tab": OK + b"Transfer-Encoding: \x0bchunked\r\n\r\n",
    "coding quoted": OK + b'Transfer-Encoding: "chunked"\r\n\r\n',
    "coding empty": OK + b"Transfer-Encoding:\r\n\r\n",
    "coding with non-ASCII letter": OK + b"Transfer-Encoding: chun\xe2\x84\xaaed\r\n\r\n",
    "coding in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    "space before colon": OK + b"Transfer-Encoding : chunked\r\n\r\n",
    "tab before colon": OK + b"Content-Length\t: 3\r\n\r\n",
    "space in name": OK + b"Content Length: 3\r\n\r\n",
    "space before first name": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "folded field": OK + b"X-A: b\r\n c\r\n\r\n",
    "folded coding": OK + b"Transfer-Encoding:\r\n chunked\r\n\r\n",
    "bare LF between fields": OK + b"X-A: b\nTransfer-Encoding: chunked\r\n\r\n",
    "bare CR between fields": OK + b"X-A: b\rTransfer-Encoding: chunked\r\n\r\n",
    "bare CR before CRLF": OK + b"X-A: b\r\r\n\r\n",
    "bare LF after the request line": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    "bare LF, empty line": b"GET / HTTP/1.1\r\nHost: a\n\n\r\n\r\n",
    "NUL in value": OK + b"X-A: b\x00c\r\n\r\n",
    "NUL in name": OK + b"X-\x00A: b\r\n\r\n",
    "control byte in value": OK + b"X-A: b\x01\r\n\r\n",
    "escape in value": OK + b"X-A: \x1b[2J\r\n\r\n",
    "DEL in value": OK + b"X-A: \x7f\r\n\r\n",
    "control byte in name": OK + b"X\x08: b\r\n\r\n",
    "high byte in name": OK + b"X\xe9: b\r\n\r\n",
    "empty name": OK + b": b\r\n\r\n",
    "no colon": OK + b"nothing\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\nX-A: b\r\n\r\n",
    "no field at all": b"GET / HTTP/1.1\r\n\r\n",
    "no host in HTTP/1.0": b"GET / HTTP/1.0\r\n\r\n",
    "two hosts": OK + b"Host: b.localhost\r\n\r\n",
    "same host twice": OK + b"Host: a.localhost\r\n\r\n",
    "empty host": b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
    "host list": b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n",
    "host with path": b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "host with user": b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n",
    "host with space": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "host with bad port": b"GET / HTTP/1.1\r\nHost: a:b\r\n\r\n",
    "host with high byte": b"GET / HTTP/1.1\r\nHost: \xe9.localhost\r\n\r\n",
    "absolute form with user": b"GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute form without host": b"GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute form, other scheme": b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "authority form": b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n",
    "CONNECT to a URL": b"CONNECT http://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "asterisk without OPTIONS": b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
    "relative target": b"GET x HTTP/1.1\r\nHost: a\r\n\r\n",
    "space in target": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "tab in request line": b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "two spaces": b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "control byte in target": b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
    "high byte in target": b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    "trailing space": b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
    "HTTP/0.9": b"GET /\r\nHost: a\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\nHost: a\r\n\r\n",
    "lower-case version": b"GET / http/1.1\r\nHost: a\r\n\r\n",
    "other protocol": b"GET / RTSP/1.1\r\nHost: a\r\n\r\n",
    "method with colon": b"GE:T / HTTP/1.1\r\nHost: a\r\n\r\n",
}


def request(raw: bytes) -> RequestHead:
    return parse_request(raw, raw.index(HEAD_END))


def response(raw: bytes) -> ResponseHead:
    return parse_response(raw[: raw.index(HEAD_END)])


@pytest.mark.parametrize("raw", SMUGGLING.values(), ids=SMUGGLING.keys())
def test_ambiguous_heads_are_refused_each_time(raw: bytes) -> None:
    for _ in range(2):  # a refused line must not be remembered as a good one
        with pytest.raises(HeadError):
            request(raw)


def test_plain_head() -> None:
    head = request(b"POST /x?y=1 HTTP/1.1\r\nhOsT:\t a.localhost:80 \r\nContent-Length: 007\r\nAccept: */*\r\n\r\n")
    assert (head.method, head.target, head.host, head.content_length) == (b"POST", b"/x?y=1", b"a.localhost:80", 7)
    assert head.lines == [b"Content-Length: 007", b"Accept: */*"]
    assert head.keep_alive


@pytest.mark.parametrize(
    ("line", "connection", "kept"),
    [
        (b"HTTP/1.1", b"", True),
        (b"HTTP/1.1", b"Connection: keep-alive\r\n", True),
        (b"HTTP/1.1", b"Connection: Close\r\n", False),
        (b"HTTP/1.1", b"Connection: keep-alive\r\nConnection: x, close\r\n", False),
        (b"HTTP/1.0", b"", False),
        (b"HTTP/1.0", b"Connection: keep-alive\r\n", True),
        (b"HTTP/1.0", b"Connection: Keep-Alive\r\n", True),
        (b"HTTP/1.0", b"Connection: keep-alive, close\r\n", False),
    ],
)
def test_keep_alive(line: bytes, connection: bytes, kept: bool) -> None:
    assert request(b"GET / " + line + b"\r\nHost: a\r\n" + connection + b"\r\n").keep_alive is kept


def test_hop_by_hop_and_owned_fields_do_not_pass() -> None:
    head = request(
        OK + b"Connection: close, X-Hop, host, accept\r\nX-Hop: 1\r\nKeep-Alive: 3\r\nTE: trailers\r\nTrailer: a\r\n"
        b"Proxy-Authorization: x\r\nProxy-Connection: x\r\nUpgrade: websocket\r\nForwarded: for=1\r\n"
        b"X-Forwarded-For: 1\r\nX-FORWARDED-Prefix: 1\r\nX-Real-IP: 1\r\nX-Aether-Role: admin\r\n"
        b"X_Forwarded_For: 1\r\nX_Aether-Role: 1\r\nContent_Length: 5\r\nTransfer_Encoding: chunked\r\n"
        b"HTTP2-Settings: x\r\nAccept: 1\r\nX-Kept: 1\r\nmy_field: 1\r\n\r\n"
    )
    assert head.lines == [b"X-Kept: 1", b"my_field: 1"]
    assert head.host == b"a.localhost"
    assert head.upgrade == b""


@pytest.mark.parametrize(
    ("fields", "upgrade"),
    [
        (b"Connection: Upgrade\r\nUpgrade: websocket\r\n", b"websocket"),
        (b"Connection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n", b"WebSocket"),
        (b"Upgrade: websocket\r\n", b""),
        (b"Connection: Upgrade\r\n", b""),
        (b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n", b""),
        (b"Connection: Upgrade\r\nUpgrade: websocket, H2C\r\n", b""),
        (b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 3\r\n", b""),
        (b"Connection: Upgrade\r\nUpgrade: websocket\r\nTransfer-Encoding: chunked\r\n", b""),
    ],
)
def test_upgrade(fields: bytes, upgrade: bytes) -> None:
    assert request(OK + fields + b"\r\n").upgrade == upgrade


@pytest.mark.parametrize(
    ("first", "target", "host"),
    [
        (b"GET http://B.localhost:8080/x?y HTTP/1.1", b"/x?y", b"B.localhost:8080"),
        (b"GET HTTP://b.localhost HTTP/1.1", b"/", b"b.localhost"),
        (b"GET https://b.localhost?q HTTP/1.1", b"/?q", b"b.localhost"),
        (b"OPTIONS * HTTP/1.1", b"*", b"a"),
        (b"GET //double HTTP/1.1", b"//double", b"a"),
    ],
)
def test_target_forms(first: bytes, target: bytes, host: bytes) -> None:
    head = request(first + b"\r\nHost: a\r\n\r\n")
    assert (head.target, head.host) == (target, host)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        (b"X-Request-Id: abc-1\r\n", b"abc-1"),
        (b"X-Request-Id: " + b"a" * 128 + b"\r\n", b"a" * 128),
        (b"X-Request-Id: " + b"a" * 129 + b"\r\n", b""),
        (b"X-Request-Id: a b\r\n", b""),
        (b"X-Request-Id: \xe9\r\n", b""),
        (b"X-Request-Id:\r\n", b""),
        (b"X-Request-Id: a\r\nX-Request-Id: b\r\n", b""),
    ],
)
def test_request_id_is_kept_only_when_sane(fields: bytes, kept: bytes) -> None:
    head = request(OK + fields + b"\r\n")
    assert head.request_id == kept
    assert head.lines == []


def test_trace_context() -> None:
    good = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    head = request(OK + b"tracestate: a=1\r\ntraceparent: " + good + b"\r\ntracestate: b=2\r\n\r\n")
    assert head.traceparent == good
    assert head.lines == [b"tracestate: a=1,b=2"]
    for bad in (b"00-" + b"0" * 32 + good[35:], good.upper(), b"ff" + good[2:], good + b"-x", b"1"):
        head = request(OK + b"tracestate: a=1\r\ntraceparent: " + bad + b"\r\n\r\n")
        assert head.traceparent == b""
        assert head.lines == []


def test_response_head() -> None:
    head = response(
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5, max=9\r\n"
        b"Content-Length: 3\r\nX-Request-Id: theirs\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n\r\n"
    )
    assert (head.status, head.content_length, head.keep_alive) == (200, 3, True)
    assert head.keep_alive_secs == 5
    assert head.start == b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n"
    assert response(b"HTTP/1.1 200\r\n\r\n").start == b"HTTP/1.1 200 \r\n"
    assert not response(b"HTTP/1.0 200 OK\r\n\r\n").keep_alive
    assert response(b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n\r\n").keep_alive
    assert not response(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").keep_alive


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"HTTP/1.1 200 O\x00K\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\nC: d\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    ],
)
def test_bad_response_heads_are_refused(raw: bytes) -> None:
    with pytest.raises(HeadError):
        response(raw)


def test_forgetting_known_lines_keeps_the_meaning() -> None:
    for number in range(9000):
        head = request(OK + b"X-Number: %d\r\nContent-Length: %d\r\n\r\n" % (number, number))
        assert (head.content_length, head.lines[0]) == (number, b"X-Number: %d" % number)


class _Second:
    """What llhttp makes of a head."""

    def __init__(self) -> None:
        self.fields: list[tuple[bytes, bytes]] = []
        self.url = b""
        self.complete = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self.complete = True


PIECES = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\n",
        b"POST /a?b HTTP/1.1\r\n",
        b"GET / HTTP/1.0\r\n",
        b"Host: a.localhost\r\n",
        b"Host: b",
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b":",
        b"\x00",
        b"\x0b",
        b"Content-Length: 5\r\n",
        b"Content-Length: 05 \r\n",
        b"Content-Length",
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding",
        b"chunked",
        b",",
        b"X-Other: a b\r\n",
        b"Connection: close\r\n",
        b"\xff",
        b"7",
    ]
)


@given(st.one_of(st.lists(PIECES, max_size=12).map(b"".join), st.binary(max_size=60)))
def test_whatever_passes_is_read_the_same_by_a_second_parser(tail: bytes) -> None:
    raw = b"POST / HTTP/1.1\r\nHost: a\r\n" + tail + HEAD_END
    end = raw.index(HEAD_END)
    try:
        head = parse_request(raw, end)
    except HeadError:
        return
    second = _Second()
    try:
        httptools.HttpRequestParser(second).feed_data(raw[: end + 4])
    except httptools.HttpParserUpgrade:
        pass
    assert second.complete
    fields = dict(second.fields)
    assert fields.get(b"host") == head.host
    lengths = [int(value) for name, value in second.fields if name == b"content-length"]
    assert lengths == ([] if head.content_length < 0 else [head.content_length])
    assert (b"transfer-encoding" in fields) is head.chunked


@given(st.lists(st.sampled_from([b"A: 1", b"X-Forwarded-For: 9", b"Connection: a", b"Host: h", b"x_aether_a: 1"])))
def test_no_owned_field_ever_passes(lines: list[bytes]) -> None:
    try:
        head = request(b"GET / HTTP/1.1\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n")
    except HeadError:
        assert lines.count(b"Host: h") != 1
        return
    names = {re.split(rb":", line)[0].lower() for line in head.lines}
    assert names <= {b"a"}
