"""The whole server ended in every way, idle and in the middle of things, and started again."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.server import Server, hello, server, wait_for

SLOW = """
const http = require('http');
setTimeout(() => http.createServer((q, r) => r.end(%r)).listen(process.env.PORT, () => console.log('up')), %d);
process.on('SIGTERM', () => process.exit(0));
"""
STAMPED = {
    "server.js": """
const http = require('http');
const started = String(Date.now()) + '-' + Math.random();
http.createServer((q, r) => r.end(started)).listen(process.env.PORT, () => console.log('up'));
process.on('SIGTERM', () => process.exit(0));
"""
}


def slow(text: str, ms: int) -> dict[str, str]:
    return {"server.js": SLOW % (text, ms)}


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path / "up", AETHER_STOP_GRACE_SECS="2") as it:
        yield it


def check_consistent(up: Server, app: str) -> list[dict[str, object]]:
    """Nothing under way, exactly one active release, exactly its instance; returns the deployments."""
    rows = up.api("GET", f"/deployments?app={app}")[1]["items"]

    def all_settled() -> bool:
        rows[:] = up.api("GET", f"/deployments?app={app}")[1]["items"]
        return all(row["status"] in ("active", "failed", "cancelled", "superseded") for row in rows)

    wait_for(all_settled)
    assert [row["status"] for row in rows].count("active") == 1, rows
    wait_for(lambda: len(up.instances()) == 1)
    wait_for(lambda: up.app(app)["instances"] == {"desired": 1, "ready": 1})
    active = next(row for row in rows if row["status"] == "active")
    assert up.app(app)["release"]["deployment_id"] == active["id"]
    spec = json.loads((up.data / "instances" / up.instances()[0] / "spec.json").read_text())["spec"]
    assert spec["deployment_id"] == active["id"]
    return rows


def test_first_start_makes_a_private_folder_and_token(up: Server) -> None:
    assert up.first_start
    assert up.data.stat().st_mode & 0o777 == 0o700
    token = up.data / "admin-token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text().strip().encode() not in (up.data / "aether.db").read_bytes()
    told = json.loads((up.data / "up.json").read_text())
    assert told["api"] == f"http://127.0.0.1:{up.port}"
    for probe in ("/healthz", "/readyz", "/startupz"):
        assert up.api("GET", probe)[0] == 200
    assert up.stop() == 0
    assert not (up.data / "up.json").exists()
    kept = token.read_text()
    up.start()
    assert not up.first_start
    assert token.read_text() == kept


def test_a_second_server_and_a_port_in_use_are_refused(up: Server, tmp_path: Path) -> None:
    program = (
        "import sys; from aether import settings, topology; from aether.model.errors import AetherError\n"
        "try: topology.serve(settings.load(), '127.0.0.1', int(sys.argv[1]), print)\n"
        "except AetherError as e: print(type(e).__name__, e.message); sys.exit(e.exit_code)"
    )

    def run(data: Path, port: int) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "AETHER_DATA_DIR": str(data)}
        return subprocess.run(
            [sys.executable, "-c", program, str(port)], env=environment, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip

    same = run(up.data, 0)
    assert same.returncode == 30, same
    assert "another server" in same.stdout
    taken = run(tmp_path / "other", up.port)
    assert taken.returncode == 30, taken
    assert f"port {up.port}" in taken.stdout
    assert not (tmp_path / "other" / "aether.db").exists()


def test_kill9_while_idle_adopts_the_same_process(up: Server) -> None:
    up.deploy("steady", STAMPED)
    before, pids = up.get("steady"), up.pids()
    assert before[0] == 200
    up.kill9()
    assert up.pids() == pids
    up.start()
    assert up.get("steady") == before
    assert up.pids() == pids
    check_consistent(up, "steady")
    lines = up.api("GET", "/apps/steady/logs")[1].decode().splitlines()
    assert len(lines) == 1


def test_requests_wait_for_a_restart_instead_of_failing(up: Server) -> None:
    up.deploy("patient", STAMPED)
    before = up.get("patient")
    up.kill9()
    starting = threading.Thread(target=up.start)
    starting.start()
    answers: list[tuple[int, str]] = []

    def ask() -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            answers.append(up.get("patient"))
        return bool(answers)

    wait_for(ask)
    starting.join()
    assert answers == [before]


@pytest.mark.parametrize("delay_ms", [0, 5, 10, 20, 40, 60, 80, 100, 130, 160, 200, 300])
def test_kill9_at_any_moment_of_a_rollout(up: Server, delay_ms: int) -> None:
    up.deploy("mid", hello("old"))
    digest = up.upload("mid", hello("new"))
    status, made = up.api("POST", "/deployments", {"app": "mid", "digest": digest, "command": "node server.js"})
    assert status == 201
    time.sleep(delay_ms / 1000)
    up.kill9()
    up.start()
    rows = check_consistent(up, "mid")
    assert len(rows) == 2
    expected = "new" if rows[0]["status"] == "active" else "old"
    assert up.said("mid") == expected
    assert rows[0]["id"] == made["id"]
    assert rows[0]["status"] == "active", rows[0]["error"]


def test_an_instance_that_was_only_prepared_leaves_nothing(up: Server) -> None:
    up.deploy("unborn", hello("x"))
    up.kill9()
    for pid in up.pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not up.pids())
    (prepared,) = up.instances()
    for item in (up.data / "instances" / prepared).iterdir():
        if item.name not in ("etc", "lock"):
            item.unlink()
    up.start()
    check_consistent(up, "unborn")
    assert prepared not in up.instances()
    assert up.said("unborn") == "x"


def test_kill9_in_the_middle_of_a_slow_start_keeps_the_deadline(up: Server) -> None:
    up.deploy("late", hello("old"))
    begun = up.begin("late", slow("never", 60_000), timeout_secs=6)
    wait_for(lambda: len(up.instances()) == 2)
    started = time.monotonic()
    up.kill9()
    up.start()
    assert up.said("late") == "old"
    assert up.settled(begun["id"])["status"] == "failed"
    assert time.monotonic() - started < 12
    check_consistent(up, "late")


@pytest.mark.parametrize("strategy", ["rolling", "recreate"])
def test_kill9_while_the_new_instance_starts_adopts_it(up: Server, strategy: str) -> None:
    up.deploy("half", hello("old"))
    begun = up.begin("half", slow("new", 2500), strategy=strategy, timeout_secs=30)
    expected = 2 if strategy == "rolling" else 1

    def started() -> bool:
        with contextlib.closing(sqlite3.connect(up.data / "aether.db")) as database:
            rows = database.execute(
                "SELECT id FROM instances WHERE deployment_id = ? AND status = 'starting'", (begun["id"],)
            ).fetchall()
        return bool(rows) and (up.data / "instances" / rows[0][0] / "state.json").exists()

    wait_for(started)
    wait_for(lambda: len(up.instances()) == expected)
    known = set(up.instances())
    up.kill9()
    up.start()
    assert up.settled(begun["id"])["status"] == "active"
    assert up.get("half") == (200, "new")
    check_consistent(up, "half")
    assert set(up.instances()) <= known, "the new instance was started twice"


def test_kill9_while_recreate_holds_the_old_release_and_the_new_one_fails(up: Server) -> None:
    up.deploy("held", hello("old"))
    begun = up.begin("held", slow("never", 60_000), strategy="recreate", timeout_secs=5)
    wait_for(lambda: len(up.instances()) == 1 and up.get("held")[0] == 503)
    up.kill9()
    up.start()
    assert up.settled(begun["id"])["status"] == "failed"
    wait_for(lambda: up.said("held") == "old")
    check_consistent(up, "held")


def test_an_instance_that_died_while_the_server_was_down_is_replaced(up: Server) -> None:
    up.deploy("lost", STAMPED)
    before = up.get("lost")
    pids = up.pids()
    up.kill9()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    up.start()
    wait_for(lambda: up.get("lost")[0] == 200)
    assert up.get("lost") != before
    check_consistent(up, "lost")


def test_a_graceful_restart_resumes_every_app_at_its_release(up: Server) -> None:
    for n in range(3):
        up.deploy(f"app{n}", hello(f"v{n}"))
    up.deploy("app0", hello("newer"))
    up.api("POST", "/apps", {"name": "idle"})
    assert up.stop() == 0
    assert not up.instances()
    assert not up.pids()
    up.start()
    assert [up.said(f"app{n}") for n in range(3)] == ["newer", "v1", "v2"]
    assert up.app("app0")["release"]["version"] == 2
    assert up.get("idle")[0] == 503
    assert up.app("app0")["instances"] == {"desired": 1, "ready": 1}


def test_a_graceful_stop_in_the_middle_of_a_rollout_goes_on_afterwards(up: Server) -> None:
    up.deploy("pause", hello("old"))
    begun = up.begin("pause", slow("new", 1500), timeout_secs=30)
    wait_for(lambda: len(up.instances()) == 2)
    assert up.stop() == 0
    assert not up.pids()
    up.start()
    assert up.settled(begun["id"])["status"] == "active"
    assert up.get("pause") == (200, "new")
    check_consistent(up, "pause")


def test_kill9_in_the_middle_of_a_deletion_is_finished_at_the_next_start(up: Server) -> None:
    deaf = {"server.js": "process.on('SIGTERM', () => 0);" + SLOW % ("x", 0)}
    deaf["server.js"] = deaf["server.js"].replace("process.on('SIGTERM', () => process.exit(0));", "")
    up.deploy("doomed", deaf)

    def delete() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            up.api("DELETE", "/apps/doomed")

    deleting = threading.Thread(target=delete)
    deleting.start()
    wait_for(lambda: up.api("GET", "/apps/doomed")[0] == 404)
    up.kill9()
    deleting.join()
    up.start()
    wait_for(lambda: up.api("POST", "/apps", {"name": "doomed"})[0] == 201)
    assert up.app("doomed")["status"] == "empty"
    assert not up.instances()
    assert not list((up.data / "objects").rglob("*.tar.gz"))


def test_log_followers_end_with_the_server(up: Server) -> None:
    up.deploy("chatty", hello("x"))
    connection = http.client.HTTPConnection("127.0.0.1", up.port, timeout=30)
    token = (up.data / "admin-token").read_text().strip()
    connection.request("GET", "/apps/chatty/logs?follow=true", headers={"Authorization": f"Bearer {token}"})
    answer = connection.getresponse()
    assert answer.readline()
    began = time.monotonic()
    assert up.stop() == 0
    assert answer.read() == b""
    connection.close()
    assert time.monotonic() - began < 10


def test_a_second_signal_ends_at_once_and_the_app_is_adopted(up: Server) -> None:
    deaf = {"server.js": "process.on('SIGTERM', () => 0);" + STAMPED["server.js"].split("process.on")[0]}
    up.deploy("stuck", deaf)
    before = up.get("stuck")
    assert up.process is not None
    up.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    up.process.send_signal(signal.SIGINT)
    assert up._ended(5) == 130
    up.start()
    wait_for(lambda: up.get("stuck")[0] == 200)
    del before
