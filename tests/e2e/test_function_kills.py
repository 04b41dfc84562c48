"""kill -9 of a server while functions are changed: what was answered is there, and nothing is left half-done."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.server import Server, server, wait_for
from support.zips import Item, zipped

HELLO = {"name": "hello", "runtime": "node", "entrypoint": "index.js"}
CODE = b"""
require('http').createServer((request, response) => response.end(process.env.SAY || 'nothing'))
  .listen(process.env.PORT);
process.on('SIGTERM', () => process.exit(0));
"""
ZIP = zipped(Item(b"index.js", CODE))
RAW = {"Content-Type": "application/zip"}


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path / "up", AETHER_FUNCTION_RUNTIME="process", AETHER_STOP_GRACE_SECS="1") as it:
        assert it.api("POST", "/api/functions", HELLO)[0] == 201
        yield it


def call(up: Server) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", up.port, timeout=60)
    try:
        connection.request("GET", "/functions/hello/")
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def restart(up: Server) -> None:
    up.kill9()
    up.start()


def left(up: Server) -> list[str]:
    return sorted(path.name for path in (up.data / "functions" / "code").iterdir() if path.name.startswith("."))


def test_what_was_answered_outlives_the_server(up: Server) -> None:
    assert up.api("POST", "/api/functions/hello/code", ZIP, RAW)[1]["version"] == 2
    restart(up)
    assert up.api("PUT", "/api/functions/hello", {"env_vars": {"SAY": "still here"}})[1]["version"] == 3
    restart(up)
    shown = up.api("GET", "/api/functions/hello")[1]
    assert (shown["version"], shown["code"]["size_bytes"], shown["env_vars"]) == (3, len(ZIP), {"SAY": "still here"})
    assert call(up) == (200, "still here")


def test_an_upload_under_way_leaves_nothing(up: Server) -> None:
    assert up.api("POST", "/api/functions/hello/code", ZIP, RAW)[0] == 200
    token = (up.data / "admin-token").read_text().strip()
    with socket.create_connection(("127.0.0.1", up.port)) as raw:
        head = (
            f"POST /api/functions/hello/code HTTP/1.1\r\nHost: 127.0.0.1:{up.port}\r\n"
            f"Authorization: Bearer {token}\r\nContent-Type: application/zip\r\nContent-Length: 100000\r\n\r\n"
        )
        raw.sendall(head.encode() + ZIP[:50])
        wait_for(lambda: left(up))
        up.kill9()
    up.start()
    assert left(up) == []
    assert up.api("GET", "/api/functions/hello")[1]["version"] == 2
    assert call(up) == (200, "nothing")


def test_a_deletion_under_way_is_finished(up: Server) -> None:
    assert up.api("POST", "/api/functions/hello/code", ZIP, RAW)[0] == 200
    assert call(up)[0] == 200
    asked = threading.Thread(target=lambda: _ask(up), daemon=True)
    asked.start()
    wait_for(lambda: up.api("GET", "/api/functions/hello")[0] == 404)
    restart(up)
    asked.join(30)
    wait_for(lambda: up.api("POST", "/api/functions", HELLO)[0] == 201)
    assert up.api("GET", "/api/functions/hello")[1]["version"] == 1


def _ask(up: Server) -> None:
    try:
        up.api("DELETE", "/api/functions/hello")
    except (OSError, http.client.HTTPException):
        return  # the server was killed, or was done before
