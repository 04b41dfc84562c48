"""The sandbox as an ordinary user makes it, tried by root in another user's name."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "aether"
USER = 54_321
PYTHON = "/usr/bin/python3"

DRIVER = """
import asyncio, json, os, sys
from pathlib import Path
from aether.model.instance import InstanceSpec, Limits
from aether.runtimes.process import ProcessRuntime

async def main():
    base = Path(sys.argv[1])
    runtime = ProcessRuntime(base / "data")
    report = await runtime.probe()
    result = {"usable": report.usable, "reason": report.reason, "limits": report.limits}
    async def run(name, command):
        limits = Limits(memory_bytes=64 * 1024**2, pids=30, tmp_bytes=1024**2)
        root = base / "app"
        spec = InstanceSpec(name, "demo", "d", 1, "0" * 64, root, command, 3000, env={"A": "b"}, limits=limits)
        return await runtime.start(spec)
    if report.usable:
        for name, command in json.loads(sys.argv[2]).items():
            instance = await run(name, command)
            await instance.wait()
            result[name] = [record.text async for record in runtime.logs(name, "demo")]
        server = await run("server", "exec node server.js")
        async for record in runtime.logs("server", "demo", follow=True):
            break
        sock = await server.dial()
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, b"GET / HTTP/1.0\\r\\n\\r\\n")
        answer = b""
        while data := await loop.sock_recv(sock, 4096):
            answer += data
        sock.close()
        result["answer"] = answer.decode()
        result["stopped"] = str(await server.stop(5.0))
        for name in await runtime.known():
            await runtime.remove(name)
        result["left"] = [str(path) for path in (base / "data" / "instances").iterdir()]
    await runtime.close()
    print(json.dumps(result))

asyncio.run(main())
"""
COMMANDS = {
    "identity": "id -u; grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status | cut -f2",
    "files": "touch /app/x /usr/x /x 2>/dev/null; ls -A /home /root 2>/dev/null; ls -A /tmp",
    "namespaces": "unshare -U true 2>/dev/null || echo refused; unshare -r true 2>/dev/null || echo refused",
    "processes": "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do sleep 1 & sleep 1 & done; echo all",
    "memory": f"{PYTHON} -c 'x = b\"x\" * 300_000_000' 2>&1 | tail -1",
}


@pytest.fixture
def place() -> Iterator[Path]:
    base = Path(tempfile.mkdtemp(prefix="aether-user-"))
    base.chmod(0o755)
    shutil.copytree(SOURCE, base / "src" / "aether", ignore=shutil.ignore_patterns("__pycache__"))
    (base / "app").mkdir()
    server = "require('http').createServer((q, s) => s.end('mine')).listen(process.env.PORT, () => console.log('up'))"
    (base / "app" / "server.js").write_text(server)
    (base / "data").mkdir(mode=0o700)
    (base / "driver.py").write_text(DRIVER)
    os.chown(base / "data", USER, USER)
    yield base
    shutil.rmtree(base)


@pytest.mark.skipif(os.geteuid() != 0, reason="as an ordinary user every other test shows this")
async def test_an_ordinary_user_gets_a_whole_sandbox(place: Path) -> None:
    version = subprocess.run([PYTHON, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True)
    if version.stdout.strip() != b"True" or shutil.which("setpriv") is None:
        pytest.skip("component: setpriv and a Python 3.11 that every user may run")
    child = await asyncio.create_subprocess_exec(
        *("setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups", "--"),
        *(PYTHON, str(place / "driver.py"), str(place), json.dumps(COMMANDS)),
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(place),
            "PYTHONPATH": str(place / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        output, _ = await child.communicate()
    assert child.returncode == 0
    found = json.loads(output)
    if not found["usable"]:
        pytest.skip(f"component: user namespaces ({found['reason']})")
    assert found["identity"] == ["1000", "0" * 16, "1", "2"]
    assert found["files"] == []
    assert found["namespaces"] == ["refused", "refused"]
    if found["limits"]["pids"].startswith("rlimit"):
        assert "all" not in found["processes"]
        assert any("fork" in line for line in found["processes"])
    if found["limits"]["memory"].startswith("rlimit"):
        assert found["memory"] == ["MemoryError"]
    assert found["answer"].endswith("mine")
    assert found["stopped"] == "was ended by signal 15"
    assert found["left"] == []
