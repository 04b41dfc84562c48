"""The Firecracker driver on the real Firecracker and its real jailer, as far as a machine can go without its guest.

Where guests do not boot by KVM, all but the last test run: the monitor does everything it is asked for, and only
what the guest itself would say or do stays out. `running` is when the guest's processors run.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import pytest

from aether.model.errors import ConfigError, Conflict, NotFound, ServiceUnavailable
from aether.model.function_instance import FunctionPhase
from aether.runtimes.firecracker import jail as jails
from aether.runtimes.firecracker.api import Call
from aether.runtimes.firecracker.jail import Jail, Programs
from aether.runtimes.firecracker.machine import Machine
from aether.runtimes.firecracker.runtime import FirecrackerRuntime
from aether.settings import load
from aether.topology.functions import open_runtime
from support.firecracker import (
    CALLS,
    FILES,
    KILLED,
    PROGRAMS,
    answer,
    boots,
    left,
    limited,
    machines,
    monitor,
    need_firecracker,
    running,
)
from support.microvm import cache, code, spec


async def asked(runtime: FirecrackerRuntime, instance_id: str) -> list[str]:
    """The calls that the monitor itself says it received, in their order."""
    said = "\n".join(record.text for record in await runtime.log(instance_id, 1000))
    return [f"{verb} {path}" for verb, path in re.findall(r'received a (\w+) request on "([^"]+)"', said)]


async def test_a_machine_is_told_everything_in_order_and_says_so(tmp_path: Path) -> None:
    async with machines(tmp_path / "data", level="Info") as runtime:
        work = spec(code(tmp_path / "in", FILES), env={"A": "ä\n"}, memory_mb=192, vcpus=2, port=8123)
        machine = await running(await runtime.launch(work))
        assert await asked(runtime, "i1") == CALLS
        config = await answer(machine, "/vm/config")
        assert {key: config["machine-config"][key] for key in ("vcpu_count", "mem_size_mib", "smt")} == {
            "vcpu_count": 2, "mem_size_mib": 192, "smt": False,
        }  # fmt: skip
        assert config["boot-source"]["kernel_image_path"] == "/vmlinux"
        assert config["boot-source"]["initrd_path"] == "/initramfs"
        assert [(item["drive_id"], item["is_read_only"]) for item in config["drives"]] == [
            ("rootfs", True), ("code", True),
        ]  # fmt: skip
        assert config["network-interfaces"][0]["host_dev_name"] == "tap0"
        assert config["mmds-config"] == {
            "version": "V2", "network_interfaces": ["eth0"], "ipv4_address": "169.254.169.254",
        }  # fmt: skip
        # what /init asks for: the path ends in the token that the kernel's command line ends in
        token = config["boot-source"]["boot_args"].rpartition("aether.token=")[2]
        told = (await answer(machine, "/mmds"))["latest"]["aether"]
        assert list(told) == [token]
        records = b64decode(told[token]).decode().split("\0")
        assert records[0] == "v=1"
        assert [record[:2] for record in records].count("r=") == 1
        assert {"p=8123", "a=/usr/bin/node", "a=index.js", "e=A=ä\n", "e=PORT=8123", "z="} <= set(records)
        assert (await answer(machine, "/"))["state"] == "Running"
        assert (await runtime.status("i1")).phase == FunctionPhase.STARTING
        await machine.pause()
        assert (await answer(machine, "/"))["state"] == "Paused"
        await machine.resume()
        assert (await answer(machine, "/"))["state"] == "Running"
        with pytest.raises(
            ServiceUnavailable, match=r"Firecracker refuses PUT /actions: .*not supported after starting"
        ):
            await machine.call(Call("PUT", "/actions", {"action_type": "InstanceStart"}))
        with pytest.raises(Conflict):
            await runtime.launch(work)
        waiting = asyncio.create_task(runtime.wait("i1"))
        assert await runtime.stop("i1", 0.0) == KILLED
        assert await waiting == KILLED
        assert await runtime.list() == []
        assert left(tmp_path / "data") == []
        with pytest.raises(NotFound):
            await runtime.status("i1")
        assert await asked(runtime, "i1") != []


async def test_the_jail_holds_the_machines_own_files_and_rights_only(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with machines(data) as runtime:
        work = code(tmp_path / "in", FILES)
        both = [await running(await runtime.launch(spec(work, name, memory_mb=160))) for name in ("a", "b")]
        first, second = (machine.plan.jail for machine in both)
        assert first.user != second.user
        for machine in both:
            _check_process(data, machine)
            _check_files(data, machine)
            _check_limits(data, machine)
        spaces = [{os.readlink(f"/proc/{pid}/ns/{kind}") for pid in (monitor(data, both[0]), monitor(data, both[1]))}
                  for kind in ("net", "mnt", "pid")]  # fmt: skip
        assert [len(each) for each in spaces] == [2, 2, 2]
        # neither another machine's user nor that of the machine itself gets to the host's side of a jail
        for user in (first.user, second.user):
            _check_closed(data, first, user)
        assert {oct(item.stat().st_mode & 0o077) for item in data.rglob("*") if "root" not in item.parts} == {"0o0"}


def _check_process(data: Path, machine: Machine) -> None:
    pid, user = monitor(data, machine), str(machine.plan.jail.user)
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert status["Uid"].split() == status["Gid"].split() == [user] * 4
    assert status["Groups"].strip() == ""
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapAmb"], 16) == 0
    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "1"
    assert status["NSpid"].split()[1:] == ["1"]
    bounds = dict(re.findall(r"^(Max [a-z ]+?) {2,}(\d+)", Path(f"/proc/{pid}/limits").read_text(), re.MULTILINE))
    assert bounds["Max open files"] == str(jails.MAX_OPEN_FILES)
    assert int(bounds["Max file size"]) == (160 + 64) << 20
    # the boot token is on the guest's command line only
    assert b"aether.token" not in Path(f"/proc/{pid}/cmdline").read_bytes()


def _check_files(data: Path, machine: Machine) -> None:
    root, user = Path(f"/proc/{monitor(data, machine)}/root"), machine.plan.jail.user
    assert {item.name for item in root.iterdir()} == {
        "vmlinux", "initramfs", "rootfs", "code", "api.socket", "dev", "run", "firecracker", "firecracker.pid",
    }  # fmt: skip
    for name, source in machine.plan.files.items():
        seen, outside = (root / name).stat(), source.stat()
        assert (seen.st_uid, seen.st_gid) == (user, user), name
        assert (outside.st_uid, outside.st_gid) == (0, 0), name
        assert os.path.samestat(seen, outside)
        if name in (jails.ROOTFS, jails.CODE):
            assert seen.st_mode & 0o777 == 0o600
        with pytest.raises(OSError, match="Read-only"):
            os.open(root / name, os.O_WRONLY)
    listener = (root / "api.socket").stat()
    assert (listener.st_mode & 0o777, listener.st_uid) == (0o700, user)


def _check_limits(data: Path, machine: Machine) -> None:
    place, pid = machine.plan.jail, str(monitor(data, machine))
    found: dict[str, str] = {}
    for root in limited().roots:
        group = root / place.parent / place.name
        assert pid in (group / "cgroup.procs").read_text().split()
        for name in ("memory.limit_in_bytes", "memory.max", "cpu.cfs_quota_us", "cpu.max", "pids.max"):
            if (group / name).exists():
                found[name] = (group / name).read_text().strip()
    memory = str((160 + 64) << 20)
    if limited().version == 1:
        assert found == {"memory.limit_in_bytes": memory, "cpu.cfs_quota_us": "100000", "pids.max": "17"}
    else:
        assert found == {"memory.max": memory, "cpu.max": "100000 100000", "pids.max": "17"}


def _check_closed(data: Path, place: Jail, user: int) -> None:
    target = os.fspath(place.root / "api.socket")
    assert os.stat(target)
    ask = ["curl", "-s", "-m", "5", "--unix-socket", target, "http://localhost/mmds"]
    for command in (ask, ["cat", os.fspath(place.root / "firecracker")]):
        done = subprocess.run(command, user=user, group=user, extra_groups=[], capture_output=True, check=False)
        assert done.returncode != 0
        assert done.stdout == b""


async def test_snapshots_are_taken_and_loaded_into_fresh_jails(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with machines(data, level="Info") as runtime:
        work = code(tmp_path / "in", FILES)
        first = await running(await runtime.launch(spec(work, "first", env={"A": "1"})))
        taken = await first.take_snapshot(data / "state", data / "memory")
        assert (await answer(first, "/"))["state"] == "Paused"
        await first.resume()
        for file in (taken.state, taken.memory):
            seen = file.stat()
            assert (seen.st_mode & 0o777, seen.st_uid, seen.st_gid, seen.st_nlink) == (0o600, 0, 0, 1)
        assert taken.memory.stat().st_size == 128 << 20
        await runtime.stop("first", 0.0)
        before = taken.memory.stat().st_mtime_ns
        loaded = [
            await running(await runtime.launch(spec(work, name, env={"A": name}), taken)) for name in ("x", "y")
        ]
        for machine in loaded:
            name = machine.spec.instance_id
            assert await asked(runtime, name) == ["Put /snapshot/load", "Put /mmds", "Patch /vm"]
            assert (await answer(machine, "/"))["state"] == "Running"
            config = await answer(machine, "/vm/config")
            assert config["mmds-config"]["version"] == "V2"
            told = (await answer(machine, "/mmds"))["latest"]["aether"]
            assert list(told) == [taken.token]
            assert f"e=A={name}" in b64decode(told[taken.token]).decode().split("\0")
        # a loaded machine can be written down in its turn; what it was loaded from stays as it is
        again = await loaded[0].take_snapshot(data / "state2", data / "memory2")
        await runtime.stop("x", 5.0)
        assert again.memory.stat().st_size == 128 << 20
        assert taken.memory.stat().st_mtime_ns == before
        await running(await runtime.launch(spec(work, "z"), again))


async def test_a_machine_that_ends_by_itself_is_seen_to_and_its_log_stays(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with machines(data, level="Info") as runtime:
        machine = await running(await runtime.launch(spec(code(tmp_path / "in", FILES))))
        os.kill(monitor(data, machine), signal.SIGKILL)
        assert await runtime.wait("i1") == KILLED
        status = await runtime.status("i1")
        assert (status.phase, status.exit, status.reason) == (
            FunctionPhase.EXITED, KILLED, "the machine ended without a word",
        )  # fmt: skip
        assert left(data) == []
        assert await runtime.list() == ["i1"]
        with pytest.raises(ServiceUnavailable):
            await machine.pause()
        with pytest.raises(OSError):
            await runtime.connect("i1")
        assert await runtime.stop("i1", 5.0) == KILLED
        assert await runtime.list() == []


SERVER = """
import asyncio, sys
from pathlib import Path
from support.firecracker import options, running
from support.microvm import code, spec
from aether.runtimes.firecracker.runtime import FirecrackerRuntime

