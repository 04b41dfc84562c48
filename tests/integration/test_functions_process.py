"""Functions as sandboxed processes: what is so with this driver only, beside the contract."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import zipfile
from pathlib import Path

import pytest

from aether.model.errors import ServiceUnavailable
from aether.runtimes.process import functions, record
from aether.runtimes.process.shim import listening
from aether.runtimes.process.shim.listening import LOOPBACK, NOT, OPEN, Look
from support import functions_main
from support.function_runtimes import bench
from support.microvm import code
from support.runtimes import cgroups_named, processes_mentioning
from support.spawned import spawned

SOURCE = Path(__file__).parents[2] / "src" / "aether"
USER = 54_322
SERVER = "require('http').createServer((q, s) => s.end('hello')).listen(process.env.PORT, () => console.log('up'))"


async def test_instances_end_by_themselves_with_the_process_that_started_them(tmp_path: Path) -> None:
    code(tmp_path / "in", {"index.js": SERVER})
    data = tmp_path / "data"
    async with bench("process", data) as box:
        name = box.id("i1")
        async with spawned(Path(functions_main.__file__), "process", data, tmp_path / "in", name) as server:
            assert await server.line() == "ready"
            assert box.running() == [name]
            assert cgroups_named(name)
            await server.kill()
        async with asyncio.timeout(10):
            while processes_mentioning(str(data)) or cgroups_named(name):
                await asyncio.sleep(0.01)
        # all that is left is the folder, which says how it ended
        assert box.left() == [str(data / "instances" / name)]
        assert list(await box.runtime.sweep()) == [name]


async def test_what_forks_keepers_is_replaced_when_killed_and_ends_with_the_runtime(tmp_path: Path) -> None:
    work, data = code(tmp_path / "in", {"index.js": SERVER}), tmp_path / "data"

    def nurseries() -> list[int]:
        return [pid for pid in processes_mentioning(str(data)) if os.readlink(f"/proc/{pid}/cwd") == str(data)]

    async with bench("process", data) as box:
        await box.runtime.start(box.spec(work, "a"))
        (nursery,) = nurseries()
        os.kill(nursery, signal.SIGKILL)
        # what it has forked does not need it, and several starts at once get one other
        await asyncio.gather(*(box.runtime.start(box.spec(work, name)) for name in ("b", "c", "d")))
        assert box.running() == [box.id(name) for name in ("a", "b", "c", "d")]
        (other,) = nurseries()
        assert other != nursery
        for name in ("a", "b", "c", "d"):
            (await box.runtime.connect(box.id(name))).close()
    assert processes_mentioning(str(data)) == []


ENDS = {
    "exit": ("console.log('last words'); process.exit(7)", "exited with code 7", "last words"),
    "crash": ("console.log('last words'); process.abort()", "was ended by signal 6", "last words"),
    "no-such-file": ("require('./absent')", "exited with code 1", "Cannot find module './absent'"),
    "left-behind": (
        # what listens is a child of the function, which ends and takes everything with it
        "const parent = process.ppid;\n"
        "if (process.argv[2]) setInterval(() => { if (process.ppid !== parent)"
        " require('http').createServer(() => {}).on('error', () => {}).listen(process.env.PORT); }, 5);\n"
        "else { require('child_process').spawn(process.execPath, [__filename, 'child'], {detached: true}).unref();\n"
        "console.log('last words'); process.exit(0); }",
        "exited with code 0",
        "last words",
    ),
    "silent": ("require('fs').closeSync(1); require('fs').closeSync(2); process.exit(3)", "exited with code 3", ""),
}


@pytest.mark.parametrize("name", list(ENDS))
async def test_a_function_that_ends_before_it_listens_is_told_from_its_end(name: str, tmp_path: Path) -> None:
    source, reason, said = ENDS[name]
    async with bench("process", tmp_path / "data") as box:
        with pytest.raises(ServiceUnavailable, match=f"{reason} before it listened on port 3000") as caught:
            await box.runtime.start(box.spec(code(tmp_path / "in", {"index.js": source})))
        assert caught.value.details is not None
        assert said in "\n".join(caught.value.details["log"])
        assert box.left() == []


async def test_listening_elsewhere_is_not_listening(tmp_path: Path) -> None:
    source = SERVER.replace("process.env.PORT", "Number(process.env.PORT) + 1")
    async with bench("process", tmp_path / "data") as box:
        start = asyncio.create_task(box.runtime.start(box.spec(code(tmp_path / "in", {"index.js": source}))))
        async with asyncio.timeout(60):
            while "up" not in [item.text for item in await box.runtime.log(box.id("i1"))]:
                await asyncio.sleep(0.01)
        with pytest.raises(OSError):
            await box.runtime.connect(box.id("i1"))
        # a start is under way: it is ended by a stop as well, and says so
        assert (await box.runtime.stop(box.id("i1"), 0.0)).signal is not None
        with pytest.raises(ServiceUnavailable, match="before it listened on port 3000"):
            await start
        assert box.left() == []


async def test_a_hanging_keeper_is_swept_too(tmp_path: Path) -> None:
    code(tmp_path / "in", {"index.js": SERVER})
    data = tmp_path / "data"
    async with bench("process", data) as box:
        name = box.id("i1")
        async with spawned(Path(functions_main.__file__), "process", data, tmp_path / "in", name) as server:
            assert await server.line() == "ready"
            keeper, _ = record.keeper_of(data / "instances" / name)
            os.kill(keeper, signal.SIGSTOP)
            await server.kill()
        assert box.running() == [name]
        assert list(await box.runtime.sweep()) == [name]
        assert box.left() == []


async def test_memory_and_processors_are_limited_as_asked(tmp_path: Path) -> None:
    async with bench("process", tmp_path / "data") as box:
        await box.runtime.start(box.spec(code(tmp_path / "in", {"index.js": SERVER}), memory_mb=96, vcpus=2))
        found: dict[str, str] = {}
        for folder in cgroups_named(box.id("i1")):
            for name in ("memory.max", "memory.limit_in_bytes", "cpu.max", "cpu.cfs_quota_us", "pids.max"):
                if (folder / name).exists():
                    found[name] = (folder / name).read_text().split()[0]
    if not found:
        pytest.skip("component: cgroups")
    assert found.get("memory.max", found.get("memory.limit_in_bytes")) == str(96 << 20)
    assert found.get("cpu.max", found.get("cpu.cfs_quota_us")) == "200000"
    assert found["pids.max"] == str(functions.MAX_PROCESSES)


@pytest.mark.parametrize("asks", [True, False], ids=["asked", "tables"])
@pytest.mark.parametrize(
    ("family", "address", "expected"),
    [
        (socket.AF_INET, "0.0.0.0", OPEN),
        (socket.AF_INET, "127.0.0.1", LOOPBACK),
        (socket.AF_INET6, "::", OPEN),
        (socket.AF_INET6, "::1", LOOPBACK),
        (socket.AF_INET6, "::ffff:127.0.0.1", LOOPBACK),
    ],
    ids=["any", "loopback", "any6", "loopback6", "mapped"],
)
def test_the_kernel_says_who_listens_where(
    family: socket.AddressFamily, address: str, expected: bytes, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not asks:
        monkeypatch.setattr(listening, "_answers", lambda _: False)
    try:
        made = socket.socket(family)
        made.bind((address, 0))
    except OSError:
        pytest.skip("component: IPv6")
    with made:
        look = Look(made.getsockname()[1])
        if asks and not look.cheap:
            pytest.skip("component: sock_diag")
        assert look.cheap == asks
        assert look.now() == NOT  # bound only
        made.listen()
        assert look.now() == expected
    assert look.now() == NOT
    look.close()


async def test_an_interpreter_that_no_function_may_see_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench("process", tmp_path / "data") as box:
        # a copy where no toolchain is looked for
        node = shutil.copy(os.path.realpath(shutil.which("node") or ""), tmp_path / "node")
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(ServiceUnavailable, match="lies where no function may look") as caught:
            await box.runtime.prepare("node", code(tmp_path / "in", {"index.js": ""}))
        assert node.name in caught.value.message


DRIVER = """
import asyncio, json, sys
from hashlib import sha256
from pathlib import Path
from aether.model.errors import ServiceUnavailable
from aether.model.function_instance import Code, CodeForm, FunctionSpec
from aether.runtimes.process.functions import ProcessFunctions

