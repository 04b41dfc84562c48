"""Start, dial, stop, adoption and removal of real instances."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from aether.model.errors import ServiceUnavailable
from aether.model.instance import InstanceExit
from aether.runtimes.process import ProcessRuntime, RuntimeOptions, runtime
from aether.runtimes.process.record import Record, keeper_of, take_lock
from aether.runtimes.process.shim.processes import started
from support.runtimes import NODE_SERVER, Bench, ask, bench, cgroups_named, exchange, gone, processes_mentioning

PYTHON_SERVER = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"hello from python"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
server = http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler)
print("up", flush=True)
server.serve_forever()
"""
COUNTER = """
let n = 0
setInterval(() => { for (let i = 0; i < 20; i++) console.log('line ' + n++) }, 1)
require('http').createServer((q, s) => s.end(String(process.pid))).listen(process.env.PORT)
"""


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(tmp_path / "data") as made:
        yield made


async def test_node_and_python_serve(box: Bench) -> None:
    node = await box.runtime.start(box.spec("node server.js", files={"server.js": NODE_SERVER}))
    python = await box.runtime.start(box.spec("python3 server.py", files={"server.py": PYTHON_SERVER}))
    assert await ask(node) == "hello from node"
    assert await ask(python) == "hello from python"


async def test_an_ipv6_listener_is_dialled_too(box: Bench) -> None:
    script = "require('http').createServer((q, s) => s.end('six')).listen(process.env.PORT, '::1')"
    instance = await box.runtime.start(box.spec("node server.js", files={"server.js": script}))
    assert await ask(instance) == "six"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("exit 0", InstanceExit(0, None)),
        ("exit 7", InstanceExit(7, None)),
        ("kill -SEGV $$", InstanceExit(None, 11)),
        ("no-such-program", InstanceExit(127, None)),
    ],
)
async def test_the_exit_is_reported(box: Bench, command: str, expected: InstanceExit) -> None:
    ended, _ = await box.run(command)
    assert ended == expected


async def test_a_command_that_forks_and_exits_leaves_nothing_running(box: Bench) -> None:
    ended, _ = await box.run("sleep 1000 & sleep 1000 & exit 3")
    assert ended.code == 3
    assert processes_mentioning(os.fspath(box.data)) == []


async def test_dial_before_listening_and_after_the_end(box: Bench) -> None:
    instance = await box.runtime.start(box.spec("echo up; exec sleep 1000"))
    with pytest.raises(ConnectionRefusedError):
        await instance.dial()
    await instance.stop(0.0)
    with pytest.raises(OSError) as caught:
        await instance.dial()
    assert not isinstance(caught.value, ConnectionRefusedError)


async def test_many_concurrent_dials(box: Bench) -> None:
    instance = await box.runtime.start(box.spec("node server.js", files={"server.js": NODE_SERVER}))
    await ask(instance)

    async def once() -> str:
        return await exchange(await instance.dial())

    assert set(await asyncio.gather(*(once() for _ in range(400)))) == {"hello from node"}


async def test_a_cancelled_dial_leaves_no_descriptor(box: Bench) -> None:
    instance = await box.runtime.start(box.spec("node server.js", files={"server.js": NODE_SERVER}))
    await ask(instance)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        task = asyncio.create_task(instance.dial())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    (await instance.dial()).close()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_stop_reaches_the_server_behind_npm_and_shells(box: Bench) -> None:
    script = """
const end = () => { console.log('bye'); process.exit(0) }
process.on('SIGTERM', () => { console.log('draining'); setTimeout(end, 150) })
require('http').createServer(() => 0).listen(process.env.PORT, () => console.log('up'))
"""
    spec = box.spec("sh -c 'sh -c \"node server.js; true\"; true'; true", files={"server.js": script})
    instance = await box.runtime.start(spec)
    await box.said(instance, "up")
    await instance.stop(10.0)
    assert await box.lines(instance) == ["up", "draining", "bye"]


async def test_an_app_that_ignores_sigterm_is_killed_after_the_grace(box: Bench) -> None:
    instance = await box.runtime.start(box.spec("trap '' TERM; echo up; while :; do sleep 1; done"))
    await box.said(instance, "up")
    began = asyncio.get_running_loop().time()
    ended = await instance.stop(0.3)
    assert ended == InstanceExit(None, signal.SIGKILL)
    assert 0.3 <= asyncio.get_running_loop().time() - began < 2.0
    assert await instance.stop(5.0) == ended


