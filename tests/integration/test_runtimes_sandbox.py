"""What an instance cannot see, reach or use up, tried from inside real sandboxes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvloop

from aether.model.errors import BadRequest
from aether.model.instance import Limits
from aether.runtimes.process.record import keeper_of
from support.runtimes import NODE_SERVER, Bench, ask, bench

SYSTEM_PYTHON = "/usr/bin/python3"
MIB = 1024**2


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(tmp_path / "data") as made:
        yield made


async def test_it_sees_only_its_own_processes(box: Bench) -> None:
    ended, lines = await box.run("ls -d /proc/[0-9]* | wc -l; cat /proc/[0-9]*/comm")
    assert ended.code == 0
    assert int(lines[0]) <= 6
    assert not {"python", "pytest", "systemd"} & set(lines)


async def test_the_artifact_is_read_only_and_the_working_directory(box: Bench) -> None:
    _, lines = await box.run(
        "pwd; cat hello.txt; touch /app/new 2>&1; echo x >>hello.txt", files={"hello.txt": "hi\n"}
    )
    assert lines[:2] == ["/app", "hi"]
    assert len(lines) == 4, "both writes are refused"
    assert (box.data / "releases" / "r1" / "hello.txt").read_text() == "hi\n"


async def test_nothing_outside_tmp_can_be_written(box: Bench) -> None:
    _, lines = await box.run(
        "for d in / /etc /usr /dev /proc /app /var; do touch $d/x 2>/dev/null && echo wrote $d; done; :"
    )
    assert lines == []


async def test_tmp_is_private_and_limited(box: Bench) -> None:
    limits = Limits(memory_bytes=128 * MIB, pids=64, tmp_bytes=2 * MIB)
    fill = "echo mine >/tmp/note; head -c 8000000 /dev/zero >/tmp/big; stat -c %s /tmp/big; sleep 60"
    first = await box.runtime.start(box.spec(fill, limits=limits))
    await box.said(first, "2093056")
    assert any("No space left" in line for line in await box.lines(first))
    _, lines = await box.run("ls -A /tmp; echo $HOME $TMPDIR")
    assert lines == ["/tmp /tmp"]


async def test_it_has_no_privilege(box: Bench) -> None:
    _, lines = await box.run("id -u; id -g; id -G; grep -E 'Cap|NoNewPrivs|Seccomp:' /proc/self/status")
    uid, gid, groups, *status = lines
    assert uid == gid == groups != "0"
    found = dict(line.split(":\t") for line in status)
    assert {found[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert found["NoNewPrivs"] == "1"
    assert found["Seccomp"] == "2"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give uids away")
async def test_each_app_has_a_stable_uid_of_its_own(box: Bench) -> None:
    uids = [(await box.run("id -u", app=app))[1][0] for app in ("one", "two", "one")]
    assert uids[0] == uids[2] != uids[1]
    assert all(int(uid) > 200_000 for uid in uids)


async def test_the_host_s_files_are_out_of_sight(box: Bench) -> None:
    _, lines = await box.run(
        f"ls {box.data} /home {Path.home()}/.ssh /etc/shadow /etc/ssl/private /srv /var 2>/dev/null;"
        "cat /etc/passwd; ls /"
    )
    assert [line.partition(":")[0] for line in lines[:2]] == ["root", "app"]
    assert not {"srv", "home", "var", "run", "mnt"} & set(lines)


async def test_it_inherits_no_descriptor(box: Bench) -> None:
    _, lines = await box.run("ls /proc/self/fd")
    assert lines == ["0", "1", "2", "3"]  # the last is the listing itself


@pytest.mark.skipif(sys.base_prefix.startswith("/usr"), reason="this Python is part of the system and always shown")
async def test_a_toolchain_outside_the_system_is_usable_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = Path(sys.base_prefix).resolve()
    monkeypatch.setenv("PATH", f"{prefix}/bin:/usr/bin:/bin")
    async with bench(tmp_path / "data") as box:
        command = "python3 -c 'import ssl, sys; print(sys.prefix)'; node -p 40+2; ls -A "
        _, lines = await box.run(command + str(prefix.parent))
        assert lines[0] == str(prefix)
        assert lines[-2:] == ["42", prefix.name]


def test_the_server_s_event_loop_does_not_matter(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with bench(tmp_path / "data") as box:
            _, lines = await box.run("ls /proc/self/fd")
            assert lines == ["0", "1", "2", "3"]
            instance = await box.runtime.start(box.spec("exec node server.js", files={"server.js": NODE_SERVER}))
            assert await ask(instance) == "hello from node"
            keeper, _ = keeper_of(box.data / "instances" / instance.spec.instance_id)
            opened = [os.readlink(path) for path in Path(f"/proc/{keeper}/fd").iterdir()]
            assert sum(name.startswith("socket:") for name in opened) <= 3  # listener, subscriber, dialer
            assert (await instance.stop(5.0)).signal == signal.SIGTERM

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


async def test_neither_the_host_nor_another_instance_can_be_reached(box: Bench) -> None:
    other = await box.runtime.start(box.spec("node server.js", files={"server.js": NODE_SERVER}))
    assert await ask(other) == "hello from node"
    script = """
