"""A function as its owner meets it: a real QEMU microVM that the first call starts, that goes when nobody calls, and
that comes back; and what a killed server leaves."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from aether.runtimes.microvm import leftovers
from support.microvm import KERNEL, need_machines
from support.product import product
from support.server import Server, pack, wait_for

EXAMPLE = Path(__file__).parents[2] / "examples" / "function"
FUNCTION_JS = """
const http = require('http');
let calls = 0;
http.createServer((request, response) => {
  calls += 1;
  console.log('asked for ' + request.url);
  response.end(JSON.stringify({calls, url: request.url, say: process.env.SAY, uid: process.getuid()}));
}).listen(process.env.PORT, '0.0.0.0');
"""


class Calls:
    """The server over HTTP, as its admin."""

    def __init__(self, server: Server) -> None:
        self.base = f"http://127.0.0.1:{server.port}"
        self._token = (server.data / "admin-token").read_text().strip()

    def api(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> tuple[int, Any]:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.base}/api/functions{path}", data, method=method)
        request.add_header("Authorization", f"Bearer {self._token}")
        if data is not None:
            request.add_header("Content-Type", kind)
        return _answer(request)

    def call(self, path: str = "/", name: str = "hello", data: bytes | None = None) -> tuple[int, Any]:
        return _answer(urllib.request.Request(f"{self.base}/functions/{name}{path}", data))

    def make(self, files: dict[str, str], **fields: Any) -> None:
        fields = {"name": "hello", "runtime": "node", "entrypoint": "index.js", **fields}
        status, answer = self.api("POST", "", fields)
        assert status == 201, answer
        status, answer = self.api("POST", f"/{fields['name']}/code", pack(files), "application/gzip")
        assert status == 200, answer

    def state(self, name: str = "hello") -> dict[str, Any]:
        return self.api("GET", f"/{name}")[1]["state"]


def _answer(request: urllib.request.Request) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            status, kind, body = answer.status, answer.headers.get("Content-Type"), answer.read()
    except urllib.error.HTTPError as error:
        status, kind, body = error.code, error.headers.get("Content-Type"), error.read()
    if kind is not None and "ndjson" in kind:
        return status, [json.loads(line) for line in body.splitlines()]
    return status, json.loads(body) if body else None


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Server]:
    need_machines()
    up = Server(
        tmp_path / "up",
        environment={
            "AETHER_FUNCTION_RUNTIME": "qemu",
            "AETHER_FUNCTION_KERNEL_ROOT": str(KERNEL),
            "AETHER_FUNCTION_LAST_IDLE_SECS": "2",
            "AETHER_FUNCTION_START_SECS": "120",
            "AETHER_FUNCTION_WAIT_SECS": "150",
            "AETHER_STOP_GRACE_SECS": "2",
        },
    )
    up.start()
    try:
        yield up
    finally:
        up.close()
        assert leftovers.running(leftovers.scope(up.data / "functions" / "qemu")) == {}


def running(server: Server) -> dict[str, Any]:
    """Virtual machines of instances of this server, whoever started them; not what a snapshot is made of."""
    found = leftovers.running(leftovers.scope(server.data / "functions" / "qemu"))
    return {name: processes for name, processes in found.items() if not name.startswith(".")}


def test_a_function_in_a_microvm_from_zero_to_zero_and_back(machines: Server) -> None:
    calls = Calls(machines)
    calls.make({"index.js": FUNCTION_JS}, env_vars={"SAY": "hi"})
    assert running(machines) == {}
    status, first = calls.call("/a/b?c=d")
    assert (status, first["calls"], first["url"], first["say"], first["uid"]) == (200, 1, "/a/b?c=d", "hi", 1000)
    assert len(running(machines)) == 1
    assert calls.call("/", data=b"x")[1]["calls"] == 2, "warm"
    assert [line["line"] for line in calls.api("GET", "/hello/logs")[1]] == ["asked for /a/b?c=d", "asked for /"]
    wait_for(lambda: not calls.state()["instances"])
    wait_for(lambda: running(machines) == {})
    wait_for(lambda: any((machines.data / "functions" / "qemu" / "snapshots").glob("*/note.json")), 120)
    status, again = calls.call()
    assert (status, again["calls"]) == (200, 1), "another instance"
    wait_for(lambda: len(calls.api("GET", "/hello/invocations")[1]["items"]) == 3)
    kept = calls.api("GET", "/hello/invocations")[1]["items"]
    assert [each["status"] for each in kept] == [200, 200, 200]
    assert sorted(each["start"] for each in kept) == ["cold", "restored", "warm"]
    status, _ = calls.api("DELETE", "/hello")
    assert status in (200, 202, 204)
    wait_for(lambda: running(machines) == {})
    assert calls.call()[0] == 404


def test_two_commands_run_the_example_in_a_microvm(tmp_path: Path) -> None:
    need_machines()
    with product(
        tmp_path, AETHER_FUNCTION_RUNTIME="qemu", AETHER_FUNCTION_KERNEL_ROOT=str(KERNEL),
        AETHER_FUNCTION_START_SECS="120", AETHER_FUNCTION_WAIT_SECS="150",
    ) as up:  # fmt: skip
        create = ("--runtime", "node", "--entrypoint", "index.js", "--code", str(EXAMPLE))
        done = up.run("function", "create", "greet", *create)
        assert (done.code, done.stdout.splitlines()[0]) == (0, "created greet")
        done = up.run("function", "invoke", "greet", "--path", "/you")
        assert done.code == 0, done.stderr
        assert done.stdout.startswith("hello you, from Node.js v")


def test_what_a_killed_server_leaves_is_ended_by_the_next(machines: Server) -> None:
    calls = Calls(machines)
    calls.make({"index.js": FUNCTION_JS}, min_instances=1)
    calls.make({"index.js": FUNCTION_JS}, name="second", min_instances=1)
    wait_for(lambda: any(it["stage"] == "serving" for it in calls.state()["instances"]), 120)
    calls.api("PUT", "/second", {"env_vars": {"SAY": "two"}})
    wait_for(lambda: any(it["stage"] == "starting" for it in calls.state("second")["instances"]), 60)
    before = set(running(machines))
    machines.kill9()
    machines.start()
    calls = Calls(machines)
    status, answer = calls.call(name="second")
    assert (status, answer["say"]) == (200, "two")
    assert not before & set(running(machines)), "no machine of the killed server is left"
    wait_for(lambda: len(running(machines)) == 2, 120)
    assert machines.stop() == 0
    assert running(machines) == {}


@pytest.mark.parametrize("delay_ms", [0, 30, 300, 1500])
def test_a_server_killed_during_a_first_call_leaves_nothing(tmp_path: Path, delay_ms: int) -> None:
    """On the `process` runtime, where every step of a start comes within a second."""
    up = Server(tmp_path / "up", environment={"AETHER_FUNCTION_RUNTIME": "process"})
    up.start()
    try:
        calls = Calls(up)
        calls.make({"index.js": FUNCTION_JS})
        assert up.process is not None
        with ThreadPoolExecutor(1) as callers:
            call = callers.submit(calls.call)
            time.sleep(delay_ms / 1000)  # where in the start it is killed
            up.kill9()
            error = call.exception(60)
        assert error is None or isinstance(error, OSError | http.client.HTTPException)
        up.start()
        assert calls.call()[0] == 200
        (instance,) = calls.state()["instances"]
        folders = [item.name for item in (up.data / "functions" / "process" / "instances").iterdir()]
        assert folders == [instance["id"]]
    finally:
        up.close()
    assert list((up.data / "functions" / "process" / "instances").iterdir()) == []
