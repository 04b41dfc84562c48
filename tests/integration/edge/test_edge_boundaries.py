# ruff: noqa: E501 - one case is one line
"""Requests made to be read in two ways, at the edge in front of real servers: all three must agree on where each begins.

Every case is sent on one connection together with a request for `/canary`. What the servers say they got, in order, is
compared with what the case allows: a request that only one side sees is a smuggled one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from aether.edge.options import EdgeOptions
from support.edge import running

NODE = """
const http = require('http'), seen = [];
const server = http.createServer({ insecureHTTPParser: process.argv[2] === 'lenient' }, (request, response) => {
  let body = '';
  request.setEncoding('latin1').on('data', (part) => { body += part; }).on('end', () => {
    if (request.url === '/__seen') return response.end(JSON.stringify(seen.splice(0)));
    seen.push([request.method, request.url, body]);
    response.end(JSON.stringify([request.method, request.url, body]));
  });
});
// the edge gives up a connection that was to be upgraded, which may arrive as a reset; only what was misread counts
server.on('clientError', (error, socket) => {
  if (error.code !== 'ECONNRESET') seen.push(['CLIENT-ERROR', error.code, '']);
  socket.destroy();
});
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
"""
PYTHON = """
import asyncio, json, socket, sys, uvicorn
seen = []
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    path = scope["raw_path"].decode("latin-1") + ("?" + scope["query_string"].decode() if scope["query_string"] else "")
    entry = [scope["method"], path, body.decode("latin-1")]
    if path == "/__seen":
        answer = json.dumps(seen).encode()
        seen.clear()
    else:
        seen.append(entry)
        answer = json.dumps(entry).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]})
    await send({"type": "http.response.body", "body": answer})
