"""Where an instance's connections may go, dialled from inside real sandboxes."""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aether.runtimes.process import RuntimeOptions
from aether.runtimes.process.egress import parse
from support.runtimes import Bench, bench

SYSTEM_PYTHON = "/usr/bin/python3"

DIAL = """
import errno, json, socket, sys, time
targets = json.loads(sys.argv[1])
for _ in range(500):  # until the way out is there
    if any(row.split()[:2] == ["tap0", "00000000"] for row in open("/proc/net/route")):
        break
    time.sleep(0.01)
for host, port in targets:
    for how in ("plain", "device", "udp", "udp device"):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM if "udp" in how else socket.SOCK_STREAM)
            sock.settimeout(5)
            if "device" in how:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"tap0")
            sock.connect((host, port))
            if "udp" in how:
                sock.send(b"hello")
            result = "reached"
        except OSError as error:
            result = errno.errorcode.get(error.errno, str(error))
        print(json.dumps([host, port, how, result]), flush=True)
"""


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(tmp_path / "data") as made:
        if not (await made.runtime.probe()).egress.startswith("slirp"):
            pytest.skip("component: slirp4netns")
        yield made


def own_addresses() -> list[str]:
    """Every address of this machine but loopback, from the kernel's own tables."""
    done = subprocess.run(["ip", "-j", "address"], capture_output=True, text=True, check=True)
    found = [
        entry["local"] + (f"%{link['ifname']}" if entry["scope"] == "link" and ":" in entry["local"] else "")
        for link in json.loads(done.stdout)
        for entry in link["addr_info"]
        if entry["scope"] != "host"
    ]
    if not found:
        pytest.skip("component: an address besides loopback")
    return found


async def dial(box: Bench, targets: list[tuple[str, int]]) -> list[list[object]]:
    ended, lines = await box.run(f"{SYSTEM_PYTHON} dial.py '{json.dumps(targets)}'", files={"dial.py": DIAL})
    assert ended.code == 0, lines
    return [json.loads(line) for line in lines]


class Listeners:
    """A TCP and a UDP socket on every address of this machine, on one port."""

    def __init__(self) -> None:
        self.tcp = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        self.port = int(self.tcp.getsockname()[1])
        self.udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        self.udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.udp.bind(("::", self.port))

    def heard(self) -> list[str]:
        """Who connected or sent something; never waits."""
        found: list[str] = []
        for sock in (self.tcp, self.udp):
            sock.setblocking(False)
            try:
                found.append(str(sock.accept()[1] if sock is self.tcp else sock.recvfrom(100)))
            except BlockingIOError:
                continue
        return found

    def __enter__(self) -> Listeners:
        return self

    def __exit__(self, *_: object) -> None:
        self.tcp.close()
        self.udp.close()


@pytest.mark.skipif(shutil.which("ip") is None, reason="component: iproute2")
async def test_no_address_of_the_machine_can_be_reached(box: Bench) -> None:
    with Listeners() as listeners:
        for address in own_addresses():  # the listeners do answer there
            socket.create_connection((address, listeners.port), 5).close()
            listeners.tcp.accept()[0].close()
        hosts = [*own_addresses(), "127.0.0.1", "::1", "10.0.2.2", "0.0.0.0", "255.255.255.255"]
        results = await dial(box, [(host.partition("%")[0], listeners.port) for host in hosts])
        reached = [row for row in results if row[3] == "reached" and "udp" not in str(row[2])]
        assert reached == []
        assert listeners.heard() == []  # a datagram is "sent" whether or not it arrives


@pytest.mark.skipif(shutil.which("ip") is None, reason="component: iproute2")
async def test_an_address_allowed_by_name_can_be_reached(tmp_path: Path, box: Bench) -> None:
    address = next((a for a in own_addresses() if ":" not in a), None)
    if address is None:
        pytest.skip("component: an IPv4 address besides loopback")
    options = RuntimeOptions(egress=parse("public", [address]))
    async with bench(tmp_path / "allowing", options) as allowing:
        with Listeners() as listeners:
            assert [address, listeners.port, "plain", "reached"] in await dial(allowing, [(address, listeners.port)])


