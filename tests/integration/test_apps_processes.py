"""Workers and release commands in real sandboxes: scaled, crashed, gating a rollout, adopted after kill -9."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.server import Server, hello, server, wait_for

WORKER = {
    "worker.js": "console.log('working', process.env.PORT || 'no port', process.env.AETHER_PROCESS);"
    "process.on('SIGTERM', () => { console.log('finishing'); process.exit(0); }); setInterval(() => {}, 1000);"
}
CRASHING = {"worker.js": "console.error('no queue'); setTimeout(() => process.exit(3), 100);"}
CRON = {"command": "x", "schedule": "* * * * *"}
TYPES = {"worker": {"command": "node worker.js", "settle_secs": 0.5}}


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path / "up", AETHER_STOP_GRACE_SECS="2", AETHER_DRAIN_TIMEOUT_SECS="3") as it:
        yield it


def lines(up: Server, app: str, process: str | None = None) -> list[dict[str, Any]]:
    query = f"&process={process}" if process else ""
    text = up.api("GET", f"/apps/{app}/logs?tail=1000{query}")[1].decode()
    return [json.loads(line) for line in text.splitlines() if line]


def said(up: Server, app: str, process: str | None = None) -> list[str]:
    return [line["line"] for line in lines(up, app, process)]


def events(up: Server, deployment_id: str) -> list[tuple[str, str]]:
    text = up.api("GET", f"/deployments/{deployment_id}/events")[1].decode()
    data = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: ")]
    return [(item["phase"], item["message"]) for item in data if "phase" in item]


def process(up: Server, app: str, name: str) -> dict[str, Any]:
    return next(item for item in up.app(app)["processes"] if item["name"] == name)


def scale(up: Server, app: str, **sizes: int) -> tuple[int, Any]:
    return up.api("POST", f"/apps/{app}/scale", sizes)


def settle(up: Server, app: str, **sizes: int) -> None:
    for name, wanted in sizes.items():
        wait_for(lambda name=name, wanted=wanted: process(up, app, name)["ready"] == wanted)
    wait_for(lambda: len(up.instances()) == sum(sizes.values()))


def status(up: Server, deployment_id: str) -> str:
    return up.api("GET", f"/deployments/{deployment_id}")[1]["status"]


def states(up: Server) -> dict[str, str]:
    """Instance id → when its record says that it was started."""
    return {name: (up.data / "instances" / name / "state.json").read_text() for name in up.instances()}


# --- workers


def test_a_worker_runs_beside_web_without_port_and_route(up: Server) -> None:
    done = up.deploy("shop", hello("one") | WORKER, processes=TYPES)
    assert (done["status"], done["error"]) == ("active", None)
    assert done["processes"] == {"worker": {"kind": "worker", "command": "node worker.js", "settle_secs": 0.5}}
    assert up.said("shop") == "one"
    app = up.app("shop")
    assert app["status"] == "running"
    assert app["instances"] == {"desired": 1, "ready": 1}
    assert [(p["name"], p["kind"], p["desired"], p["ready"]) for p in app["processes"]] == [
        ("web", "web", 1, 1), ("worker", "worker", 1, 1),
    ]  # fmt: skip
    assert said(up, "shop", "worker") == ["working no port worker"]
    assert said(up, "shop", "web") == ["up one"]
    assert {line["process"] for line in lines(up, "shop")} == {"web", "worker"}


def test_a_crash_looping_worker_fails_the_deployment_and_the_old_one_works_on(up: Server) -> None:
    up.deploy("shop", hello("old") | WORKER, processes=TYPES)
    done = up.deploy("shop", hello("new") | CRASHING, processes=TYPES, timeout_secs=20)
    assert done["status"] == "failed"
    assert "process type 'worker' exited with code 3 within 0.5 s" in done["error"]["message"]
    assert done["error"]["log_tail"] == ["no queue"]
    assert up.said("shop") == "old"
    settle(up, "shop", web=1, worker=1)
    assert "finishing" not in said(up, "shop", "worker"), "the old worker was stopped"


@pytest.mark.parametrize("strategy", ["rolling", "recreate", "bluegreen"])
def test_the_old_worker_ends_gracefully_after_the_new_one_works(up: Server, strategy: str) -> None:
    up.deploy("shop", hello("old") | WORKER, processes=TYPES)
    rules = {"bake_secs": 1} if strategy == "bluegreen" else None
    done = up.deploy("shop", hello("new") | WORKER, processes=TYPES, strategy=strategy, rollout=rules)
    assert done["status"] == "active", done["error"]
    wait_for(lambda: "finishing" in said(up, "shop", "worker"))
    settle(up, "shop", web=1, worker=1)
    order = said(up, "shop", "worker")
    assert len(order) == 3
    assert order.index("finishing") == (1 if strategy == "recreate" else 2)


def test_workers_are_scaled_restarted_and_stopped(up: Server) -> None:
    up.deploy("shop", hello("one") | WORKER, processes=TYPES)
    assert scale(up, "shop", worker=3)[0] == 200
    settle(up, "shop", web=1, worker=3)
    victim = lines(up, "shop", "worker")[0]["instance"]
    for pid in up.pids():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if (Path("/proc") / str(pid) / "cwd").readlink().name == victim:
                os.kill(pid, signal.SIGKILL)
    wait_for(lambda: victim not in up.instances())
    settle(up, "shop", web=1, worker=3)
    assert len(said(up, "shop", "worker")) >= 4
    scale(up, "shop", worker=0)
    settle(up, "shop", web=1)
    assert up.app("shop")["status"] == "running"
    done = up.deploy("shop", hello("two") | CRASHING, processes=TYPES)
    assert done["status"] == "active", "a type that is scaled to 0 gates nothing"
    status, error = scale(up, "shop", nope=1)
    assert (status, error["code"]) == (400, "bad_request")
    assert "web, worker" in error["message"]
    assert scale(up, "shop", worker=51)[0] == 400
    scale(up, "shop", web=0)
    assert up.app("shop")["status"] == "stopped"


def test_workers_are_adopted_after_kill9_and_come_back_after_a_stop(up: Server) -> None:
    up.deploy("shop", hello("one") | WORKER, processes=TYPES)
    scale(up, "shop", worker=2)
    settle(up, "shop", web=1, worker=2)
    before, pids = states(up), up.pids()
    up.kill9()
    assert up.pids() == pids
    up.start()
    settle(up, "shop", web=1, worker=2)
    assert (states(up), up.pids()) == (before, pids), "a worker was started anew"
    assert up.stop() == 0
    assert not up.pids()
    up.start()
    settle(up, "shop", web=1, worker=2)


def test_kill9_while_a_worker_settles_adopts_it(up: Server) -> None:
    up.deploy("shop", hello("old") | WORKER, processes=TYPES)
    slow = {"worker": {"command": "node worker.js", "settle_secs": 3}}
    begun = up.begin("shop", hello("new") | WORKER, processes=slow)
    wait_for(lambda: len(up.instances()) == 4)
    time.sleep(0.3)
    known = set(up.instances())
    up.kill9()
    up.start()
    assert up.settled(begun["id"])["status"] == "active"
    settle(up, "shop", web=1, worker=1)
    assert set(up.instances()) <= known, "something was started twice"


def test_a_rollback_brings_its_own_processes_back(up: Server) -> None:
    up.deploy("shop", hello("one") | WORKER, processes=TYPES)
    up.deploy("shop", hello("two"))
    settle(up, "shop", web=1)
    made = up.api("POST", "/apps/shop/rollback", {"version": 1})[1]
    assert up.settled(made["id"])["processes"] == up.api("GET", f"/deployments/{made['id']}")[1]["processes"]
    settle(up, "shop", web=1, worker=1)
    same = up.begin("shop", hello("one") | WORKER, processes=TYPES)
    assert same["id"] == made["id"], "a repeat"
    other = up.begin("shop", hello("one") | WORKER, processes={"worker": {"command": "node worker.js now"}})
    assert other["id"] != made["id"], "another worker is another deployment"
    assert up.settled(other["id"])["status"] == "active"
    config = up.api("PUT", "/apps/shop/config", {"set": {"A": "1"}})[1]
    assert list(up.settled(config["deployment_id"])["processes"]) == ["worker"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"processes": {"web": {"command": "x"}}}, "processes"),
        ({"processes": {"w": {"command": ""}}}, "processes.w.command"),
        ({"processes": {"w": {"command": "x", "timeout_secs": 3}}}, "processes.w.timeout_secs"),
        ({"processes": {"c": {"command": "x", "schedule": "* * *"}}}, "processes.c.schedule"),
        ({"processes": {"c": CRON | {"timezone": "No/Where"}}}, "processes.c.schedule"),
        ({"processes": {"c": CRON | {"settle_secs": 1}}}, "processes.c.settle_secs"),
        ({"release_command": {"command": "x", "timeout_secs": 0}}, "release_command.timeout_secs"),
    ],
)  # fmt: skip
def test_process_types_are_checked_by_the_server_too(up: Server, change: dict[str, Any], field: str) -> None:
    digest = up.upload("strict", hello("x"))
    status, error = up.api("POST", "/deployments", {"app": "strict", "digest": digest, **change})
    assert (status, error["code"], error["details"]["field"]) == (400, "bad_request", field), error


# --- release commands

MIGRATION = {
    "migrate.js": "console.log('migrating', process.env.AETHER_PROCESS);"
    "setTimeout(() => { console.log('migrated'); process.exit(Number(process.env.CODE || 0)); },"
    " Number(process.env.TAKES || 100));"
}
COMMAND = {"command": "node migrate.js", "timeout_secs": 30}


def test_a_release_command_runs_once_before_the_release_starts(up: Server) -> None:
    done = up.deploy("shop", hello("one") | MIGRATION, release_command=COMMAND)
    assert (done["status"], done["release_command"]) == ("active", {"command": "node migrate.js", "timeout_secs": 30})
    assert said(up, "shop") == ["migrating release", "migrated", "up one"]
    assert said(up, "shop", "release") == ["migrating release", "migrated"]
    told = [message for phase, message in events(up, done["id"]) if phase == "release"]
    assert told[0] == "running the release command: node migrate.js"
    assert told[1].startswith("the release command exited with code 0 after ")
    assert len(up.instances()) == 1


def test_a_release_command_that_fails_leaves_the_old_release_untouched(up: Server) -> None:
    up.deploy("shop", hello("old"))
    before = states(up)
    done = up.deploy("shop", hello("new") | MIGRATION, release_command=COMMAND, env={"CODE": "4"})
    assert (done["status"], done["error"]["code"]) == ("failed", "release_command")
    assert done["error"]["message"] == "the release command 'node migrate.js' exited with code 4"
    assert done["error"]["log_tail"] == ["migrating release", "migrated"]
    assert up.said("shop") == "old"
    assert states(up) == before
    assert "up new" not in said(up, "shop")


def test_a_release_command_that_takes_too_long_is_stopped(up: Server) -> None:
    up.deploy("shop", hello("old"))
    slow = {**COMMAND, "timeout_secs": 1}
    done = up.deploy("shop", hello("new") | MIGRATION, release_command=slow, env={"TAKES": "60000"})
    assert (done["status"], done["error"]["code"]) == ("failed", "release_command_timeout")
    assert "did not end within 1 s" in done["error"]["message"]
    assert done["error"]["log_tail"] == ["migrating release"]
    wait_for(lambda: len(up.instances()) == 1)
    assert up.said("shop") == "old"


def test_a_long_release_command_does_not_use_up_the_rollouts_time(up: Server) -> None:
    done = up.deploy("shop", hello("x") | MIGRATION, release_command=COMMAND, env={"TAKES": "2500"}, timeout_secs=2)
    assert done["status"] == "active", done["error"]
    assert done["longest_secs"] == 32


def running_command(up: Server, app: str) -> str:
    """The instance of a release command that has said its first word."""
    found: list[str] = wait_for(
        lambda: [line["instance"] for line in lines(up, app, "release") if line["line"].startswith("migrating")]
    )
    return found[-1]


def test_a_cancelled_deployment_stops_its_release_command(up: Server) -> None:
    up.deploy("shop", hello("old"))
    begun = up.begin("shop", hello("new") | MIGRATION, release_command=COMMAND, env={"TAKES": "60000"})
    running_command(up, "shop")
    assert up.api("PATCH", f"/deployments/{begun['id']}", {"status": "cancelled"})[0] == 200
    wait_for(lambda: len(up.instances()) == 1)
    assert up.said("shop") == "old"
    assert up.deploy("shop", hello("after"))["status"] == "active"


@pytest.mark.parametrize(("code", "ends"), [("0", "while down"), ("0", "later"), ("5", "while down"), ("5", "later")])
def test_kill9_during_a_release_command_never_runs_it_twice(up: Server, code: str, ends: str) -> None:
    up.deploy("shop", hello("old"))
    takes = "1500" if ends == "while down" else "4000"
    begun = up.begin(
        "shop", hello("new") | MIGRATION, release_command=COMMAND, env={"CODE": code, "TAKES": takes}
    )  # fmt: skip
    instance = running_command(up, "shop")
    up.kill9()
    if ends == "while down":
        wait_for(lambda: '"exited"' in (up.data / "instances" / instance / "state.json").read_text())
    up.start()
    done = up.settled(begun["id"])
    assert done["status"] == ("active" if code == "0" else "failed"), done["error"]
    assert said(up, "shop", "release") == ["migrating release", "migrated"]
    assert up.said("shop") == ("new" if code == "0" else "old")
    if code == "5":
        assert "exited with code 5" in done["error"]["message"]
    wait_for(lambda: len(up.instances()) == 1)


def test_a_release_command_whose_end_nobody_saw_is_not_run_again(up: Server) -> None:
    up.deploy("shop", hello("old"))
    begun = up.begin("shop", hello("new") | MIGRATION, release_command=COMMAND, env={"TAKES": "60000"})
    instance = running_command(up, "shop")
    up.kill9()
    for pid in up.pids():  # as when the machine goes down: the keeper ends with its command
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            if (Path("/proc") / str(pid) / "cwd").readlink().name == instance:
                os.kill(pid, signal.SIGKILL)
    up.start()
    done = up.settled(begun["id"])
    assert (done["status"], done["error"]["code"]) == ("failed", "release_command")
    assert "unknown" in done["error"]["message"]
    assert said(up, "shop", "release") == ["migrating release"]
    assert up.said("shop") == "old"
    wait_for(lambda: len(up.instances()) == 1)


def test_a_release_command_that_was_only_prepared_is_run_once(up: Server) -> None:
    up.deploy("shop", hello("old"))
    begun = up.begin("shop", hello("new") | MIGRATION, release_command=COMMAND, env={"TAKES": "600"})
    wait_for(lambda: any(phase == "release" for phase, _ in events_so_far(up, begun["id"])))
    up.kill9()
    up.start()
    done = up.settled(begun["id"])
    assert done["status"] == "active", done["error"]
    assert said(up, "shop", "release") == ["migrating release", "migrated"]


def events_so_far(up: Server, deployment_id: str) -> list[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(up.data / "aether.db")) as database:
        return database.execute(
            "SELECT phase, message FROM deployment_events WHERE deployment_id = ?", (deployment_id,)
        ).fetchall()


def test_a_stopped_server_ends_the_release_command_and_its_successor_says_so(up: Server) -> None:
    up.deploy("shop", hello("old"))
    begun = up.begin("shop", hello("new") | MIGRATION, release_command=COMMAND, env={"TAKES": "60000"})
    running_command(up, "shop")
    assert up.stop() == 0
    assert not up.pids()
    up.start()
    done = up.settled(begun["id"])
    assert (done["status"], done["error"]["code"]) == ("failed", "release_command")
    assert "signal 15" in done["error"]["message"]
    assert up.said("shop") == "old"
    wait_for(lambda: len(up.instances()) == 1)


def test_a_release_command_that_left_nothing_on_this_machine_is_not_run_again(up: Server) -> None:
    up.deploy("shop", hello("old"))
    begun = up.begin("shop", hello("new") | MIGRATION, release_command=COMMAND, env={"TAKES": "60000"})
    instance = running_command(up, "shop")
    up.kill9()
    for pid in up.pids():
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            if (Path("/proc") / str(pid) / "cwd").readlink().name == instance:
                os.kill(pid, signal.SIGKILL)
    shutil.rmtree(up.data / "instances" / instance)
    with contextlib.closing(sqlite3.connect(up.data / "aether.db")) as database, database:
        database.execute(
            "UPDATE deployments SET release_command = json_set(release_command, '$.started_at', 1) WHERE id = ?",
            (begun["id"],),
        )
    up.start()
    done = up.settled(begun["id"])
    assert (done["status"], done["error"]["code"]) == ("failed", "release_command")
    assert "it is not run again" in done["error"]["message"]
    assert said(up, "shop", "release") == ["migrating release"]
