# ruff: noqa: E501 - the programs inside are easier to read with their lines whole
"""An app that means harm, run by the product: what it tries from inside, and what others notice."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from support.product import HELLO, Product, node_app, product

MIB = 1 << 20

PRELUDE = """
const fs = require('fs'), net = require('net'), http = require('http'), { spawn, execFileSync } = require('child_process');
const attempt = (f) => { try { const r = f(); return r === undefined ? 'done' : r; } catch (e) { return e.code || String(e); } };
"""

SPY = (
    PRELUDE
    + """
const dial = (options) => new Promise((resolve) => {
  const s = net.connect(options); s.setTimeout(3000, () => { s.destroy(); resolve('ETIMEDOUT'); });
  s.on('connect', () => { s.destroy(); resolve('connected'); }); s.on('error', (e) => resolve(e.code)); });
const sh = (text) => { try { return execFileSync('/bin/sh', ['-c', '(' + text + ') 2>&1'], { encoding: 'utf8' }).trim(); }
  catch (e) { return 'status ' + e.status + ' ' + String(e.stdout).trim(); } };
http.createServer(async (request, response) => {
  if (request.url === '/') return response.end('spy');
  const { data, home, abstract, neighbour } = JSON.parse(decodeURIComponent(request.url.slice(2)));
  const found = {};
  for (const [name, path] of Object.entries({
    'api socket': data + '/run/api.sock', 'keeper socket': data + '/instances/' + neighbour + '/shim.sock',
    abstract: '\\0' + abstract, 'docker': '/var/run/docker.sock', dbus: '/run/dbus/system_bus_socket' }))
    found[name] = await dial({ path });
  for (const path of [data, data + '/aether.db', data + '/admin-token', data + '/signing.key', data + '/instances',
    data + '/releases', data + '/logs', '/etc/shadow', '/proc/1/' + 'root/etc/shadow', '/proc/kcore', '/dev/mem',
    '/dev/kmsg', '/sys/kernel/security', '/sys/fs/cgroup/memory/tasks', '/proc/sys/kernel/core_pattern', '/proc/sysrq-trigger'])
    found['open ' + path.replace(data, 'DATA')] = attempt(() => { fs.readdirSync(path); return 'listed'; }) === 'listed'
      ? 'listed' : attempt(() => { fs.closeSync(fs.openSync(path, 'r+')); return 'opened'; });
  found.home = attempt(() => fs.readdirSync(home));
  found.descriptors = fs.readdirSync('/proc/self/fd').map((fd) => attempt(() => fs.readlinkSync('/proc/self/fd/' + fd)))
    .filter((target) => !/^(socket|pipe|anon_inode):|^\\/dev\\/(null|urandom)|^\\/proc\\/|ENOENT/.test(target));
  found.others = fs.readdirSync('/proc').filter((name) => /^[0-9]+$/.test(name)).map(Number)
    .filter((pid) => !fs.readFileSync('/proc/' + pid + '/cgroup', 'utf8')).length;
  found.kill = [1000, 10000, 100000].map((pid) => attempt(() => { process.kill(pid, 0); return 'alive'; }));
  found.dmesg = sh('dmesg'); found.mount = sh('mount -t tmpfs x /tmp'); found.umount = sh('umount /tmp');
  found.unshare = sh('unshare -U true; unshare -n true; unshare -m true'); found.setuid = sh('su -c id; id -u');
  found.find = sh('find / -xdev -perm -4000 -type f 2>/dev/null | head -1 | xargs -r stat -c %u >/dev/null; grep NoNewPrivs /proc/self/status');
  found.hostname = sh('hostname evil'); found.mknod = sh('mknod /tmp/disk b 254 0');
  found.bind = await new Promise((resolve) => { const s = net.createServer(); s.on('error', (e) => resolve(e.code));
    s.listen(80, '0.0.0.0', () => { s.close(); resolve('own port 80'); }); });
  response.end(JSON.stringify(found));
}).listen(process.env.PORT);
"""
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """A product whose apps have little, and a neighbour that must not notice anything."""
    limits = {
        "AETHER_APP_MEMORY_BYTES": str(96 * MIB),
        "AETHER_APP_PIDS": "48",
        "AETHER_APP_CPUS": "0.5",
        "AETHER_APP_TMP_BYTES": str(4 * MIB),
        "AETHER_APP_LOG_BYTES": str(MIB),
        "AETHER_APP_OPEN_FILES": "256",
    }
    with product(tmp_path_factory.mktemp("small"), **limits) as it:
        it.deploy(node_app(it.home / "neighbour", HELLO % "fine"))
        yield it


def neighbour_is_fine(up: Product, secs: float = 3.0) -> None:
    began = time.monotonic()
    assert up.get("neighbour") == (200, "fine\n")
    assert up.api("GET", "/apps")[0] == 200
    assert time.monotonic() - began < secs, "a neighbour slowed others down"


def deployed(up: Product, tmp_path: Path, name: str, code: str) -> None:
    up.deploy(node_app(tmp_path / name, PRELUDE + code))


def instances_of(up: Product, app: str) -> list[Path]:
    """Folders of the app's instances, by what their records say."""
    found: list[Path] = []
    for folder in (up.data / "instances").iterdir():
        if any(f'"{app}"' in path.read_text(errors="replace") for path in folder.glob("*.json")):
            found.append(folder)
    return found


