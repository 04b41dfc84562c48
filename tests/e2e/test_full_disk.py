"""Disks that fill up for real, one folder at a time: what fails says so, what runs goes on, space repairs it."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.disks import filled, small_disk
from support.product import HELLO, Product, node_app
from support.server import Server, hello, pack, server, wait_for

MIB = 1 << 20
CHATTY = """
const http = require('http');
let n = 0;
setInterval(() => console.log('line ' + n++), 20);
http.createServer((request, response) => response.end('chatty ' + n + '\\n')).listen(process.env.PORT);
process.on('SIGTERM', () => process.exit(0));
"""


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[str, int], Path]]:
    """Mounts a small disk at a folder of the server's data before it starts."""
    with contextlib.ExitStack() as stack:
        yield lambda name, size: stack.enter_context(small_disk(tmp_path / "server" / "data" / name, size))


def noise(size: int) -> str:
    """Text that does not compress much, the same every time."""
    return "".join(hashlib.sha256(str(n).encode()).hexdigest() for n in range(size // 64))


def presigned(up: Server, app: str, blob: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    body = {"app": app, "digest": hashlib.sha256(blob).hexdigest(), "size_bytes": len(blob)}
    status, signed = up.api("POST", "/artifacts/presign", body)
    assert status == 200, signed
    return body, signed


def test_uploads_to_a_full_disk(tmp_path: Path, disk_of: Callable[[str, int], Path]) -> None:
    objects = disk_of("objects", 16)
    with server(tmp_path / "server") as up:
        up.deploy("steady", hello("steady"))
        up.api("POST", "/apps", {"name": "big"})
        blob = pack({"noise.txt": noise(8 * MIB), **hello("big")})
        body, signed = presigned(up, "big", blob)
        with filled(objects, leave=MIB):
            before = sorted(str(path) for path in objects.rglob("*") if path.is_file())
            status, answer = up.api("PUT", signed["url"], blob)
            assert (status, answer["code"]) == (503, "service_unavailable")
            assert "full" in answer["message"]
            assert sorted(str(path) for path in objects.rglob("*") if path.is_file()) == before
            status, answer = up.api("POST", "/artifacts/complete", {**body, "upload_id": signed["upload_id"]})
            assert status == 400, answer
            assert "nothing was uploaded" in answer["message"]
            assert up.said("steady") == "steady"
        assert up.api("PUT", signed["url"], blob)[0] == 200
        status, done = up.api("POST", "/artifacts/complete", {**body, "upload_id": signed["upload_id"]})
        assert (status, done["duplicate"]) == (200, False), done


def test_unpacking_on_a_full_disk(tmp_path: Path, disk_of: Callable[[str, int], Path]) -> None:
    releases = disk_of("releases", 16)
    with server(tmp_path / "server") as up:
        up.deploy("steady", hello("steady"))
        files = {"noise.txt": noise(8 * MIB), **hello("big")}
        with filled(releases, leave=2 * MIB):
            failed = up.deploy("big", files)
            assert failed["status"] == "failed"
            assert "No space left" in failed["error"]["message"] or "full" in failed["error"]["message"], failed[
                "error"
            ]["message"]
            assert "AETHER" not in failed["error"]["message"]
            left = [path for path in releases.rglob("*") if path.is_file() and "steady" not in path.parts]
            assert [path.name for path in left] == ["ballast"], left
            assert up.said("steady") == "steady"
        assert up.deploy("big", files)["status"] == "active"
        assert up.said("big") == "big"


def test_logs_on_a_full_disk(tmp_path: Path, disk_of: Callable[[str, int], Path]) -> None:
    logs = disk_of("logs", 4)

    def lines() -> list[str]:
        status, text = up.api("GET", "/apps/chatty/logs?tail=100000")
        assert status == 200
        return text.decode().splitlines()

    with server(tmp_path / "server") as up:
        assert up.deploy("chatty", {"server.js": CHATTY})["status"] == "active"
        wait_for(lambda: any("line 5" in line for line in lines()))
        pid = up.pids()
        with filled(logs):
            # more lines than the rest of the last page can take
            begun = int(up.get("chatty")[1].split()[1])
            wait_for(lambda: int(up.get("chatty")[1].split()[1]) > begun + 150)
            assert up.pids() == pid, "the app was ended by a full disk"
            # a new instance on the full disk: it runs, its lines are lost
            assert up.deploy("other", hello("other"))["status"] == "active"
            assert up.said("other") == "other"
        wait_for(lambda: any("lines were lost: No space left" in line for line in lines()))
        last = int(up.get("chatty")[1].split()[1])
        wait_for(lambda: any(f"line {last}" in line for line in lines()))


def test_a_full_disk_below_the_database(tmp_path: Path, disk_of: Callable[[str, int], Path]) -> None:
    data = disk_of("", 12)
    for name in ("objects", "releases", "instances", "logs"):
        disk_of(name, 24)
    with server(tmp_path / "server", AETHER_LEASE_SECS="2") as up:
        assert up.deploy("steady", hello("one"))["status"] == "active"
        digest = up.upload("steady", hello("two"))

        def change() -> tuple[int, Any]:
            return up.api("POST", "/deployments", {"app": "steady", "digest": digest, "command": "node server.js"})

        def full() -> bool:
            """SQLite reuses free pages of its own first: go on until it needs more."""
            status, answer = up.api("PUT", "/apps/steady/config", {"set": {"NOISE": noise(64 * 1024)}})
            if status == 200:
                return False
            assert (status, answer["code"]) == (503, "service_unavailable"), answer
            assert "full" in answer["message"], answer
            return True

        wait_for(lambda: (up.data / "reserve").exists())
        with filled(data):
            wait_for(full)
            time.sleep(3)  # longer than a lease
            status, answer = change()
            assert (status, answer["code"]) == (503, "service_unavailable"), answer
            assert up.said("steady") == "one"
            assert up.api("GET", "/apps")[0] == 200, "reading needs no space"
            assert up.api("GET", "/apps/steady")[0] == 200
            assert up.api("GET", "/healthz")[0] == 200
            before = up.get("steady")
            # killed while full, and started again while full
            up.kill9()
            up.start()
            assert up.get("steady") == before, "the app was restarted by a full disk"
            assert up.api("GET", "/apps/steady")[0] == 200
            wait_for(full)
            assert up.get("steady") == before
        assert up.api("POST", "/apps", {"name": "another"})[0] == 201, "space alone did not repair it"
        made = change()[1]
        assert up.settled(made["id"])["status"] == "active"
        assert up.said("steady") == "two"


def test_packing_on_a_full_disk(tmp_path: Path) -> None:
    product = Product(tmp_path / "home")
    product.home.mkdir()
    project = node_app(tmp_path / "big", HELLO % "big")
    (project / "noise.txt").write_text(noise(8 * MIB))
    with small_disk(tmp_path / "disk", 3) as disk:
        out = disk / "out"
        done = product.run("deploy", str(project), "--pack-only", "--out", str(out), check=False)
        assert done.code == 30, done
        assert "No space left" in done.stderr, done
        assert str(out) in done.stderr, "it does not say where"
        assert "Traceback" not in done.stderr
        assert [path for path in disk.rglob("*") if path.is_file()] == []
    with small_disk(tmp_path / "cache", 1) as cache, filled(cache):
        done = product.run(
            "deploy", str(project), "--pack-only", "--out", str(tmp_path / "out"), "--format", "json",
            check=False, env={"XDG_CACHE_HOME": str(cache), "TMPDIR": str(cache)},
        )  # fmt: skip
        if done.code == 0:
            assert done.json["digest"], "a full cache is no reason to fail, but then the artifact must be whole"
        else:
            assert done.code == 30, done
            assert done.json["error"]["code"] == "io"
        assert "Traceback" not in done.stderr
