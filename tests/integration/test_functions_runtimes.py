"""The contract of function runtimes, on each of them for real; few boots and many questions to each."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from aether.functions.ports import FunctionRuntime
from aether.model.errors import BadRequest, Conflict, NotFound, ServiceUnavailable
from aether.model.function_instance import FunctionPhase
from aether.model.instance import InstanceExit
from aether.runtimes.microvm import leftovers
from support.microvm import code, machines, spec

SERVER = (Path(__file__).parents[1] / "support" / "function.js").read_text()

PYTHON = """
import http.server, json, os, signal, ssl, sqlite3, sys

def ended(*_):
    print("bye")
    raise SystemExit(3)

signal.signal(signal.SIGTERM, ended)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"version": sys.version_info[:2], "uid": os.getuid(), "env": dict(os.environ)}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

http.server.HTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
"""


async def ask(runtime: FunctionRuntime, instance_id: str, path: str) -> dict[str, object]:
    loop = asyncio.get_running_loop()
    with await runtime.connect(instance_id) as sock:
        await loop.sock_sendall(sock, f"GET {path} HTTP/1.0\r\n\r\n".encode())
        answer = b""
        while data := await loop.sock_recv(sock, 65536):
            answer += data
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


async def test_functions_run_apart_and_end(tmp_path: Path) -> None:
    """One boot of each language at once: what they are given, what they can reach, how they end."""
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        here = own_address()
        env = {"A": "ä\n", "EMPTY": "", "HOST": here, "HOST_PORT": str(listener.getsockname()[1])}
        node = spec(code(tmp_path / "node.tgz", {"index.js": SERVER, "lib/a": ""}), "n-1", env=env, port=8123)
        python = spec(code(tmp_path / "python.tgz", {"main.py": PYTHON}), "p-1", runtime="python", env={"B": "b"})
        async with machines(tmp_path / "data") as runtime:
            starts = [asyncio.create_task(runtime.start(each)) for each in (node, python)]
            while len(await runtime.list()) < 2:
                await asyncio.sleep(0.01)
            assert (await runtime.status("n-1")).phase == FunctionPhase.STARTING
            with pytest.raises(Conflict):
                await runtime.start(node)
            await asyncio.gather(*starts)
            await _given(runtime, tmp_path / "data")
            await _reach(runtime, here, listener.getsockname()[1])
            await _says(runtime)
            await _ends(runtime, tmp_path / "data")


async def _given(runtime: FunctionRuntime, data: Path) -> None:
    who = await ask(runtime, "n-1", "/who")
    assert who["env"].pop("HOST")  # type: ignore[attr-defined]
    assert who["env"].pop("HOST_PORT")  # type: ignore[attr-defined]
    assert who["env"] == {
        "A": "ä\n", "EMPTY": "", "PORT": "8123", "PATH": "/usr/bin", "HOME": "/tmp", "LANG": "C.UTF-8",
        "NODE_ENV": "production",
    }  # fmt: skip
    assert (who["uid"], who["groups"], who["cwd"]) == (1000, [1000], "/app")
    assert who["files"] == ["index.js", "lib"]
    assert who["writes"] == {
        "/app/x": "EROFS", "/x": "EROFS", "/usr/bin/x": "EROFS", "/tmp/x": "written", "/dev/vda": "EACCES",
        "/dev/mem": "EACCES",
    }  # fmt: skip
    assert who["processes"] == 1
    assert who["privileges"] == [f"Cap{kind}:\t{'0' * 16}" for kind in ("Inh", "Prm", "Eff")] + [
        item for item in who["privileges"] if item.startswith(("CapBnd", "CapAmb", "NoNewPrivs:\t1"))
    ]  # fmt: skip
    assert "NoNewPrivs:\t1" in who["privileges"]
    flags = {mount[1]: (mount[2], set(mount[3].split(","))) for mount in who["mounts"]}  # type: ignore[union-attr]
    for place in ("/", "/app"):
        assert flags[place][0] == "squashfs"
        assert {"ro", "nosuid", "nodev"} <= flags[place][1]
    other = await ask(runtime, "p-1", "/")
    assert other["uid"] == 1000
    assert other["env"]["B"] == "b"  # type: ignore[index]
    assert "A" not in other["env"]  # type: ignore[operator]
    assert sorted(await runtime.list()) == ["n-1", "p-1"]
    running = leftovers.running(leftovers.scope(data))
    assert {name: len(found) for name, found in running.items()} == {"n-1": 1, "p-1": 1}
    for item in [*data.rglob("*"), data]:
        assert item.stat().st_mode & 0o077 == 0, item


async def _reach(runtime: FunctionRuntime, here: str, port: int) -> None:
    """The assignment was given once; of the host nothing answers but that service; there is nobody else."""
    told = await ask(runtime, "n-1", "/metadata")
    assert told["session"] == 200
    assert told["again"][0] == 404  # type: ignore[index]
    assert told["bare"][0] == 401  # type: ignore[index]
    reached = await ask(runtime, "n-1", "/reach")
    assert reached.pop("172.16.0.1:22") == "ECONNREFUSED"
    assert reached.pop("172.16.0.1:80") == "ECONNREFUSED"
    assert f"{here}:{port}" in reached
    assert set(reached.values()) <= {"nothing", "EHOSTUNREACH", "ENETUNREACH", "ECONNREFUSED"}
    await ask(runtime, "n-1", "/lie")
    assert (await runtime.status("n-1")).phase == FunctionPhase.READY


async def _says(runtime: FunctionRuntime) -> None:
    await ask(runtime, "n-1", "/flood")
    async with asyncio.timeout(60):
        while not (found := [item for item in await runtime.log("n-1") if "xxx" in item.text]) or found[-1].partial:
            await asyncio.sleep(0.05)
    assert sum(len(item.text) for item in found) == 70_008
    assert "up" in [item.text for item in await runtime.log("n-1")]
    assert await runtime.log("unknown") == []


async def _ends(runtime: FunctionRuntime, data: Path) -> None:
    waiting = asyncio.create_task(runtime.wait("p-1"))
    assert await runtime.stop("p-1", 60.0) == InstanceExit(3, None)
    assert await waiting == InstanceExit(3, None)
    assert "bye" in [item.text for item in await runtime.log("p-1")]
    # this one does not care: it is killed when its time is over
    assert await runtime.stop("n-1", 0.3) == InstanceExit(None, 9)
    assert await runtime.list() == []
    for call in (runtime.connect, runtime.status, runtime.wait):
        with pytest.raises(NotFound):
            await call("n-1")
    with pytest.raises(NotFound):
        await runtime.stop("n-1", 1.0)
    assert leftovers.running(leftovers.scope(data)) == {}
    assert await runtime.sweep() == []


async def test_a_function_that_ends_before_it_listens_says_why(tmp_path: Path) -> None:
    source = "print('about to fail')\nheld = []\nwhile True: held.append(b'x' * 4_000_000)"
    async with machines(tmp_path / "data") as runtime:
        with pytest.raises(
            ServiceUnavailable, match="more memory than its limit before it listened on port"
        ) as caught:
            await runtime.start(spec(code(tmp_path / "in", {"main.py": source}), runtime="python"))
        assert caught.value.details is not None
        assert "about to fail" in caught.value.details["log"]
        assert await runtime.list() == []


async def test_a_start_that_takes_too_long_or_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    work = code(tmp_path / "in", {"index.js": ""})
    async with machines(tmp_path / "data") as runtime:
        await runtime.prepare("node", work)
        with pytest.raises(ServiceUnavailable, match=r"did not listen on port 3000 within 0\.3 seconds"):
            await runtime.start(spec(work, ready_secs=0.3))
        assert leftovers.running(leftovers.scope(tmp_path / "data")) == {}
        start = asyncio.create_task(runtime.start(spec(work)))
        while not leftovers.running(leftovers.scope(tmp_path / "data")):
            await asyncio.sleep(0.01)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert await runtime.list() == []
        assert leftovers.running(leftovers.scope(tmp_path / "data")) == {}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"env": {"A": "x" * 60_000}}, BadRequest),
        ({"env": {"A B": "x"}}, BadRequest),
        ({"env": {"A": "x\0"}}, BadRequest),
        ({"instance_id": "../x"}, BadRequest),
        ({"entrypoint": "/bin/sh"}, BadRequest),
        ({"entrypoint": "--eval=1"}, BadRequest),
        ({"entrypoint": "a/../../b"}, BadRequest),
        ({"port": 0}, BadRequest),
        ({"memory_mb": 1}, BadRequest),
        ({"runtime": "perl"}, NotFound),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value.__name__,
)
async def test_what_cannot_be_is_refused_before_anything_starts(
    tmp_path: Path, change: dict[str, object], error: type[Exception]
) -> None:
    async with machines(tmp_path / "data") as runtime:
        with pytest.raises(error):
            await runtime.start(replace(spec(code(tmp_path / "in", {"index.js": ""})), **change))  # type: ignore[arg-type]
        assert await runtime.list() == []