async def main():
    data = Path(sys.argv[1])
    runtime = FirecrackerRuntime(data, options())
    work = code(data / "in", {"index.js": ""})
    for name in ("one", "two"):
        await running(await runtime.launch(spec(work, name)))
    print("up", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_what_a_killed_server_left_is_swept_and_another_servers_is_not(tmp_path: Path) -> None:
    need_firecracker()
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    environment = {**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parents[1])}
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, os.fspath(data), stdout=subprocess.PIPE, env=environment
    )
    assert server.stdout is not None
    assert await server.stdout.readline() == b"up\n"
    server.kill()
    await server.wait()
    kinds = {item.split(" ")[0] for item in left(data)}
    assert {"jail", "cgroup"} <= kinds
    async with machines(tmp_path / "other") as other:
        machine = await running(await other.launch(spec(code(tmp_path / "in", FILES), "mine")))
        async with machines(data) as runtime:
            assert await other.sweep() == []
            assert await runtime.sweep() == ["one", "two"]
            assert left(data) == []
            assert await runtime.sweep() == []
        assert (await answer(machine, "/"))["state"] == "Running"


async def test_sweeping_spares_what_runs(tmp_path: Path) -> None:
    async with machines(tmp_path / "data") as runtime:
        machine = await running(await runtime.launch(spec(code(tmp_path / "in", FILES))))
        assert await runtime.sweep() == []
        assert (await answer(machine, "/"))["state"] == "Running"


