"""The contract of function runtimes, on each of them for real; few boots and many questions to each."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aether.functions.ports import FunctionRuntime
from aether.model.errors import BadRequest, Conflict, DigestMismatch, NotFound, ServiceUnavailable
from aether.model.function_instance import CodeForm, FunctionPhase
from aether.model.instance import InstanceExit
from support import functions_main
from support.function_runtimes import KINDS, Bench, bench
from support.microvm import code
from support.spawned import spawned

SUPPORT = Path(__file__).parents[1] / "support"
SERVER = (SUPPORT / "function.js").read_text()
MISBEHAVING = (SUPPORT / "misbehaving.py").read_text()
LISTENER = "require('http').createServer((q, s) => s.end('hello')).listen(process.env.PORT, () => console.log('up'))"

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


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


async def ask(runtime: FunctionRuntime, instance_id: str, path: str) -> Any:
    loop = asyncio.get_running_loop()
    with await runtime.connect(instance_id) as sock:
        await loop.sock_sendall(sock, f"GET {path} HTTP/1.0\r\n\r\n".encode())
        answer = b""
        while data := await loop.sock_recv(sock, 65536):
            answer += data
    return json.loads(answer.partition(b"\r\n\r\n")[2])


async def logged(runtime: FunctionRuntime, instance_id: str, text: str) -> None:
    """Return when the log has a line with `text`."""
    async with asyncio.timeout(120):
        while not any(text in item.text for item in await runtime.log(instance_id)):
            await asyncio.sleep(0.05)


def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


async def test_functions_run_apart_and_end(kind: str, tmp_path: Path) -> None:
    """One start of each language at once: what they are given, what they can reach, how they end."""
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        here = own_address()
        env = {"A": "ä\n", "EMPTY": "", "HOST": here, "HOST_PORT": str(listener.getsockname()[1])}
        async with bench(kind, tmp_path / "data") as box:
            node = box.spec(code(tmp_path / "node.tgz", {"index.js": SERVER, "lib/a": ""}), "n", env=env, port=8123)
            python = box.spec(
                code(tmp_path / "python.tgz", {"main.py": PYTHON}), "p", runtime="python", env={"B": "b"}
            )
            runtime = box.runtime
            starts = [asyncio.create_task(runtime.start(each)) for each in (node, python)]
            while len(await runtime.list()) < 2:
                await asyncio.sleep(0.01)
            assert (await runtime.status(box.id("n"))).phase == FunctionPhase.STARTING
            with pytest.raises(Conflict):
                await runtime.start(node)
            await asyncio.gather(*starts)
            await _given(box)
            await _reach(box, here, listener.getsockname()[1])
            await _says(box)
            await _ends(box)


async def _given(box: Bench) -> None:
    who = await ask(box.runtime, box.id("n"), "/who")
    env = dict(who["env"])
    assert env.pop("PATH")
    assert env.pop("HOST")
    assert env.pop("HOST_PORT")
    assert env == {
        "A": "ä\n", "EMPTY": "", "PORT": "8123", "HOME": "/tmp", "LANG": "C.UTF-8", "NODE_ENV": "production",
    }  # fmt: skip
    assert who["uid"] != 0
    assert who["groups"] == [who["uid"]]
    assert who["cwd"] == "/app"
    assert who["files"] == ["index.js", "lib"]
    writes = who["writes"]
    assert writes.pop("/tmp/x") == "written"
    assert {writes.pop(path) for path in ("/app/x", "/x", "/usr/bin/x")} == {"EROFS"}
    assert set(writes.values()) <= {"EACCES", "EPERM", "EROFS", "ENOENT"}
    assert who["privileges"] == [f"Cap{kind}:\t{'0' * 16}" for kind in ("Inh", "Prm", "Eff")] + [
        item for item in who["privileges"] if item.startswith(("CapBnd", "CapAmb", "NoNewPrivs:\t1"))
    ]  # fmt: skip
    assert "NoNewPrivs:\t1" in who["privileges"]
    flags = {mount[1]: set(mount[3].split(",")) for mount in who["mounts"]}
    for place in ("/", "/app"):
        assert {"ro", "nosuid", "nodev"} <= flags[place]
    box.kind.inside(who)
    other = await ask(box.runtime, box.id("p"), "/")
    assert other["uid"] != 0
    assert other["env"].pop("PATH")
    assert other["env"] == {
        "B": "b", "PORT": "3000", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    assert list(await box.runtime.list()) == box.running() == [box.id("n"), box.id("p")]
    box.kind.private(box.data)


async def _reach(box: Bench, here: str, port: int) -> None:
    """Of the host nothing answers; there is nobody else."""
    if box.kind.machine:
        told = await ask(box.runtime, box.id("n"), "/metadata")
        assert told["session"] == 200
        # the assignment was given once
        assert told["again"][0] == 404
        assert told["bare"][0] == 401
    reached = await ask(box.runtime, box.id("n"), "/reach")
    assert f"{here}:{port}" in reached
    if box.kind.machine:
        assert reached.pop("172.16.0.1:22") == "ECONNREFUSED"
        assert reached.pop("172.16.0.1:80") == "ECONNREFUSED"
    assert set(reached.values()) <= {"nothing", "EHOSTUNREACH", "ENETUNREACH", "ECONNREFUSED"}
    await ask(box.runtime, box.id("n"), "/lie")
    assert (await box.runtime.status(box.id("n"))).phase == FunctionPhase.READY


async def _says(box: Bench) -> None:
    runtime = box.runtime
    await ask(runtime, box.id("n"), "/flood")
    async with asyncio.timeout(60):
        while (
            not (found := [item for item in await runtime.log(box.id("n")) if "xxx" in item.text])
            or found[-1].partial
        ):
            await asyncio.sleep(0.05)
    assert sum(len(item.text) for item in found) == 70_008
    assert "up" in [item.text for item in await runtime.log(box.id("n"))]
    assert list(await runtime.log("unknown")) == []


async def _ends(box: Bench) -> None:
    runtime, n, p = box.runtime, box.id("n"), box.id("p")
    waiting = asyncio.create_task(runtime.wait(p))
    assert await runtime.stop(p, 60.0) == InstanceExit(3, None)
    assert await waiting == InstanceExit(3, None)
    assert "bye" in [item.text for item in await runtime.log(p)]
    # this one does not care: it is killed when its time is over
    assert await runtime.stop(n, 0.3) == InstanceExit(None, 9)
    assert list(await runtime.list()) == []
    for call in (runtime.connect, runtime.status, runtime.wait):
        with pytest.raises(NotFound):
            await call(n)
    with pytest.raises(NotFound):
        await runtime.stop(n, 1.0)
    assert box.left() == []
    assert list(await runtime.sweep()) == []


async def test_a_function_that_ends_before_it_listens_says_why(kind: str, tmp_path: Path) -> None:
    source = "print('about to fail')\nheld = []\nwhile True: held.append(b'x' * 4_000_000)"
    async with bench(kind, tmp_path / "data") as box:
        with pytest.raises(
            ServiceUnavailable, match="more memory than its limit before it listened on port"
        ) as caught:
            await box.runtime.start(box.spec(code(tmp_path / "in", {"main.py": source}), runtime="python"))
        assert caught.value.details is not None
        assert "about to fail" in caught.value.details["log"]
        assert list(await box.runtime.list()) == []
        assert box.left() == []


async def test_a_start_that_takes_too_long_or_is_given_up_leaves_nothing(kind: str, tmp_path: Path) -> None:
    work = code(tmp_path / "in", {"index.js": "setInterval(() => {}, 1000)"})
    async with bench(kind, tmp_path / "data") as box:
        await box.runtime.prepare("node", work)
        with pytest.raises(ServiceUnavailable, match=r"did not listen on port 3000 within 0\.3 seconds"):
            await box.runtime.start(box.spec(work, ready_secs=0.3))
        assert box.left() == []
        start = asyncio.create_task(box.runtime.start(box.spec(work)))
        while not box.running():
            await asyncio.sleep(0.01)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert list(await box.runtime.list()) == []
        assert box.left() == []


async def test_an_instance_can_be_stopped_at_any_moment_of_its_start(kind: str, tmp_path: Path) -> None:
    work = code(tmp_path / "in", {"index.js": "setInterval(() => {}, 1000)"})
    async with bench(kind, tmp_path / "data") as box:
        await box.runtime.prepare("node", work)
        for pause_secs in (0.0, 0.003, 0.02, 0.1, 0.4):
            start = asyncio.create_task(box.runtime.start(box.spec(work, ready_secs=60.0)))
            while not await box.runtime.list():
                await asyncio.sleep(0)
            await asyncio.sleep(pause_secs)  # the moment
            async with asyncio.timeout(20):
                await box.runtime.stop(box.spec(work).instance_id, 0.0)
                with pytest.raises((ServiceUnavailable, asyncio.CancelledError)):
                    await start
            assert list(await box.runtime.list()) == []
            assert box.left() == []


async def test_a_function_that_listens_where_nobody_reaches_it_is_told_so(kind: str, tmp_path: Path) -> None:
    work = code(tmp_path / "in", {"index.js": LISTENER.replace("PORT", "PORT, '127.0.0.1'")})
    async with bench(kind, tmp_path / "data") as box:
        start = asyncio.create_task(box.runtime.start(box.spec(work)))
        await logged(box.runtime, box.id("i1"), "let it listen on 0.0.0.0")
        assert (await box.runtime.status(box.id("i1"))).phase == FunctionPhase.STARTING
        with pytest.raises(OSError):
            await box.runtime.connect(box.id("i1"))
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start


async def test_what_a_function_takes_is_bounded_and_its_end_is_not_its_choice(kind: str, tmp_path: Path) -> None:
    """It floods its log, forks as long as it can, and does not care for SIGTERM."""
    work = code(tmp_path / "in", {"main.py": MISBEHAVING})
    async with bench(kind, tmp_path / "data") as box:
        await box.runtime.start(box.spec(work, runtime="python", memory_mb=512))
        assert await ask(box.runtime, box.id("i1"), "/flood") == 3000
        await logged(box.runtime, box.id("i1"), "flooded")
        kept = sum(file.stat().st_size for file in (box.data / "logs").rglob("*.log*"))
        assert (1 << 20) < kept < (2 << 20) + 100_000
        # what is kept is more than is taken at once: there was a pause, and the function had to wait
        lines = [item for item in await box.runtime.log(box.id("i1"), 10_000) if "x" * 1000 in item.text]
        assert lines[-1].time_ns - lines[0].time_ns > 500_000_000
        # either it gets no more processes, or those it got have used up its memory
        forks = asyncio.create_task(ask(box.runtime, box.id("i1"), "/fork"))
        end = asyncio.create_task(box.runtime.wait(box.id("i1")))
        await asyncio.wait([forks, end], return_when=asyncio.FIRST_COMPLETED)
        if end.done() or forks.exception() is not None:
            # its connection breaks a moment before its end is told
            forks.cancel()
            assert (await end).out_of_memory
        else:
            assert forks.result() < 1500
            assert await ask(box.runtime, box.id("i1"), "/") == 0
        ended = await box.runtime.stop(box.id("i1"), 0.3)
        assert ended.signal == 9
        assert ended == await end
        assert box.left() == []


async def test_an_instance_that_ends_stays_known_and_close_ends_the_others(kind: str, tmp_path: Path) -> None:
    work = code(tmp_path / "in", {"index.js": SERVER})
    async with bench(kind, tmp_path / "data") as box:
        runtime, eats, stays = box.runtime, box.id("eats"), box.id("stays")
        await asyncio.gather(runtime.start(box.spec(work, "eats")), runtime.start(box.spec(work, "stays")))
        waiting = asyncio.create_task(runtime.wait(eats))
        with pytest.raises((OSError, ValueError)):
            await ask(runtime, eats, "/eat")
        ended = await waiting
        assert ended.out_of_memory
        assert "more memory than its limit" in str(ended)
        with pytest.raises(OSError):
            await runtime.connect(eats)
        found = await runtime.status(eats)
        assert (found.phase, found.exit) == (FunctionPhase.EXITED, ended)
        assert found.ready_ms is not None
        assert list(await runtime.list()) == [eats, stays]
        with pytest.raises(Conflict):
            await runtime.start(box.spec(work, "eats"))
        assert await runtime.stop(eats, 1.0) == ended
        assert list(await runtime.list()) == [stays]
        waiting = asyncio.create_task(runtime.wait(stays))
        await asyncio.sleep(0)
        await runtime.close()
        assert await waiting == InstanceExit(None, 9)
        assert list(await runtime.list()) == []
        assert "up" in [item.text for item in await runtime.log(stays)]
        assert box.left() == []


async def test_nothing_is_left_of_what_a_killed_process_started(kind: str, tmp_path: Path) -> None:
    code(tmp_path / "in", {"index.js": LISTENER})
    data = tmp_path / "data"
    async with bench(kind, data) as box:
        name = box.id("i1")
        async with spawned(Path(functions_main.__file__), kind, data, tmp_path / "in", name) as server:
            assert await server.line() == "ready"
            assert box.running() == [name]
            await server.kill()
        assert set(await box.runtime.sweep()) <= {name}
        assert box.left() == []
        assert "up" in [item.text for item in await box.runtime.log(name)]
        assert list(await box.runtime.sweep()) == []


async def test_what_nobody_uses_any_more_is_taken_away(kind: str, tmp_path: Path) -> None:
    used = code(tmp_path / "used", {"index.js": SERVER})
    other = code(tmp_path / "other", {"index.js": "other"})
    async with bench(kind, tmp_path / "data") as box:
        await box.runtime.prepare("node", other)
        spec = box.spec(used, env={"HOST": "127.0.0.1", "HOST_PORT": "1"})
        await box.runtime.start(spec)
        await box.runtime.trim(3600.0, 0)
        kept = set(box.codes())
        assert len(kept) == 2, "it was asked for lately"
        await box.runtime.trim(0.0, 0)
        assert len(box.codes()) == 1, "the code of an instance stays"
        assert (await ask(box.runtime, spec.instance_id, "/who"))["files"]
        assert await box.runtime.log(spec.instance_id), "and its log"
        await box.runtime.stop(spec.instance_id, 0.0)
        await box.runtime.trim(0.0, 1)
        assert await box.runtime.log(spec.instance_id), "the newest logs stay"
        await box.runtime.trim(0.0, 0)
        assert list(await box.runtime.log(spec.instance_id)) == []
        assert box.codes() == []
        await box.runtime.prepare("node", used)
        assert len(box.codes()) == 1


async def test_code_is_unpacked_once_however_many_ask(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, made = KINDS[kind].store, list[str]()
    make = store._make

    def counted(self: Any, archive: Path, form: CodeForm, key: str) -> None:
        made.append(key)
        make(self, archive, form, key)

    monkeypatch.setattr(store, "_make", counted)
    work = code(tmp_path / "in", {"index.js": LISTENER})
    async with bench(kind, tmp_path / "data") as box:
        other = KINDS[kind].make(tmp_path / "data")
        try:
            await asyncio.gather(
                *(runtime.prepare("node", work) for runtime in (box.runtime, other) for _ in range(5))
            )
        finally:
            await other.close()
        assert len(made) == 1
        with pytest.raises(DigestMismatch):
            await box.runtime.prepare("node", replace(work, digest="0" * 64))
        with pytest.raises(BadRequest):
            await box.runtime.prepare("node", replace(work, form=CodeForm.ZIP))


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
    kind: str, tmp_path: Path, change: dict[str, object], error: type[Exception]
) -> None:
    async with bench(kind, tmp_path / "data") as box:
        with pytest.raises(error):
            await box.runtime.start(replace(box.spec(code(tmp_path / "in", {"index.js": ""})), **change))  # type: ignore[arg-type]
        assert list(await box.runtime.list()) == []