def cgroup(up: Product, app: str, controller: str) -> Path:
    for folder in instances_of(up, app):
        for root in (Path("/sys/fs/cgroup") / controller, Path("/sys/fs/cgroup")):
            for found in root.rglob(folder.name):
                return found
    pytest.skip(f"component: {controller} cgroup")


def test_a_spy_finds_nothing(up: Product, tmp_path: Path) -> None:
    up.deploy(node_app(tmp_path / "victim", HELLO % "victim"))
    victim = instances_of(up, "victim")[0].name
    up.deploy(node_app(tmp_path / "spy", SPY))
    name = f"aether-test-{up.port}"
    with socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0" + name)
        abstract.listen()
        asked = {"data": str(up.data), "home": str(Path.home()), "abstract": name, "neighbour": victim}
        status, body = up.get("spy", "/?" + quote(json.dumps(asked)))
    assert status == 200
    seen: dict[str, Any] = json.loads(body)
    for what, result in seen.items():
        if what.startswith("open ") or "socket" in what or what in ("abstract", "docker", "dbus"):
            assert result not in ("connected", "opened", "listed"), (what, result)
    # a toolchain in the server's home is shown, and the folders that lead to it, but nothing beside them
    python = Path(os.path.realpath(sys.executable))
    shown = {python.relative_to(Path.home()).parts[0]} if Path.home() in python.parents else set[str]()
    assert seen["home"] == "ENOENT" or set(seen["home"]) <= shown, seen["home"]
    assert seen["descriptors"] == []
    assert "alive" not in seen["kill"], seen["kill"]
    for what in ("dmesg", "mount", "umount", "unshare", "hostname", "mknod"):
        assert seen[what].startswith("status "), (what, seen[what])
    assert seen["unshare"].count("not permitted") == 3, seen["unshare"]
    assert seen["setuid"].splitlines()[-1] != "0"
    assert seen["find"].split() == ["NoNewPrivs:", "1"]
    assert seen["bind"] in ("own port 80", "EACCES"), "its own network namespace, or no right to it"
    assert up.get("victim") == (200, "victim\n")