sock = socket.socket()
sock.bind(("127.0.0.1", 0))
print(sock.getsockname()[1], flush=True)
config = uvicorn.Config(app, http=sys.argv[1], log_level="critical", access_log=False)
asyncio.run(uvicorn.Server(config).serve(sockets=[sock]))
"""
KINDS = ("node", "node-lenient", "uvicorn-httptools", "uvicorn-h11")
CANARY = b"GET /canary HTTP/1.1\r\nHost: app.localhost\r\n\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: app.localhost\r\nX: "
HOST = b"Host: app.localhost\r\n"


@dataclass(frozen=True)
class Case:
    """`seen` is what servers may have got of it before the canary; None: it must be refused, and no server hears of it."""

    name: str
    raw: bytes
    seen: tuple[tuple[str, str, str], ...] | None = None


def post(fields: bytes, body: bytes, target: bytes = b"/x", version: bytes = b"1.1") -> bytes:
    return b"POST " + target + b" HTTP/" + version + b"\r\n" + HOST + fields + b"\r\n" + body


def get(fields: bytes = b"", target: bytes = b"/x") -> bytes:
    return b"GET " + target + b" HTTP/1.1\r\n" + HOST + fields + b"\r\n"


CHUNKED = b"Transfer-Encoding: chunked\r\n"
ENDED = b"0\r\n\r\n" + SMUGGLED
GOT_X = (("GET", "/x", ""),)
CASES = [
    # two framings
    Case("CL.TE", post(b"Content-Length: 6\r\n" + CHUNKED, b"0\r\n\r\nG")),
    Case("CL.TE, smuggled", post(b"Content-Length: %d\r\n" % len(ENDED) + CHUNKED, ENDED)),
    Case("TE.CL", post(CHUNKED + b"Content-Length: 4\r\n", b"5c\r\n" + SMUGGLED + b"\r\n0\r\n\r\n")),
    Case("two lengths", post(b"Content-Length: 0\r\nContent-Length: 44\r\n", SMUGGLED)),
    Case("two equal lengths", post(b"Content-Length: 2\r\nContent-Length: 2\r\n", b"ok")),
    Case("a list of lengths", post(b"Content-Length: 2, 2\r\n", b"ok")),
    *(
        Case(f"length {value!r}", post(b"Content-Length: " + value + b"\r\n", b"ok"))
        for value in (b"+2", b"-2", b"0x2", b"2 2", b"2;", b"\xb2", b"", b"2_0", b"1e1", b"9" * 40)
    ),
    Case("a length behind zeros", post(b"Content-Length: 002\r\n", b"ok"), (("POST", "/x", "ok"),)),
    # TE.TE: codings that one side might overlook
    *(
        Case(f"coding {line!r}", post(b"Content-Length: 4\r\n" + line + b"\r\n", b"5c\r\n" + SMUGGLED + b"\r\n0\r\n\r\n"))
        for line in (
            b"Transfer-Encoding: xchunked",
            b"Transfer-Encoding : chunked",
            b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
            b"Transfer-Encoding:\tchunked",
            b"Transfer-Encoding: \x0bchunked",
            b" Transfer-Encoding: chunked",
            b"X: X\nTransfer-Encoding: chunked",
            b"Transfer-Encoding\r\n : chunked",
            b"Transfer-Encoding: chunked, identity",
            b"Transfer-Encoding: identity, chunked",
            b"Transfer-Encoding: gzip, chunked",
            b"Transfer-Encoding: \"chunked\"",
            b"Transfer-Encoding: CHUNKED",
            b"Transfer-Encoding: chunked;q=1",
            b"Transfer-Encoding:",
            b"Transfer_Encoding: chunked\r\nTransfer-Encoding: chunked",
            b"Transfer-Encoding: chunked\x00",
            b"Transfer-Encoding\x00: chunked",
            b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        )
    ),
    Case(
        "a coding by an underscore is no coding",
        post(b"Content-Length: 2\r\nTransfer_Encoding: chunked\r\n", b"ok"),
        (("POST", "/x", "ok"),),
    ),
    Case("coding in 1.0", post(CHUNKED, ENDED, version=b"1.0")),
    Case("coding of any case", post(b"tRANSFER-eNCODING: Chunked\r\n", b"2\r\nok\r\n0\r\n\r\n"), (("POST", "/x", "ok"),)),
    # chunks
    *(
        Case(f"chunk {body!r}", post(CHUNKED, body + b"0\r\n\r\n"))
        for body in (
            b"2\nok\r\n", b"2\r\nokX", b"+2\r\nok\r\n", b"0x2\r\nok\r\n", b" 2\r\nok\r\n", b"\r\n", b"-1\r\n",
            b"fffffffffffffffff\r\nok\r\n", b"2;a=\"\r\n\"\r\nok\r\n", b"2;\x00\r\nok\r\n", b"2\r\nok\n", b"g\r\n", b"2;\nok\r\n",
        )
    ),
    Case("a space behind a chunk's size", post(CHUNKED, b"2 \r\nok\r\n0\r\n\r\n"), (("POST", "/x", "ok"),)),
    Case("chunk extensions", post(CHUNKED, b"2;a=b;c\r\nok\r\n0;d\r\n\r\n"), (("POST", "/x", "ok"),)),
    Case("trailers are dropped", post(CHUNKED, b"2\r\nok\r\n0\r\nX-Aether-App: x\r\nHost: y\r\n\r\n"), (("POST", "/x", "ok"),)),
    Case("a trailer with a framing", post(CHUNKED, b"0\r\nContent-Length: 44\r\n\r\n"), (("POST", "/x", ""),)),
    Case("a folded trailer", post(CHUNKED, b"0\r\nX: a\r\n b\r\n\r\n")),
    # heads
    *(
        Case(f"head {raw!r}"[:60], raw)
        for raw in (
            b"GET /x HTTP/1.1\nHost: app.localhost\n\n",
            b"GET /x HTTP/1.1\r\nHost: app.localhost\nX: y\r\n\r\n",
            b"GET /x HTTP/1.1\r\n" + HOST + b"X: a\r\n b\r\n\r\n",
            b"GET /x HTTP/1.1\r\n" + HOST + b"X: a\rContent-Length: 5\r\n\r\n",
            b"GET /x HTTP/1.1\r\n" + HOST + b"X: a\x00b\r\n\r\n",
            b"GET /x HTTP/1.1\r\n" + HOST + b"X\x00: a\r\n\r\n",
            b"GET /x HTTP/1.1\r\n" + HOST + b": nameless\r\n\r\n",
            b"GET /x HTTP/1.1\r\n" + HOST + b"no colon\r\n\r\n",
            b"GET /x HTTP/1.1\r\n" + HOST + b"X Y: z\r\n\r\n",
            b"GET /x HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
            b"GET /x HTTP/1.1\r\n\r\n",
            b"GET /x HTTP/1.1\r\nHost: app.localhost, other.localhost\r\n\r\n",
            b"GET /x HTTP/1.1\r\nHost: app.localhost@evil\r\n\r\n",
            b"GET /x HTTP/1.1 \r\n" + HOST + b"\r\n",
            b"GET  /x HTTP/1.1\r\n" + HOST + b"\r\n",
            b"GET /x y HTTP/1.1\r\n" + HOST + b"\r\n",
            b"GET\t/x\tHTTP/1.1\r\n" + HOST + b"\r\n",
            b"GET /x HTTP/2.0\r\n" + HOST + b"\r\n",
            b"GET /x HTTP/1.10\r\n" + HOST + b"\r\n",
            b"GET /x\r\n\r\n",
            b"GET x HTTP/1.1\r\n" + HOST + b"\r\n",
            b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"CONNECT app.localhost:80 HTTP/1.1\r\n" + HOST + b"\r\n",
            b"GET * HTTP/1.1\r\n" + HOST + b"\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
            b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
            b"GET /x HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 40_000 + b"\r\n\r\n",
        )
    ),
    Case("absolute form", get(target=b"http://app.localhost/x"), GOT_X),
    Case("asterisk form", b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", (("OPTIONS", "*", ""),)),
    Case("empty line first", b"\r\n" + get(), GOT_X),
    # requests that carry what they should not, and what Connection must not take away
    Case("GET with a body", b"GET /x HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\nok", (("GET", "/x", "ok"),)),
    Case("Connection names the length", post(b"Content-Length: 2\r\nConnection: content-length\r\n", b"ok"), (("POST", "/x", "ok"),)),
    Case(
        "Connection names the coding",
        post(CHUNKED + b"Connection: transfer-encoding\r\n", b"2\r\nok\r\n0\r\n\r\n"),
        (("POST", "/x", "ok"),),
    ),
    Case("h2c", get(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"), GOT_X),
    Case(
        "an upgrade with a body",
        post(b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: %d\r\n" % len(CANARY), CANARY),
        (("POST", "/x", CANARY.decode()),),
    ),
    Case(
        "pipelined",
        get(target=b"/one") + post(b"Content-Length: 2\r\n", b"ok") + get(target=b"/three"),
        (("GET", "/one", ""), ("POST", "/x", "ok"), ("GET", "/three", "")),
    ),
    Case("a body that looks like a request", post(b"Content-Length: %d\r\n" % len(CANARY), CANARY), (("POST", "/x", CANARY.decode()),)),
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def upstream(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    kind: str = request.param
    folder: Path = tmp_path_factory.mktemp("upstream")
    if kind.startswith("node"):
        if (node := shutil.which("node")) is None:
            pytest.skip("component: node")
        (folder / "server.js").write_text(NODE)
        words = [node, str(folder / "server.js"), kind.partition("-")[2]]
    else:
        words = [sys.executable, "-c", PYTHON, kind.partition("-")[2]]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield port
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


async def seen_by(port: int) -> list[tuple[str, ...]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /__seen HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    body = answer.partition(b"\r\n\r\n")[2]
    if b"chunked" in answer.partition(b"\r\n\r\n")[0].lower():
        body = body.partition(b"\r\n")[2].partition(b"\r\n0\r\n")[0]
    return [tuple(entry) for entry in json.loads(body)]


async def answers(reader: asyncio.StreamReader) -> bytes:
    found = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(1.0):
            while data := await reader.read(65536):
                found += data
                if b"/canary" in found:
                    break
    return found


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "in pieces"])
async def test_all_agree_where_each_request_begins(upstream: int, at_once: bool) -> None:
    problems: list[str] = []
    async with running(EdgeOptions(linger_secs=0.1, header_timeout_secs=0.5, idle_timeout_secs=0.5)) as run:
        run.serve("app", upstream)
        await seen_by(upstream)

        async def one(case: Case) -> None:
            client = await run.client()
            raw = case.raw + CANARY
            with contextlib.suppress(ConnectionError):
                if at_once:
                    await client.send(raw)
                else:
                    for start in range(0, len(raw), 1 + len(raw) // 7):
                        await client.send(raw[start : start + 1 + len(raw) // 7])
                        await asyncio.sleep(0)
            told = await answers(client.reader)
            client.writer.transport.abort()
            got = await seen_by(upstream)
            if case.seen is None:
                statuses = [int(part[:3]) for part in told.split(b"HTTP/1.1 ")[1:]]
                if got and not (case.name.startswith("chunk") or "trailer" in case.name):
                    problems.append(f"{case.name}: a server got {got}")
                if any(entry[1] in ("/smuggled", "/canary") for entry in got):
                    problems.append(f"{case.name}: smuggled: {got}")
                if told and (len(statuses) != 1 or not 400 <= statuses[0] < 600):
                    problems.append(f"{case.name}: answered {statuses}")
            elif got != [*case.seen, ("GET", "/canary", "")]:
                problems.append(f"{case.name}: a server got {got}, the client {told[:200]!r}")

        for case in CASES:
            await one(case)
    assert not problems, "\n".join(problems)