async def test_private_ranges_are_a_setting(tmp_path: Path, box: Bench) -> None:
    async with bench(tmp_path / "public", RuntimeOptions(egress=parse("public", ["10.9.0.0/16"]))) as public:
        hosts = ["10.1.2.3", "172.20.0.1", "192.168.1.1", "100.64.0.1", "224.0.0.1", "169.254.169.254"]
        results = await dial(public, [(host, 9) for host in hosts])
        assert {(row[0], row[3]) for row in results if row[2] == "plain"} == {(h, "EHOSTUNREACH") for h in hosts}
        _, lines = await public.run("cat /proc/net/route | grep -c tap0; cat /etc/resolv.conf")
        assert "nameserver 10.0.2.3" in lines


async def test_no_way_out_at_all_is_a_setting(tmp_path: Path, box: Bench) -> None:
    async with bench(tmp_path / "none", RuntimeOptions(egress=parse("none", []))) as none:
        assert "AETHER_APP_EGRESS=none" in (await none.runtime.probe()).egress
        script = "import socket; socket.create_connection(('192.0.2.1', 9), 5)"
        ended, lines = await none.run(f'sleep 0.3; ls /sys/class/net 2>&1; {SYSTEM_PYTHON} -c "{script}"')
        assert ended.code == 1
        assert "Network is unreachable" in lines[-1]


FOLLOW = """
import ctypes, os, select, subprocess, sys
sys.path.insert(0, sys.argv[1])
from shim.routes import Follower, Machine, Refusals, parse

def ip(*words):
    subprocess.run(["ip", *words], check=True)

def routes():
    return sorted(line.split()[1] for line in os.popen("ip -4 route show type unreachable"))

ip("link", "set", "lo", "up")
ip("tuntap", "add", "there", "mode", "tun")
ip("link", "set", "there", "up")
ip("address", "add", "203.0.113.5/24", "dev", "there")
machine = Machine()
ours = os.open("/proc/self/ns/net", os.O_RDONLY)
os.unshare(os.CLONE_NEWNET) if hasattr(os, "unshare") else ctypes.CDLL(None).unshare(0x40000000)
ip("link", "set", "lo", "up")
follower = Follower(machine, Refusals([parse(b"169.254.0.0/16")], [parse(b"203.0.113.64/26")]))
poll = select.epoll()
fd = follower.register(poll)
follower.begin()
print(routes(), flush=True)

def change(*words):
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).setns(ours, 0)
        os.execvp("ip", ["ip", *words])
    os.waitpid(pid, 0)
    while poll.poll(0.3):  # several messages belong to one change
        follower.news()
    print(routes(), flush=True)

change("address", "add", "198.51.100.7/32", "dev", "there")
change("address", "add", "203.0.113.70/32", "dev", "there")
change("route", "add", "local", "192.0.2.0/25", "dev", "lo")
change("address", "del", "203.0.113.5/24", "dev", "there")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="component: network namespaces without a user namespace (root)")
@pytest.mark.skipif(shutil.which("ip") is None, reason="component: iproute2")
def test_addresses_that_come_and_go_are_followed() -> None:
    import aether.runtimes.process

    package = str(Path(aether.runtimes.process.__file__).parent)
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", FOLLOW, package], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    seen = [set(ast.literal_eval(line)) for line in done.stdout.splitlines()]
    assert seen[0] == {"169.254.0.0/16", "203.0.113.5"}
    assert seen[1] == seen[0] | {"198.51.100.7"}
    assert seen[2] == seen[1], "an allowed address is refused"
    assert seen[3] == seen[1] | {"192.0.2.0/25"}
    assert "203.0.113.5" not in seen[4]
    assert "198.51.100.7" in seen[4]