def test_memory_beyond_the_limit_ends_the_instance_and_says_so(small: Product, tmp_path: Path) -> None:
    code = """
    const held = [];
    http.createServer((request, response) => {
      if (request.url === '/eat') for (;;) held.push(Buffer.alloc(8 << 20, 1));
      response.end('hungry');
    }).listen(process.env.PORT);
    """
    deployed(small, tmp_path, "hungry", code)
    assert small.process is not None
    server = small.process.pid
    assert small.get("hungry", "/eat")[0] in (502, 503)
    neighbour_is_fine(small)
    deadline = time.monotonic() + 30
    while small.get("hungry")[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert small.process.pid == server
    lines = small.run("logs", "--app", "hungry", "--tail", "50").stdout
    assert "memory limit" in lines, lines
    # one that never gets up says why its deployment failed
    failed = small.deploy(
        node_app(tmp_path / "glutton", "const h = []; for (;;) h.push(Buffer.alloc(8 << 20, 1));"), "--timeout", "8",
        check=False,
    )  # fmt: skip
    assert failed.code == 50
    assert "memory" in failed.json["error"]["message"], failed.json


def test_a_fork_bomb_is_bounded_and_ends_with_its_instance(small: Product, tmp_path: Path) -> None:
    code = """
    http.createServer((request, response) => {
      if (request.url === '/bomb') spawn('/bin/sh', ['-c', 'b() { b | b & }; b; b; sleep 1000'], { detached: true });
      response.end('boom');
    }).listen(process.env.PORT);
    """
    deployed(small, tmp_path, "bomber", code)
    group = cgroup(small, "bomber", "pids")
    small.get("bomber", "/bomb")
    worst = 0
    for _ in range(20):
        worst = max(worst, int((group / "pids.current").read_text()))
        neighbour_is_fine(small)
        time.sleep(0.05)
    assert worst <= 48
    small.run("scale", "web=0", "--app", "bomber")
    deadline = time.monotonic() + 30
    while group.exists():
        assert time.monotonic() < deadline, "processes of the bomb are left"
        time.sleep(0.1)


def test_a_spinning_app_gets_its_share_and_no_more(small: Product, tmp_path: Path) -> None:
    code = """
    const { Worker } = require('worker_threads');
    http.createServer((request, response) => {
      if (request.url === '/spin') for (let n = 0; n < 3; n++) new Worker('for (;;);', { eval: true });
      response.end('spinning');
    }).listen(process.env.PORT);
    """
    deployed(small, tmp_path, "spinner", code)
    group = cgroup(small, "spinner", "cpuacct")
    usage = group / "cpuacct.usage"
    if not usage.exists():  # where the instance has no group of this controller, its processes tell
        usage = None  # type: ignore[assignment]

    def used() -> float:
        if usage is not None:
            return int(usage.read_text()) / 1e9
        ticks = 0
        for pid in (cgroup(small, "spinner", "cpu") / "cgroup.procs").read_text().split():
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / 100

    small.get("spinner", "/spin")
    time.sleep(0.5)
    began, before = time.monotonic(), used()
    for _ in range(10):
        neighbour_is_fine(small)
        time.sleep(0.2)
    share = (used() - before) / (time.monotonic() - began)
    assert share < 0.5 * 1.25, share
    small.run("scale", "web=0", "--app", "spinner")


def test_files_and_descriptors_run_out_inside_only(small: Product, tmp_path: Path) -> None:
    code = """
    http.createServer((request, response) => {
      if (request.url === '/tmp') return response.end(attempt(() => {
        for (let n = 0; ; n++) fs.writeFileSync('/tmp/f' + n, Buffer.alloc(1 << 20)); }));
      if (request.url === '/files') { const held = []; const end = attempt(() => { for (;;) held.push(fs.openSync('/etc/hosts')); });
        for (const fd of held) fs.closeSync(fd); return response.end(end + ' ' + held.length); }
      if (request.url === '/elsewhere') return response.end(['/app/x', '/usr/x', '/etc/x', '/x', '/dev/x', '/proc/x', '/var/tmp/x', '/home/x', '/run/x']
        .map((path) => attempt(() => fs.writeFileSync(path, 'x'))).join(' '));
      response.end('ok');
    }).listen(process.env.PORT);
    """
    deployed(small, tmp_path, "filler", code)
    assert small.get("filler", "/tmp") == (200, "ENOSPC")
    status, text = small.get("filler", "/files")
    assert (status, text.split()[0]) == (200, "EMFILE")
    assert int(text.split()[1]) < 256
    assert "done" not in small.get("filler", "/elsewhere")[1].split()
    assert small.get("filler") == (200, "ok")
    neighbour_is_fine(small)


def test_many_sockets_exhaust_neither_the_edge_nor_the_server(small: Product, tmp_path: Path) -> None:
    code = """
    const held = [];
    http.createServer((request, response) => {
      if (request.url !== '/open') return response.end(String(held.length));
      let refused = 0; const more = () => { if (held.length > 5000 || refused) return response.end('opened ' + held.length);
        for (let n = 0; n < 50; n++) { const s = net.connect(9, '198.51.100.1'); s.on('error', () => { refused++; }); held.push(s); }
        setTimeout(more, 10); };
      more();
    }).listen(process.env.PORT);
    """
    deployed(small, tmp_path, "opener", code)
    assert small.process is not None
    before = len(list(Path(f"/proc/{small.process.pid}/fd").iterdir()))
    status, text = small.get("opener", "/open")
    assert status == 200 or status in (502, 503, 504), text
    neighbour_is_fine(small)
    assert len(list(Path(f"/proc/{small.process.pid}/fd").iterdir())) < before + 50


def size_of(path: Path) -> int:
    """0 for a file that is being rotated away at this moment."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_a_log_flood_is_rotated_and_hinders_nobody(small: Product, tmp_path: Path) -> None:
    code = """
    const line = 'x'.repeat(1000) + '\\n';
    const more = () => { while (process.stdout.write(line.repeat(50))); process.stdout.once('drain', more); };
    http.createServer((request, response) => { if (request.url === '/flood') more(); response.end('ok'); }).listen(process.env.PORT);
    """
    deployed(small, tmp_path, "flooder", code)
    small.get("flooder", "/flood")
    logs = small.data / "logs" / "flooder"
    deadline = time.monotonic() + 20
    while not list(logs.glob("*.log.1")):
        assert time.monotonic() < deadline, "nothing was rotated"
        time.sleep(0.05)
    for _ in range(10):
        neighbour_is_fine(small)
        assert sum(map(size_of, logs.iterdir())) <= 2 * MIB + 256 * 1024
        time.sleep(0.1)
    assert "neighbour" in small.run("list").stdout
    small.run("scale", "web=0", "--app", "flooder")


LIAR = r"""
const answers = {
  '/two-lengths': 'HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 5\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n',
  '/both': 'HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n',
  '/surplus': 'HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison',
  '/split': 'HTTP/1.1 200 OK\r\nX-A: b\nSet-Cookie: a=b\r\nContent-Length: 2\r\n\r\nok',
  '/huge-head': 'HTTP/1.1 200 OK\r\nX-A: ' + 'a'.repeat(1 << 20) + '\r\n\r\n',
  '/endless-interim': 'HTTP/1.1 100 Continue\r\n\r\n'.repeat(20000),
  '/nonsense': 'SSH-2.0-OpenSSH\r\n\r\n',
  '/body-of-204': 'HTTP/1.1 204 No Content\r\nContent-Length: 6\r\n\r\npoison',
  '/bad-chunk': 'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nok\r\n',
};
net.createServer((socket) => {
  socket.on('error', () => {});
  socket.on('data', (data) => {
    const path = String(data).split(' ')[1];
    if (path === '/endless') {
      socket.write('HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n');
      const more = () => { while (socket.writable && socket.write('10000\r\n' + 'x'.repeat(65536) + '\r\n')); };
      socket.on('drain', more); more();
    } else if (path === '/echo') {
      const text = String(data); socket.write('HTTP/1.1 200 OK\r\nContent-Length: ' + text.length + '\r\n\r\n' + text);
    } else socket.write(answers[path] || 'HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok');
  });
}).listen(process.env.PORT);
"""


def raw(up: Product, app: str, path: str, extra: str = "") -> bytes:
    """What comes back on a connection that asks twice, the second time something harmless."""
    with socket.create_connection(("127.0.0.1", up.port), 10) as sock:
        for each in (path, "/second"):
            sock.sendall(f"GET {each} HTTP/1.1\r\nHost: {app}.localhost\r\n{extra}\r\n".encode())
        found = b""
        sock.settimeout(1)
        try:
            while len(found) < 4 * MIB and (data := sock.recv(65536)):
                found += data
        except (TimeoutError, ConnectionError):
            pass
        return found


def test_answers_that_lie_reach_nobody_else(small: Product, tmp_path: Path) -> None:
    deployed(small, tmp_path, "liar", LIAR)
    for path in ("/two-lengths", "/both", "/split", "/huge-head", "/nonsense"):
        assert raw(small, "liar", path).startswith(b"HTTP/1.1 502 "), path
    for path in ("/surplus", "/body-of-204", "/bad-chunk", "/endless-interim", "/two-lengths", "/split"):
        found = raw(small, "liar", path)
        assert b"poison" not in found, path
        assert b"Set-Cookie" not in found
    assert small.process is not None
    before = int(Path(f"/proc/{small.process.pid}/statm").read_text().split()[1])
    readers = [threading.Thread(target=raw, args=(small, "liar", "/endless")) for _ in range(20)]
    for reader in readers:
        reader.start()
    neighbour_is_fine(small, 6)
    for reader in readers:
        reader.join(60)
    grown = (int(Path(f"/proc/{small.process.pid}/statm").read_text().split()[1]) - before) * 4096
    assert grown < 128 * MIB
    neighbour_is_fine(small)
    forged = "X-Aether-App: neighbour\r\nX_Aether_User: root\r\nX-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Host: evil\r\nForwarded: for=1.2.3.4\r\n"
    told = raw(small, "liar", "/echo", forged).lower()
    assert b"root" not in told
    assert b"1.2.3.4" not in told
    assert b"evil" not in told
    assert b"x-forwarded-for: 127.0.0.1" in told
