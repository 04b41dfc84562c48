"""Cron processes in real sandboxes: due, late, overlapping, too long, killed in the middle, paused.

Waiting for the clock would take minutes: a release is made older in the record while no server looks, so that a
moment of its schedule has passed when the next server does.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.server import Server, hello, server, wait_for

REPORT = {
    "report.js": "console.log('reporting', process.env.AETHER_PROCESS);"
    "setTimeout(() => { console.log('reported'); process.exit(Number(process.env.CODE || 0)); },"
    " Number(process.env.TAKES || 50));"
}
EVERY_MONTH = {"command": "node report.js", "schedule": "0 0 1 * *"}
MONTHS = 100 * 86_400


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path / "up", AETHER_STOP_GRACE_SECS="2") as it:
        yield it


def deploy(up: Server, cron: dict[str, Any], **env: str) -> dict[str, Any]:
    done = up.deploy("shop", hello("one") | REPORT, processes={"report": cron}, env=env)
    assert done["status"] == "active", done["error"]
    return done


def write(up: Server, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(up.data / "aether.db")) as database, database:
        database.execute(statement)


def age(up: Server, secs: int = MONTHS) -> None:
    """Restart the server with releases that are older."""
    up.kill9()
    write(up, f"UPDATE deployments SET rollout_completed_at = rollout_completed_at - {secs * 1_000_000}")
    up.start()


def runs(up: Server) -> list[dict[str, Any]]:
    with contextlib.closing(sqlite3.connect(up.data / "aether.db")) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute("SELECT * FROM cron_runs ORDER BY scheduled_at")]


def report(up: Server) -> dict[str, Any]:
    return next(item for item in up.app("shop")["processes"] if item["name"] == "report")


def said(up: Server) -> list[str]:
    text = up.api("GET", "/apps/shop/logs?tail=1000&process=report")[1].decode()
    return [json.loads(line)["line"] for line in text.splitlines() if line]


def ended(up: Server) -> dict[str, Any]:
    """The last run, once it has ended."""
    return wait_for(lambda: (last := report(up)["last_run"]) and last["status"] != "running" and last)


def test_a_missed_moment_is_made_up_for_once(up: Server) -> None:
    deploy(up, EVERY_MONTH)
    found = report(up)
    assert (found["kind"], found["desired"], found["last_run"]) == ("cron", 1, None)
    assert found["next_run"].endswith("-01T00:00:00.000000Z")
    assert said(up) == []
    age(up)
    last = ended(up)
    assert (last["status"], last["exit_code"], last["message"]) == ("succeeded", 0, "exited with code 0")
    assert last["scheduled_at"].endswith("-01T00:00:00.000000Z")
    assert said(up) == ["reporting report", "reported"]
    assert len(runs(up)) == 1, "of three moments one is made up for"
    wait_for(lambda: len(up.instances()) == 1)
    up.kill9()
    up.start()
    time.sleep(1)
    assert len(runs(up)) == 1
    assert up.app("shop")["status"] == "running"


def test_a_missed_moment_can_be_left_out(up: Server) -> None:
    deploy(up, EVERY_MONTH | {"missed": "skip"})
    age(up)
    last = ended(up)
    assert (last["status"], last["message"]) == ("skipped", "no server looked at its time")
    assert said(up) == []


def test_a_run_that_fails_says_so_and_is_not_repeated(up: Server) -> None:
    deploy(up, EVERY_MONTH, CODE="3")
    age(up)
    last = ended(up)
    assert (last["status"], last["exit_code"]) == ("failed", 3)
    age(up)
    time.sleep(1)
    assert len(runs(up)) == 1


def test_a_run_that_takes_too_long_is_ended(up: Server) -> None:
    deploy(up, EVERY_MONTH | {"timeout_secs": 1}, TAKES="60000")
    age(up)
    last = ended(up)
    assert last["status"] == "timed_out"
    assert "time was over" in last["message"]
    assert "reported" not in said(up)
    wait_for(lambda: len(up.instances()) == 1)


@pytest.mark.parametrize("while_down", [True, False])
def test_kill9_during_a_run_adopts_it(up: Server, while_down: bool) -> None:
    deploy(up, EVERY_MONTH, TAKES="1500" if while_down else "4000")
    age(up)
    wait_for(lambda: said(up) == ["reporting report"])
    (run,) = runs(up)
    up.kill9()
    if while_down:
        state = up.data / "instances" / run["id"] / "state.json"
        wait_for(lambda: '"exited"' in state.read_text())
    up.start()
    assert ended(up)["status"] == "succeeded"
    assert said(up) == ["reporting report", "reported"]
    assert [row["id"] for row in runs(up)] == [run["id"]]
    wait_for(lambda: len(up.instances()) == 1)


def test_a_moment_is_skipped_while_the_run_before_it_is_under_way(up: Server) -> None:
    deploy(up, EVERY_MONTH, TAKES="60000")
    age(up)
    wait_for(lambda: said(up) == ["reporting report"])
    up.kill9()
    write(up, "UPDATE cron_runs SET scheduled_at = scheduled_at - 40 * 86400 * 1000000")
    up.start()
    wait_for(lambda: len(runs(up)) == 2)
    first, second = runs(up)
    assert (first["status"], second["status"]) == ("running", "skipped")
    assert "still under way" in second["message"]
    assert report(up)["ready"] == 1
    assert said(up) == ["reporting report"]
    # a new release takes over: the run of the old one goes on, and its schedule is no more
    done = up.deploy("shop", hello("two"))
    assert done["status"] == "active"
    assert [item["name"] for item in up.app("shop")["processes"]] == ["web"]
    assert runs(up)[0]["status"] == "running"
    assert up.api("DELETE", "/apps/shop")[0] == 204
    assert not up.instances()
    assert not up.pids()


def test_a_stopped_server_ends_a_run_and_its_successor_records_it(up: Server) -> None:
    deploy(up, EVERY_MONTH, TAKES="60000")
    age(up)
    wait_for(lambda: said(up) == ["reporting report"])
    assert up.stop() == 0
    assert not up.pids()
    up.start()
    last = ended(up)
    assert (last["status"], last["message"]) == ("failed", "was ended by signal 15")
    assert len(runs(up)) == 1


def test_a_paused_schedule_runs_nothing_and_makes_up_for_nothing(up: Server) -> None:
    deploy(up, EVERY_MONTH)
    assert up.api("POST", "/apps/shop/scale", {"report": 2})[0] == 400
    assert up.api("POST", "/apps/shop/scale", {"report": 0})[0] == 200
    assert (report(up)["desired"], report(up)["next_run"]) == (0, None)
    age(up)
    time.sleep(1)
    up.api("POST", "/apps/shop/scale", {"report": 1})
    time.sleep(1)
    assert runs(up) == []
    assert report(up)["next_run"] is not None
    assert up.app("shop")["status"] == "running"


def test_a_run_comes_at_its_time(up: Server) -> None:
    deploy(up, EVERY_MONTH | {"schedule": "* * * * *"})
    last = wait_for(lambda: (last := report(up)["last_run"]) and last["status"] == "succeeded" and last, 90)
    assert last["scheduled_at"].endswith(":00.000000Z")
    assert last["started_at"][:19] == last["scheduled_at"][:19], "not in the second it was due"


def test_a_run_of_which_nothing_is_left_is_not_started_anew(up: Server) -> None:
    deploy(up, EVERY_MONTH)
    up.kill9()
    write(
        up,
        "INSERT INTO cron_runs (id, app_id, deployment_id, process, scheduled_at, status, started_at) "
        "SELECT '01900000-0000-7000-8000-000000000000', app_id, id, 'report', 1, 'running', 1 FROM deployments",
    )
    up.start()
    last = ended(up)
    assert (last["status"], last["exit_code"]) == ("failed", None)
    assert "nothing of it is left on this machine" in last["message"]
    assert said(up) == []