async def test_several_may_wait_and_stop_at_once(box: Bench) -> None:
    instance = await box.runtime.start(box.spec("exec sleep 1000"))
    results = await asyncio.gather(instance.wait(), instance.stop(5.0), instance.wait(), instance.stop(0.0))
    assert len(set(results)) == 1


async def test_stop_right_after_start(box: Bench) -> None:
    for _ in range(5):
        instance = await box.runtime.start(box.spec("exec sleep 1000"))
        async with asyncio.timeout(5):
            await instance.stop(3.0)


async def test_start_twice_starts_once(box: Bench) -> None:
    spec = box.spec("echo ran; exec sleep 1000", instance_id="same")
    first, second = await asyncio.gather(box.runtime.start(spec), box.runtime.start(spec))
    await box.said(first, "ran")
    assert (await box.runtime.start(spec)) is second is first
    await first.stop(1.0)
    again = await box.runtime.start(spec)
    assert await again.wait() == await first.wait()
    assert await box.lines(first) == ["ran"]


async def test_nothing_is_known_of_a_stranger(box: Bench) -> None:
    assert await box.runtime.adopt("stranger") is None
    await box.runtime.remove("stranger")
    assert [record async for record in box.runtime.logs("stranger", "demo", follow=True)] == []


async def test_removal_leaves_logs_and_nothing_else(box: Bench) -> None:
    script = NODE_SERVER + "; require('child_process').spawn('sleep', ['1000'], {detached: true})"
    instance = await box.runtime.start(
        box.spec("node server.js", files={"server.js": script}, instance_id="gone-soon")
    )
    await ask(instance)
    mounts = Path("/proc/self/mountinfo").read_text()
    keeper, start = keeper_of(box.data / "instances" / "gone-soon")
    if (await box.runtime.probe()).limits["memory"].startswith("cgroup"):
        assert cgroups_named("gone-soon")
    await instance.stop(5.0)
    await box.runtime.remove("gone-soon")
    await box.runtime.remove("gone-soon")
    assert processes_mentioning(os.fspath(box.data)) == []
    assert cgroups_named("gone-soon") == []
    assert await box.runtime.known() == []
    assert list((box.data / "instances").iterdir()) == []
    assert started(keeper) != start or Path(f"/proc/{keeper}/stat").read_text().split()[2] == "Z"
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert await box.lines(instance) == ["up"]
    await box.runtime.drop_logs("gone-soon", "demo")
    assert await box.lines(instance) == []
    assert not (box.data / "logs" / "demo").exists()


async def test_removing_a_running_instance_ends_it(box: Bench) -> None:
    instance = await box.runtime.start(box.spec("exec sleep 1000"))
    await box.runtime.remove(instance.spec.instance_id)
    assert (await instance.wait()).signal == signal.SIGKILL
    assert processes_mentioning(os.fspath(box.data)) == []


async def test_a_long_data_folder(tmp_path: Path) -> None:
    async with bench(tmp_path / ("x" * 100) / ("y" * 100)) as box:
        instance = await box.runtime.start(box.spec("node server.js", files={"server.js": NODE_SERVER}))
        assert await ask(instance) == "hello from node"


SERVER = """
import asyncio, sys
from pathlib import Path
from aether.model.instance import InstanceSpec
from aether.runtimes.process import ProcessRuntime

async def main():
    runtime = ProcessRuntime(Path(sys.argv[1]))
    root = Path(sys.argv[2])
    spec = InstanceSpec("kept", "demo", "d", 1, "0" * 64, root, "exec node server.js", 3000, env={"A": "b"})
    instance = await runtime.start(spec)
    print("started", flush=True)
    await instance.wait()

asyncio.run(main())
"""


