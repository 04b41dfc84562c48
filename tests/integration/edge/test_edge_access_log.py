"""The access log over real sockets: a line for every request, whole, in order, bounded; none is lost in silence."""

from __future__ import annotations

import asyncio
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from aether.edge import access_log as module
from aether.edge.access_log import AccessLog, LineFormat
from aether.edge.options import RequestRecord
from aether.edge.server import Edge
from aether.edge.table import RouteTable
from support.edge import Client, PortInstance, Upstream, echo_handler, until


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def record(target: bytes = b"/", request_id: bytes = b"id") -> RequestRecord:
    return RequestRecord("shop", b"GET", 200, 0.001, 0.0, 0, 5, request_id, False, b"shop.test", target, b"::1", b"t")


async def test_every_request_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "access.log"
    log = AccessLog(path)
    table = RouteTable()
    edge = Edge(table, on_record=lambda _: None)
    edge.on_access = log.record
    log.start()
    async with Upstream(echo_handler()) as echo:
        table.route("app", [table.add("app", PortInstance(echo.port, "instance-1"))])
        port = await edge.start()
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        for head in (
            b"GET /a?secret=1 HTTP/1.1\r\nHost: app.localhost\r\n\r\n",
            b'GET /"quoted\\" HTTP/1.1\r\nHost: app.localhost\r\nX-Request-Id: "mine"\r\n\r\n',
            b"POST /b HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 5\r\n\r\nhello",
            b"GET /c HTTP/1.1\r\nHost: nobody.example\r\n\r\n",
        ):
            await client.ask(head)
        client.writer.close()
        await edge.close(1)
    await log.close()
    found = lines(path)
    assert [line["path"] for line in found] == ["/a", '/"quoted\\"', "/b", "/c"]
    assert [line["status"] for line in found] == [200, 200, 200, 404]
    assert [line["app"] for line in found] == ["app", "app", "app", None]
    assert found[1]["request_id"] == '"mine"'
    assert found[0]["request_id"] == found[0]["trace_id"]
    assert len(found[1]["trace_id"]) == 32
    assert (found[2]["method"], found[2]["bytes_in"]) == ("POST", 5)
    assert (found[0]["instance"], found[0]["deployment_id"]) == ("instance-1", "d")
    assert "instance" not in found[3]
    for line in found:
        assert line["client"] == "127.0.0.1"
        assert line["duration_us"] >= line["upstream_us"] >= 0
        assert abs(datetime.fromisoformat(line["time"]).timestamp() - path.stat().st_mtime) < 60
    assert (log.written, log.dropped) == (4, 0)
    assert path.stat().st_mode & 0o777 == 0o600


def test_queries_are_kept_on_request() -> None:
    made = LineFormat(with_query=True).line(record(b"/a?b=c"))
    assert json.loads(made)["path"] == "/a?b=c"


@pytest.mark.parametrize("number", [0, 1, 16_383, 16_384, 5_000_000_000])
def test_numbers_of_every_size_and_times_in_order(number: int) -> None:
    form = LineFormat()
    asked = record()._replace(duration=number / 1e6 + 1e-7, upstream_secs=number / 1e6 + 1e-7)
    asked = asked._replace(bytes_in=number, bytes_out=number, trace=b"00-%b-b-01" % (b"a" * 32))
    ends = [100.0, 100.0001, 100.0022, 100.9999, 101.0, 163.5]
    found = [json.loads(line) for line in form.lines([asked._replace(ended=end) for end in ends]).splitlines()]
    for line in found:
        names = ("duration_us", "upstream_us", "bytes_in", "bytes_out")
        assert [line[name] for name in names] == [number] * 4
        assert (line["request_id"], line["trace_id"]) == ("id", "a" * 32)
    times = [datetime.fromisoformat(line["time"]).timestamp() for line in found]
    for time, end in zip(times, ends, strict=True):
        assert time - times[0] == pytest.approx(end - ends[0], abs=0.0011)


async def test_files_are_put_aside_at_their_size(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(path, max_bytes=2000, keep=2)
    log.start()
    for number in range(60):
        log.record(record(b"/%d" % number))
        if number % 5 == 4:
            await until(lambda wanted=number + 1: log.written == wanted)
    await log.close()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["access.log", "access.log.1", "access.log.2"]
    assert all(item.stat().st_size <= 2000 for item in tmp_path.iterdir())
    kept = [
        line["path"] for name in ("access.log.2", "access.log.1", "access.log") for line in lines(tmp_path / name)
    ]
    assert kept == [f"/{number}" for number in range(60 - len(kept), 60)]


async def test_a_disk_that_stalls_drops_lines_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_WAITING_BYTES", 1000)
    path = tmp_path / "access.log"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(path)
    log.start()
    sent = 0

    def fill() -> bool:
        nonlocal sent
        for _ in range(200):
            log.record(record(b"/" + b"x" * 500))
        sent += 200
        return log.dropped > 0

    await until(fill)
    os.set_blocking(reader, True)
    got = b""

    def drain() -> None:
        nonlocal got
        while part := os.read(reader, 1 << 20):
            got += part

    draining = asyncio.create_task(asyncio.to_thread(drain))
    await until(lambda: log.written + log.dropped == sent)
    log.record(record(b"/last"))
    await log.close()
    await draining
    os.close(reader)
    found = [json.loads(line) for line in got.splitlines()]
    said = sum(line.get("dropped_lines", 0) for line in found)
    assert said == log.dropped
    assert said > 0
    assert len([line for line in found if "path" in line]) == log.written == sent + 1 - said
    assert found[-1]["path"] == "/last"


async def test_a_disk_that_fails_drops_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.symlink_to("/dev/full")
    log = AccessLog(path)
    log.start()
    for _ in range(10):
        log.record(record())
    await log.close()
    assert (log.written, log.dropped) == (0, 10)
