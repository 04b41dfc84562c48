"""kill -9 of the server while idle and in the middle of a rollout, then a restart."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.product import AETHER, HELLO, Product, node_app


def wait_for(what: Callable[[], object], secs: float = 40.0) -> object:
    deadline = time.monotonic() + secs
    while not (found := what()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
    return found


def keepers(up: Product) -> dict[str, int]:
    """Instance id → pid of the process that keeps it, for every instance of this product that runs."""
    found: dict[str, int] = {}
    for proc in Path("/proc").iterdir():
        if proc.name.isdigit():
            try:
                line = (proc / "cmdline").read_bytes()
                folder = (proc / "cwd").readlink()
            except OSError:
                continue
            if b"shim.keeper" in line and folder.is_relative_to(up.data / "instances"):
                found[folder.name] = min(int(proc.name), found.get(folder.name, 1 << 30))
    return found


def test_idle_server_killed_keeps_serving_processes_and_adopts_them(own: Product, tmp_path: Path) -> None:
    code = (
        (HELLO % "x")
        .replace("'x\\n'", "String(process.hrtime.bigint() * 0n) + started")
        .replace("const http", "const started = String(Date.now()); const http")
    )
    own.deploy(node_app(tmp_path / "steady", code))
    before = own.get("steady")
    shims = keepers(own)
    assert before[0] == 200
    assert shims
    own.kill9()
    assert keepers(own) == shims, "the kill of the server took the app with it"
    own.start()
    assert own.get("steady") == before, "the app was restarted instead of adopted"
    assert keepers(own) == shims
    lines = own.run("logs", "--app", "steady", "--tail", "100").stdout
    assert lines.count("up") == 1, lines


@pytest.mark.parametrize("when", ["verifying", "rolling_out", "started", "promoted"])
def test_server_killed_in_a_rollout_ends_promoted_or_reverted(own: Product, tmp_path: Path, when: str) -> None:
    project = node_app(tmp_path / "mid", HELLO % "old")
    own.deploy(project)
    slow = "setTimeout(() => {" + HELLO % "new" + "}, 700);"
    (project / "server.js").write_text(slow)
    command = subprocess.Popen(
        [AETHER, "deploy", str(project), "--timeout", "30"],
        env=own.env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    drain = threading.Thread(target=command.communicate, daemon=True)
    drain.start()

    def reached() -> bool:
        newest = own.api("GET", "/deployments?app=mid&limit=1")[1]["items"][0]
        if newest["release"] == 1 and newest["status"] == "active":
            return False
        if when == "started":
            return newest["status"] == "rolling_out" and len(keepers(own)) == 2
        if when == "promoted":
            return newest["status"] == "active"
        return newest["status"] != "pending" if when == "verifying" else newest["status"] in ("rolling_out", "active")

    wait_for(reached)
    own.kill9()
    own.start()

    def settled() -> object:
        items = own.api("GET", "/deployments?app=mid")[1]["items"]
        return items if items[0]["status"] in ("active", "failed", "cancelled") else None

    items = wait_for(settled)
    assert isinstance(items, list)
    assert len(items) == 2
    assert [d["status"] for d in items].count("active") == 1
    expected = "new\n" if items[0]["status"] == "active" else "old\n"
    assert own.get("mid") == (200, expected)
    wait_for(lambda: len(keepers(own)) == 1)
    drain.join(60)
    assert command.poll() is not None, "the client hangs after its server came back"


def test_stopping_leaves_no_process_and_no_cgroup(own: Product, tmp_path: Path) -> None:
    own.deploy(node_app(tmp_path / "tidy", HELLO % "x"))
    assert keepers(own)
    assert own.stop() == 0
    assert not keepers(own)
    own.start()
    assert own.get("tidy")[0] == 200


def test_repeated_kills_lose_nothing(own: Product, tmp_path: Path) -> None:
    project = node_app(tmp_path / "often", HELLO % "v0")
    own.deploy(project)
    for n in range(1, 4):
        own.kill9()
        own.start()
        (project / "server.js").write_text(HELLO % f"v{n}")
        own.deploy(project)
        assert own.get("often")[1] == f"v{n}\n"
    releases = own.run("releases", "--app", "often", "--format", "json").json["items"]
    assert sorted(r["version"] for r in releases) == [1, 2, 3, 4]
    assert len(keepers(own)) == 1