async def test_an_instance_outlives_a_killed_server(box: Bench) -> None:
    spec = box.spec("", files={"server.js": COUNTER})
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, os.fspath(box.data), os.fspath(spec.root), stdout=asyncio.subprocess.PIPE
    )
    assert server.stdout is not None
    assert await server.stdout.readline() == b"started\n"
    before = keeper_of(box.data / "instances" / "kept")
    server.kill()
    await server.wait()
    assert await box.runtime.known() == ["kept"]
    instance = await box.runtime.adopt("kept")
    assert instance is not None
    assert keeper_of(box.data / "instances" / "kept") == before
    assert (instance.spec.command, instance.spec.env) == ("exec node server.js", {})
    pid = await ask(instance)
    assert await ask(instance) == pid
    async for record in box.runtime.logs("kept", "demo", follow=True):
        if record.text == "line 2000":
            break
    await instance.stop(5.0)
    numbers = [int(line.split()[1]) for line in await box.lines(instance)]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > 2000


async def test_an_end_while_no_server_ran_is_found_later(box: Bench) -> None:
    instance = await box.runtime.start(box.spec("echo hi; exit 5", instance_id="brief"))
    await instance.wait()
    later = ProcessRuntime(box.data)
    found = await later.adopt("brief")
    assert found is not None
    assert await found.wait() == InstanceExit(5, None)
    assert await found.stop(1.0) == await found.wait()
    await later.close()


async def test_a_killed_keeper_takes_its_sandbox_along(box: Bench) -> None:
    spec = box.spec("node server.js", files={"server.js": NODE_SERVER}, instance_id="orphan")
    instance = await box.runtime.start(spec)
    await ask(instance)
    folder = box.data / "instances" / "orphan"
    keeper, _ = keeper_of(folder)
    init = json.loads((folder / "state.json").read_bytes())["init"][0]
    os.kill(keeper, signal.SIGKILL)
    async with asyncio.timeout(5):
        ended = await instance.wait()
    assert ended == InstanceExit(None, signal.SIGKILL)
    assert cgroups_named("orphan") == []
    await gone(os.fspath(box.data))
    await gone(f"{init}\0tap0")
    later = ProcessRuntime(box.data)
    found = await later.adopt("orphan")
    assert found is not None
    assert await found.wait() == ended
    with pytest.raises(OSError):
        await found.dial()
    await later.close()