import socket, sys, time
for _ in range(500):
    if "tap0" in open("/proc/net/dev").read() or sys.argv[2] == "no":
        break
    time.sleep(0.01)
for host, port in (("127.0.0.1", int(sys.argv[1])), ("10.0.2.2", int(sys.argv[1])), ("127.0.0.1", 3000)):
    try:
        socket.create_connection((host, port), 5).close()
        print("reached", host, port)
    except OSError as error:
        print("failed", host, port)
"""
    egress = "yes" if (await box.runtime.probe()).egress.startswith("slirp") else "no"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        _, lines = await box.run(f"{SYSTEM_PYTHON} try.py {port} {egress}", files={"try.py": script})
    assert lines == [f"failed 127.0.0.1 {port}", f"failed 10.0.2.2 {port}", "failed 127.0.0.1 3000"]


async def test_egress_is_up_and_link_local_addresses_are_refused(box: Bench) -> None:
    if not (await box.runtime.probe()).egress.startswith("slirp"):
        pytest.skip("component: slirp4netns")
    script = """
import errno, socket, time
for _ in range(500):
    routes = [line.split() for line in open("/proc/net/route").read().splitlines()[1:]]
    if any(row[0] == "tap0" and row[1] == "00000000" for row in routes):
        print("default route")
        break
    time.sleep(0.01)
print(open("/etc/resolv.conf").read().strip())
try:
    socket.create_connection(("169.254.169.254", 80), 5)
except OSError as error:
    print(errno.errorcode[error.errno])
"""
    _, lines = await box.run(f"{SYSTEM_PYTHON} try.py", files={"try.py": script})
    assert lines == ["default route", "nameserver 10.0.2.3", "EHOSTUNREACH"]


async def test_refused_system_calls_fail_and_ordinary_ones_work(box: Bench) -> None:
    script = """
import ctypes, errno, os, platform, socket, subprocess, threading
libc = ctypes.CDLL(None, use_errno=True)
column = {"x86_64": 0, "aarch64": 1}[platform.machine()]
calls = {"mount": (165, 40), "ptrace": (101, 117), "bpf": (321, 280), "keyctl": (250, 219), "unshare": (272, 97),
         "userfaultfd": (323, 282), "perf_event_open": (298, 241), "kexec_load": (246, 104),
         "finit_module": (313, 273),
         "setns": (308, 268), "clone3": (435, 435), "io_uring_setup": (425, 425)}
for name, numbers in calls.items():
    result = libc.syscall(numbers[column], 0x10000000, 0, 0, 0, 0)
    print(name, result, errno.errorcode[ctypes.get_errno()])
result = libc.syscall((56, 220)[column], 0x10000000 | 17, 0, 0, 0, 0)
print("clone into a user namespace", result, errno.errorcode[ctypes.get_errno()])
try:
    socket.socket(40, socket.SOCK_STREAM)
except OSError as error:
    print("vsock", errno.errorcode[error.errno])
