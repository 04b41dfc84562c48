"""What an app sees from inside: this suite fails when no real sandbox ran."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

from support.product import Product, node_app

NODE = shutil.which("node") or ""

INSPECT = """
const fs = require('fs'), http = require('http'), os = require('os'), net = require('net');
function attempt(f) { try { return f(); } catch (error) { return 'refused: ' + error.code; } }
function connect(port) {
  return new Promise((resolve) => {
    const socket = net.connect(port, '127.0.0.1');
    socket.on('connect', () => { socket.destroy(); resolve('connected'); });
    socket.on('error', (error) => resolve(error.code));
  });
}
http.createServer(async (request, response) => {
  const target = new URL(request.url, 'http://x').searchParams.get('port');
  response.end(JSON.stringify({
    uid: process.getuid(), hostname: os.hostname(),
    pids: fs.readdirSync('/proc').filter((name) => /^[0-9]+$/.test(name)).length,
    init: fs.readFileSync('/proc/1/comm', 'utf8').trim(),
    status: fs.readFileSync('/proc/self/status', 'utf8'),
    app: attempt(() => fs.writeFileSync('/app/x', 'x')),
    usr: attempt(() => fs.writeFileSync('/usr/x', 'x')),
    tmp: attempt(() => { fs.writeFileSync('/tmp/x', 'x'); return fs.readdirSync('/tmp').length; }),
    root: attempt(() => fs.readdirSync('/root')), home: attempt(() => fs.readdirSync('/home')),
    data: attempt(() => fs.readdirSync(DATA)),
    netns: attempt(() => fs.readlinkSync('/proc/self/ns/net')),
    env: process.env, cwd: process.cwd(),
    host: target ? await connect(Number(target)) : null,
  }));
}).listen(process.env.PORT, '127.0.0.1');
"""


def test_an_app_runs_in_a_sandbox_of_its_own(up: Product, tmp_path: Path) -> None:
    code = INSPECT.replace("DATA", json.dumps(str(up.data)))
    up.deploy(node_app(tmp_path / "inspect", code), "--env", "COLOUR=green")
    status, body = up.get("inspect", f"/?port={up.port}")
    assert status == 200
    seen = json.loads(body)
    fields = dict(line.split(":\t", 1) for line in seen["status"].splitlines() if ":\t" in line)
    assert seen["uid"] != 0
    assert fields["CapEff"].strip("0 ") == "", fields["CapEff"]
    assert fields["CapBnd"].strip("0 ") == "", fields["CapBnd"]
    assert fields["NoNewPrivs"].strip() == "1"
    assert fields["Seccomp"].strip() == "2", "no seccomp filter"
    assert seen["pids"] < 10, "sees processes of the host"
    assert seen["netns"] != Path("/proc/self/ns/net").readlink().name
    assert seen["app"] == "refused: EROFS"
    assert str(seen["usr"]).startswith("refused: ")
    assert seen["tmp"] >= 1
    # an interpreter that lives in somebody's home is shown, and nothing beside it
    shown = {
        Path(p).resolve().parts[2] for p in (sys.base_prefix, NODE) if Path(p).resolve().parts[1] in ("root", "home")
    }
    for hidden in ("root", "home", "data"):
        assert str(seen[hidden]).startswith("refused: ") or set(seen[hidden]) <= shown, (hidden, seen[hidden])
    assert seen["host"] == "ECONNREFUSED", "reached a port of the host's loopback"
    assert seen["cwd"] == "/app"
    assert seen["env"]["COLOUR"] == "green"
    assert seen["env"]["NODE_ENV"] == "production"
    leaked = {k for k in seen["env"] if k.startswith("AETHER_")}
    assert leaked == {"AETHER_APP", "AETHER_DEPLOYMENT_ID", "AETHER_ARTIFACT_DIGEST", "AETHER_PROCESS"}


def test_doctor_says_which_sandbox_and_why(up: Product) -> None:
    checks = up.run("doctor", "--format", "json")
    use = next(found["message"] for found in checks.json["checks"] if found["name"] == "disk use")
    assert [part.split()[0] for part in use.split(", ")] == ["artifacts", "releases", "logs", "volumes", "database"]
    assert "bubblewrap" in checks.stdout


def test_two_instances_share_neither_tmp_nor_port(up: Product, tmp_path: Path) -> None:
    code = """
    const fs = require('fs');
    require('http').createServer((request, response) => {
      if (request.url === '/write') fs.writeFileSync('/tmp/mark', 'x');
      response.end(String(fs.existsSync('/tmp/mark')));
    }).listen(process.env.PORT);
    """
    for name in ("one", "two"):
        up.deploy(node_app(tmp_path / name, code))
    assert up.get("one", "/write")[1] == "true"
    assert up.get("two")[1] == "false"


def test_memory_limit_is_enforced_and_the_app_comes_back(up: Product, tmp_path: Path) -> None:
    code = """
    const held = [];
    require('http').createServer((request, response) => {
      if (request.url === '/eat') { for (;;) held.push(Buffer.alloc(16 << 20, 1)); }
      response.end('fine');
    }).listen(process.env.PORT);
    """
    up.deploy(node_app(tmp_path / "hungry", code))
    assert up.get("hungry")[1] == "fine"
    assert up.get("hungry", "/eat")[0] in (502, 503)
    done = up.run("logs", "--app", "hungry", "--tail", "50", check=False)
    assert done.code == 0
    # restarted with backoff: an answer comes again, and the server is none the worse
    deadline = time.monotonic() + 30
    while up.get("hungry")[0] != 200:
        assert time.monotonic() < deadline, "the app did not come back"
        time.sleep(0.1)