async def test_a_keeper_that_hangs_is_ended_by_stop(box: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aether.runtimes.process.instance._KEEPER_SECS", 0.2)
    instance = await box.runtime.start(box.spec("exec sleep 1000", instance_id="stuck"))
    keeper, _ = keeper_of(box.data / "instances" / "stuck")
    os.kill(keeper, signal.SIGSTOP)
    async with asyncio.timeout(5):
        assert (await instance.stop(0.0)).signal == signal.SIGKILL
    await gone(os.fspath(box.data))


async def test_a_start_that_a_killed_server_never_finished(box: Bench) -> None:
    spec = box.spec("echo ran", instance_id="half")
    folder = box.data / "instances" / "half"
    folder.mkdir(parents=True)
    Record(spec, "bubblewrap", 3000, runtime.Group()).write(folder)
    lock = take_lock(folder)
    assert lock is not None
    os.close(lock)
    restarted = await box.runtime.start(spec)
    assert (await restarted.wait()).code == 0
    assert await box.lines(restarted) == ["ran"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
async def test_a_full_disk_refuses_a_start_and_keeps_the_end_of_a_running_one(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", data], check=True)
    try:
        async with bench(data) as box:
            running = await box.runtime.start(box.spec("trap 'exit 9' TERM; echo up; while :; do sleep 0.01; done"))
            await box.said(running, "up")
            spec = box.spec("true", instance_id="refused")
            with (data / "filler").open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(b"\0" * 4096)
            with pytest.raises(ServiceUnavailable, match="No space left"):
                await box.runtime.start(spec)
            assert "refused" not in await box.runtime.known()
            assert cgroups_named("refused") == []
            await running.stop(5.0)
            later = ProcessRuntime(data)
            found = await later.adopt(running.spec.instance_id)
            assert found is not None
            assert await found.wait() == InstanceExit(9, None)
            await later.close()
            # the keeper tells how its instance ended a moment before it ends itself
            for _ in range(1000):
                if not processes_mentioning(os.fspath(data)):
                    break
                await asyncio.sleep(0.01)
    finally:
        subprocess.run(["umount", data], check=True)


async def test_what_a_server_killed_before_the_record_left_is_removed(box: Bench) -> None:
    (box.data / "instances" / "bare").mkdir(parents=True)
    assert await box.runtime.known() == ["bare"]
    assert await box.runtime.adopt("bare") is None
    await box.runtime.remove("bare")
    assert await box.runtime.known() == []


async def test_cancelling_a_start_leaves_an_instance_that_can_be_removed(box: Bench) -> None:
    task = asyncio.create_task(box.runtime.start(box.spec("exec sleep 1000", instance_id="unwanted")))
    await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await box.runtime.remove("unwanted")
    assert processes_mentioning(os.fspath(box.data)) == []
    assert await box.runtime.known() == []


async def test_plain_children_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aether.runtimes.process.report.shutil", SimpleNamespace(which=lambda _: None))
    refusing = ProcessRuntime(tmp_path / "a")
    found = await refusing.probe()
    assert not found.usable
    assert "bubblewrap" in found.remedy
    async with bench(tmp_path / "b", RuntimeOptions(sandbox="none")) as box:
        with pytest.raises(ServiceUnavailable, match="install the package 'bubblewrap'"):
            await refusing.start(box.spec("true"))
        instance = await box.runtime.start(box.spec("exec node server.js", files={"server.js": NODE_SERVER}))
        assert await ask(instance) == "hello from node"
        chain = box.spec("sh -c 'node server.js; true'; true", files={"server.js": NODE_SERVER}, env={"A": "1\n2"})
        second = await box.runtime.start(chain)
        assert await ask(second) == "hello from node"
        await instance.stop(5.0)
        await second.stop(5.0)
        await gone(os.fspath(box.data))
        with pytest.raises(OSError):
            await second.dial()
        ended, lines = await box.run("sleep 1000 & echo $A; pwd; exit 4", env={"A": "x"})
        assert ended.code == 4
        assert lines == ["x", os.fspath(box.data / "releases" / "r4")]
        assert processes_mentioning(os.fspath(box.data)) == []


def helper_of(box: Bench, instance_id: str, name: str) -> int:
    """Pid of a process that the keeper runs beside the app; 0 while there is none."""
    keeper, _ = keeper_of(box.data / "instances" / instance_id)
    children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    main = json.loads((box.data / "instances" / instance_id / "state.json").read_text())["main"][0]
    for pid in children:
        with suppress(OSError):
            comm = Path(f"/proc/{pid}/comm").read_text().strip()
            running = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if int(pid) != main and running and (comm.startswith("slirp") is (name == "slirp4netns")):
                return int(pid)
    return 0


async def helper(box: Bench, instance_id: str, name: str, other_than: int = 0) -> int:
    async with asyncio.timeout(10):
        while (found := helper_of(box, instance_id, name)) in (0, other_than):
            await asyncio.sleep(0.005)
    return found


async def test_a_killed_dialer_is_replaced_and_nobody_notices(box: Bench) -> None:
    instance = await box.runtime.start(box.spec("node server.js", files={"server.js": NODE_SERVER}))
    assert await ask(instance) == "hello from node"
    name, last = instance.spec.instance_id, 0
    for _ in range(3):
        last = await helper(box, name, "dialer", last)
        os.kill(last, signal.SIGKILL)
        # at once: the connection is made by the dead dialer's successor
        assert await ask(instance) == "hello from node"
    assert not instance.gone


async def test_a_killed_slirp4netns_is_started_again(box: Bench) -> None:
    if not box.runtime._findings.slirp:
        pytest.skip("component: slirp4netns (not installed)")
    instance = await box.runtime.start(box.spec("node server.js", files={"server.js": NODE_SERVER}))
    await box.said(instance, "up")
    name = instance.spec.instance_id
    first = await helper(box, name, "slirp4netns")
    os.kill(first, signal.SIGKILL)
    second = await helper(box, name, "slirp4netns", first)
    init = json.loads((box.data / "instances" / name / "state.json").read_text())["init"][0]
    async with asyncio.timeout(10):
        while "tap0" not in Path(f"/proc/{init}/net/dev").read_text():
            await asyncio.sleep(0.005)
    assert any("outgoing connections were cut" in line for line in await box.lines(instance))
    await instance.stop(1.0)
    assert not Path(f"/proc/{second}").exists() or started(second) == 0