thread = threading.Thread(target=lambda: print("thread"))
thread.start()
thread.join()
print(subprocess.run(["echo", "child"], capture_output=True, text=True).stdout.strip())
"""
    _, lines = await box.run(f"{SYSTEM_PYTHON} try.py", files={"try.py": script})
    assert lines[-2:] == ["thread", "child"]
    assert "vsock EAFNOSUPPORT" in lines
    for line in lines[:13]:
        wanted = "ENOSYS" if line.startswith(("clone3", "io_uring")) else "EPERM"
        assert line.endswith(f"-1 {wanted}"), line


async def test_variables_arrive_unchanged_and_are_the_only_ones(box: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AETHER_API_TOKEN", "of-the-server")
    secret = "hunter2=\n'quoted' \"$HOME\" `id` \\ ü\t"
    env = {"SECRET": secret, "EMPTY": "", "NODE_ENV": "test", "LD_PRELOAD": "/app/absent.so", "_x": "="}
    script = "console.log(JSON.stringify(process.env)); setInterval(() => 0, 1000)"
    spec = box.spec("exec node show.js", files={"show.js": script}, env=env)
    instance = await box.runtime.start(spec)
    await box.said(instance, "{")
    seen = json.loads(next(line for line in await box.lines(instance) if line.startswith("{")))
    assert {name: seen[name] for name in env} == env
    ours = {"PATH", "HOME", "TMPDIR", "LANG", "PORT", "PWD", "NPM_CONFIG_UPDATE_NOTIFIER"}
    assert set(seen) - set(env) <= ours
    assert seen["PORT"] == "3000"
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                assert b"hunter2" not in Path(f"/proc/{name}/cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
    kept = b"".join(path.read_bytes() for path in (box.data / "instances").rglob("*") if path.is_file())
    assert b"hunter2" not in kept


@pytest.mark.parametrize("env", [{"A-B": "x"}, {"PPID": "1"}, {"A": "x\0y"}, {"": "x"}])
async def test_variables_that_cannot_be_passed_are_refused_before_the_start(box: Bench, env: dict[str, str]) -> None:
    with pytest.raises(BadRequest):
        await box.runtime.start(box.spec("true", env=env))
    assert await box.runtime.known() == []


async def test_python_packages_of_the_artifact_are_found(box: Bench) -> None:
    files = {".aether/python/greeting.py": "text = 'hi'", ".aether/python/bin/tool": "#!/bin/sh\necho tool", "x": ""}
    _, lines = await box.run(f"{SYSTEM_PYTHON} -c 'import greeting; print(greeting.text)'; echo $PATH", files=files)
    assert lines[0] == "hi"
    assert lines[1].startswith("/app/.aether/python/bin:")


@pytest.mark.skipif(shutil.which("npm") is None, reason="component: npm")
async def test_npm_start_works(box: Bench) -> None:
    files = {"package.json": '{"name": "x", "scripts": {"start": "node server.js"}}', "server.js": NODE_SERVER}
    instance = await box.runtime.start(box.spec("npm start", files=files))
    assert await ask(instance) == "hello from node"


class TestLimits:
    async def _needs(self, box: Bench, name: str) -> None:
        found = await box.runtime.probe()
        if not found.limits[name].startswith("cgroup"):
            pytest.skip(f"component: {name} cgroup")

    async def test_memory(self, box: Bench) -> None:
        await self._needs(box, "memory")
        limits = Limits(memory_bytes=64 * MIB, pids=64, tmp_bytes=MIB)
        ended, lines = await box.run(f"{SYSTEM_PYTHON} -c 'x = b\"x\" * 200_000_000'", limits=limits)
        assert ended.out_of_memory
        assert "memory" in str(ended)
        assert any(line.startswith("aether: ") and "memory limit" in line for line in lines)
        ended, _ = await box.run(f"{SYSTEM_PYTHON} -c 'x = b\"x\" * 20_000_000'", limits=limits)
        assert (ended.code, ended.out_of_memory) == (0, False)

    async def test_runtimes_size_themselves_by_the_limit(self, box: Bench) -> None:
        await self._needs(box, "memory")
        limits = Limits(memory_bytes=512 * MIB, pids=64, tmp_bytes=MIB)
        script = "const v8 = require('v8'); console.log(v8.getHeapStatistics().heap_size_limit)"
        _, lines = await box.run("node heap.js", files={"heap.js": script}, limits=limits)
        assert int(lines[0]) < 512 * MIB
        _, lines = await box.run("find /sys -writable", limits=limits)
        assert lines == []

    async def test_a_fork_bomb(self, box: Bench) -> None:
        await self._needs(box, "pids")
        limits = Limits(memory_bytes=256 * MIB, pids=40, tmp_bytes=MIB)
        script = """
import os, time
made = 0
while True:
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        made += 1
    except BlockingIOError:
        print("stopped after", made, flush=True)
        break
time.sleep(60)
"""
        instance = await box.runtime.start(
            box.spec(f"{SYSTEM_PYTHON} bomb.py", files={"bomb.py": script}, limits=limits)
        )
        await box.said(instance, "stopped after")
        made = int((await box.lines(instance))[0].split()[-1])
        assert 20 <= made <= 40
        await instance.stop(0.0)

    async def test_cpu(self, box: Bench) -> None:
        await self._needs(box, "cpu")
        script = """
import time
began, used = time.monotonic(), time.process_time()
while time.monotonic() - began < 1.5:
    pass
print((time.process_time() - used) / (time.monotonic() - began))
"""
        limits = Limits(memory_bytes=64 * MIB, cpus=0.25, pids=64, tmp_bytes=MIB)
        _, lines = await box.run(f"{SYSTEM_PYTHON} spin.py", files={"spin.py": script}, limits=limits)
        assert float(lines[0]) < 0.35

    async def test_two_instances_have_limits_of_their_own(self, box: Bench) -> None:
        await self._needs(box, "memory")
        limits = Limits(memory_bytes=64 * MIB, pids=64, tmp_bytes=MIB)
        command = f"{SYSTEM_PYTHON} -c 'x = b\"x\" * 40_000_000; print(len(x))'"
        results = await asyncio.gather(*(box.run(command, limits=limits) for _ in range(3)))
        assert [ended.code for ended, _ in results] == [0, 0, 0]