async def main():
    base = Path(sys.argv[1])
    runtime = ProcessFunctions(base / "data")
    report = await runtime.sandbox()
    result = {"usable": report.usable, "reason": report.reason}
    if report.usable:
        for name in ("node", "python"):
            archive = base / name
            code = Code(archive, CodeForm.ZIP, sha256(archive.read_bytes()).hexdigest())
            entrypoint = {"node": "index.js", "python": "main.py"}[name]
            await runtime.start(FunctionSpec(name, "hello", name, code, entrypoint, env={"A": "b"}))
            sock = await runtime.connect(name)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, b"GET / HTTP/1.0\\r\\n\\r\\n")
            answer = b""
            while data := await loop.sock_recv(sock, 4096):
                answer += data
            sock.close()
            result[name] = answer.decode().rpartition("\\r\\n\\r\\n")[2]
            result[name + " ended"] = str(await runtime.stop(name, 5.0))
        result["left"] = [str(path) for path in (base / "data" / "instances").iterdir()]
    await runtime.close()
    print(json.dumps(result))

asyncio.run(main())
"""
PYTHON = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"python {os.environ['A']}".encode())
http.server.HTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
"""


def test_an_ordinary_user_can_run_functions() -> None:
    if os.geteuid() != 0 or not os.path.exists("/usr/bin/python3") or shutil.which("bwrap") is None:
        pytest.skip("component: root, bubblewrap and the system's Python")
    base = Path(tempfile.mkdtemp(prefix="aether-user-"))
    try:
        base.chmod(0o755)
        shutil.copytree(SOURCE, base / "src" / "aether", ignore=shutil.ignore_patterns("__pycache__"))
        # as zip: the system's Python has no package to read the other forms with
        for name, file, source in (
            ("node", "index.js", SERVER.replace("'hello'", "'node ' + process.env.A")),
            ("python", "main.py", PYTHON),
        ):
            with zipfile.ZipFile(base / name, "w") as archive:
                archive.writestr(file, source)
        (base / "data").mkdir(mode=0o700)
        os.chown(base / "data", USER, USER)
        (base / "driver.py").write_text(DRIVER)
        done = subprocess.run(
            ["/usr/bin/python3", base / "driver.py", base],
            env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PYTHONPATH": str(base / "src")},
            capture_output=True,
            text=True,
            timeout=120,
            user=USER,
            group=USER,
            extra_groups=[],
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        if not result["usable"]:
            pytest.skip(f"component: user namespaces ({result['reason']})")
        assert (result["node"], result["python"], result["left"]) == ("node b", "python b", [])
        assert result["node ended"] == "was ended by signal 15"
    finally:
        shutil.rmtree(base)
