"""The pure parts of Firecracker's machines: what jailer and monitor are told, limits, how answers are read."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest

from aether.model.errors import ServiceUnavailable
from aether.runtimes.firecracker.api import PAUSE, SNAPSHOT, Api, Call, boot_calls, load_calls
from aether.runtimes.firecracker.cgroups import Cgroups, find_cgroups, limits
from aether.runtimes.firecracker.jail import Jail, Programs, jailer_command
from aether.runtimes.firecracker.runtime import document
from aether.runtimes.firecracker.users import Users
from aether.runtimes.microvm.assignment import MAX_BYTES

MMDS_BYTES = 51_200

OLD = """\
tmpfs /sys/fs/cgroup tmpfs ro 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/pids cgroup rw,relatime,pids 0 0
cgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0
"""


def test_the_version_of_cgroups_is_that_of_the_controllers() -> None:
    roots = tuple(Path("/sys/fs/cgroup", name) for name in ("cpu,cpuacct", "memory", "pids"))
    assert find_cgroups(OLD) == Cgroups(1, roots)
    assert find_cgroups("cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n") == Cgroups(2, (Path("/sys/fs/cgroup"),))
    for mounts, missing in (("", "cpu, memory, pids"), (OLD.replace("memory 0", "hugetlb 0"), "memory")):
        with pytest.raises(ServiceUnavailable, match=f"no cgroup controller for {missing}$"):
            find_cgroups(mounts)


def test_limits_are_the_guests_and_room_for_its_monitor() -> None:
    assert limits(1, 128, 2) == ["memory.limit_in_bytes=201326592", "cpu.cfs_quota_us=200000", "pids.max=18"]
    assert limits(2, 128, 2) == ["memory.max=201326592", "cpu.max=200000 100000", "pids.max=18"]


def test_the_jailer_is_told_everything_and_the_monitor_nothing_secret() -> None:
    place = Jail(Path("/data/jails"), "firecracker", "aether-0123", "89ab", 270_001)
    assert place.root == Path("/data/jails/firecracker/aether-0123-89ab/root")
    command = jailer_command(
        Programs(Path("/bin/jailer"), Path("/bin/firecracker")), place, network="/proc/1/fd/9",
        cgroup_version=2, memory_mb=128, vcpus=1, level="Error",
    )  # fmt: skip
    assert command == [
        "/bin/jailer", "--id", "aether-0123-89ab", "--exec-file", "/bin/firecracker",
        "--uid", "270001", "--gid", "270001", "--chroot-base-dir", "/data/jails", "--netns", "/proc/1/fd/9",
        "--new-pid-ns", "--cgroup-version", "2", "--parent-cgroup", "aether-0123",
        "--cgroup", "memory.max=201326592", "--cgroup", "cpu.max=100000 100000", "--cgroup", "pids.max=17",
        "--resource-limit", "no-file=256", "--resource-limit", "fsize=201326592",
        "--", "--api-sock", "/api.socket", "--level", "Error",
    ]  # fmt: skip


def test_calls_come_in_the_order_that_the_monitor_wants() -> None:
    calls = boot_calls(memory_mb=128, vcpus=1, arguments="quiet", document={"a": 1})
    assert [str(call) for call in calls] == [
        "PUT /machine-config", "PUT /boot-source", "PUT /drives/rootfs", "PUT /drives/code",
        "PUT /network-interfaces/eth0", "PUT /mmds/config", "PUT /mmds", "PUT /actions",
    ]  # fmt: skip
    bodies = {call.path: call.body or {} for call in calls}
    assert all(bodies[f"/drives/{name}"]["is_read_only"] is True for name in ("rootfs", "code"))
    assert bodies["/mmds/config"]["version"] == "V2"
    bare = boot_calls(memory_mb=128, vcpus=1, arguments="quiet", document=None)
    assert [str(call) for call in bare] == ["PUT /machine-config", "PUT /boot-source", "PUT /actions"]
    loading = load_calls({"a": 1})
    assert [str(call) for call in loading] == ["PUT /snapshot/load", "PUT /mmds", "PATCH /vm"]
    # metadata first: a guest that runs may ask for it at once
    assert (loading[0].body or {})["resume_vm"] is False
    assert (SNAPSHOT.body or {})["mem_file_path"] != (loading[0].body or {})["mem_backend"]


def test_the_largest_assignment_fits_the_metadata_service() -> None:
    assert len(json.dumps(document("f" * 64, b"x" * MAX_BYTES)).encode()) <= MMDS_BYTES


def test_a_user_is_taken_once_on_the_machine_and_can_be_had_again() -> None:
    first, second = Users(), Users()
    try:
        taken = [first.take(), second.take(), first.take()]
        assert len(set(taken)) == 3
        second.release(taken[1])
        assert second.take() == taken[1]
        first.release(1)
    finally:
        first.close()
        second.close()


async def told(answer: bytes | None, call: Call = PAUSE) -> object:
    """What a client makes of `answer`, after which the monitor hangs up; it says nothing and stays when None."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    api = await Api.over(ours)
    try:
        with theirs:
            if answer is not None:
                theirs.sendall(answer)
                theirs.shutdown(socket.SHUT_WR)
            return await api.make(call)
    finally:
        api.close()


async def test_answers_are_read_and_refusals_are_in_the_monitors_words() -> None:
    assert await told(b"HTTP/1.1 204 \r\nServer: x\r\nConnection: keep-alive\r\n\r\n") is None
    assert await told(b"HTTP/1.1 200 \r\ncontent-length: 8\r\n\r\n" + b'{"a": 1}') == {"a": 1}
    fault = json.dumps({"fault_message": "no\nsuch  thing " + "x" * 5000}).encode()
    with pytest.raises(ServiceUnavailable, match=r"^Firecracker refuses PATCH /vm: no such thing x{1,500}$"):
        await told(b"HTTP/1.1 400 \r\nContent-Length: %d\r\n\r\n%s" % (len(fault), fault))
    with pytest.raises(ServiceUnavailable, match=r"refuses PATCH /vm: 400$"):
        await told(b"HTTP/1.1 400 \r\n\r\n")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 2",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 x y\r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: 9\r\n\r\n{}",
        b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{]",
        b"HTTP/1.1 200 \r\nContent-Length: 99999999\r\n\r\n",
        b"x" * 70_000,
    ],
    ids=["nothing", "cut", "nonsense", "status", "short", "json", "large", "endless"],
)
async def test_what_cannot_be_understood_is_an_end(answer: bytes) -> None:
    with pytest.raises(ServiceUnavailable, match="ended or hung up at PATCH /vm"):
        await told(answer)


async def test_a_monitor_that_says_nothing_is_not_waited_for_without_end() -> None:
    with pytest.raises(ServiceUnavailable, match=r"did not answer GET / within 0\.05 seconds"):
        await told(None, Call("GET", "/", secs=0.05))


async def test_a_call_that_was_given_up_ends_the_connection() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    api = await Api.over(ours)
    with theirs:
        task = asyncio.create_task(api.make(PAUSE))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # the answer to the one must not be taken for that to the next
        with pytest.raises(ServiceUnavailable, match="ended or hung up"):
            await api.make(PAUSE)