async def test_missing_programs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_firecracker()
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    runtime = FirecrackerRuntime(tmp_path / "data")
    with pytest.raises(ServiceUnavailable, match="jailer is missing in PATH"):
        runtime.programs()
    for name in ("jailer", "firecracker"):
        (tmp_path / name).symlink_to(getattr(PROGRAMS, name))
    assert runtime.programs() == Programs(PROGRAMS.jailer.resolve(), PROGRAMS.firecracker.resolve())


async def test_a_server_has_it_when_told_to_and_refuses_when_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_firecracker()
    told = load({"AETHER_FUNCTION_RUNTIME": "firecracker"}, data_dir=tmp_path / "home")
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(ConfigError, match=r"AETHER_FUNCTION_RUNTIME=firecracker: .*jailer is missing in PATH"):
        open_runtime(told, tmp_path)
    monkeypatch.setenv("PATH", os.fspath(PROGRAMS.jailer.parent))
    runtime, words = open_runtime(told, tmp_path)
    assert isinstance(runtime, FirecrackerRuntime)
    assert words == "functions in a Firecracker machine each"
    await runtime.close()


async def test_where_guests_do_not_boot_a_start_says_so_instead_of_waiting(tmp_path: Path) -> None:
    async with machines(tmp_path / "data") as runtime:
        if await boots(runtime):
            pytest.skip("unsupported: firecracker: telling of guests that do not boot, where they do")
        work = code(tmp_path / "in", FILES)
        with pytest.raises(ServiceUnavailable, match="do not run by KVM here: a guest that was booted"):
            await runtime.start(spec(work))
        with pytest.raises(ServiceUnavailable, match="do not run by KVM here"):
            await runtime.prepare("node", work)
        assert await runtime.list() == []
        # that is known for a while, and not kept: the next server asks again
        jailed = (tmp_path / "data" / "jails" / "firecracker").stat().st_mtime_ns
        with pytest.raises(ServiceUnavailable, match="do not run by KVM here"):
            await runtime.check_machines()
        assert (tmp_path / "data" / "jails" / "firecracker").stat().st_mtime_ns == jailed
        assert not (cache() / "guests" / "firecracker.json").exists()


async def test_a_function_answers(tmp_path: Path) -> None:
    source = (Path(__file__).parents[1] / "support" / "function.js").read_text()
    async with machines(tmp_path / "data") as runtime:
        if not await boots(runtime):
            pytest.skip("unsupported: firecracker: booting its guest on this processor")
        await runtime.start(spec(code(tmp_path / "in", {"index.js": source})))
        loop = asyncio.get_running_loop()
        with await runtime.connect("i1") as sock:
            await loop.sock_sendall(sock, b"GET /who HTTP/1.0\r\n\r\n")
            assert (await loop.sock_recv(sock, 65536)).startswith(b"HTTP/1.1 200")
        machine = runtime._held("i1")  # pyright: ignore[reportPrivateUsage]
        assert await answer(machine, "/mmds") == {}
        assert (await runtime.stop("i1", 10.0)).code is not None
