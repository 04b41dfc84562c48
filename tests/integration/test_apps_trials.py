"""Canary and bluegreen rollouts behind the real edge: traffic in steps, gates, rollbacks, cancellations, kill -9."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.server import Server, hello, server, wait_for
from support.traffic import Hammer

QUICK = {"steps": [10, 50, 100], "step_secs": 30, "min_requests": 30, "max_latency_ratio": 1000}
LONG = {"steps": [50, 100], "step_secs": 60, "min_requests": 1_000_000, "bake_secs": 60}
ILL = """
const http = require('http');
let asked = 0;
http.createServer((q, r) => {
  if (q.headers['user-agent'] != 'aether-health' && ++asked > %d) r.statusCode = 500;
  setTimeout(() => r.end('ill\\n'), %d);
}).listen(process.env.PORT, () => console.log('up ill'));
process.on('SIGTERM', () => process.exit(0));
"""
FALLS = {
    "server.js": """
const http = require('http');
http.createServer((q, r) => { if (q.url == '/fall') process.exit(9); r.end('falls\\n'); }).listen(process.env.PORT);
process.on('SIGTERM', () => process.exit(0));
"""
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("up"), AETHER_STOP_GRACE_SECS="1") as it:
        yield it


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path / "up", AETHER_STOP_GRACE_SECS="1") as it:
        yield it


def events(up: Server, deployment_id: str) -> list[tuple[str, str]]:
    text = up.api("GET", f"/deployments/{deployment_id}/events")[1].decode()
    found = [json.loads(line[6:]) for line in text.split("\n") if line.startswith('data: {"id":')]
    return [(item["phase"], item["message"]) for item in found if "phase" in item]


def said(hammer: Hammer, start: int = 0) -> Counter[str]:
    return Counter(text.split()[0] for status, text in hammer.answers[start:] if status == 200)


def status(up: Server, made: dict[str, Any]) -> str:
    return up.api("GET", f"/deployments/{made['id']}")[1]["status"]


def on_trial(up: Server, app: str, word: str) -> None:
    """Wait until the new release gets requests."""
    wait_for(lambda: any(up.said(app) == word for _ in range(4)))


def test_a_canary_takes_its_steps_and_no_request_fails(shared: Server) -> None:
    up = shared
    up.deploy("bird", hello("old"))
    up.api("POST", "/apps/bird/scale", {"web": 2})
    wait_for(lambda: up.app("bird")["instances"]["ready"] == 2)
    with Hammer(up, "bird") as hammer:
        done = up.deploy("bird", hello("new"), strategy="canary", rollout=QUICK)
        hammer.wait(20)
    assert (done["status"], done["release"]) == ("active", 2)
    assert not hammer.failures
    assert {status for status, _ in hammer.answers} == {200}
    told = [message for _, message in events(up, done["id"])]
    shares = [message.split("%")[0] for message in told if "% of the requests" in message]
    assert shares == ["10", "50", "100"]
    assert "answers, 0 errors" in told[-3]
    wait_for(lambda: up.app("bird")["instances"] == {"desired": 2, "ready": 2})
    assert up.said("bird") == "new"


def test_the_share_of_a_step_is_exact(shared: Server) -> None:
    up = shared
    up.deploy("share", hello("old"))
    begun = up.begin("share", hello("new"), strategy="canary", rollout={**LONG, "steps": [5, 100]})
    wait_for(lambda: any("5%" in m for _, m in up_events(up, begun)))
    shown = up.api("GET", f"/deployments/{begun['id']}")[1]
    assert shown["step"] == {"number": 1, "of": 2, "percent": 5}
    found = Counter(up.said("share") for _ in range(100))
    assert found == {"old": 95, "new": 5}
    cancel(up, begun)
    assert Counter(up.said("share") for _ in range(40)) == {"old": 40}


def test_other_numbers_are_another_deployment(shared: Server) -> None:
    up = shared
    up.deploy("numbers", hello("old"))
    new = hello("new")
    first = up.begin("numbers", new, strategy="canary", rollout=LONG)
    assert up.begin("numbers", new, strategy="canary", rollout=LONG)["id"] == first["id"]
    second = up.begin("numbers", new, strategy="canary", rollout={**LONG, "steps": [20, 100]})
    assert second["id"] != first["id"], "or a trial could not be made gentler while it runs"
    wait_for(lambda: status(up, first) == "cancelled")
    cancel(up, second)


def up_events(up: Server, made: dict[str, Any]) -> list[tuple[str, str]]:
    """Events so far, without waiting for the end."""
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(up.data / "aether.db")) as database:
        query = "SELECT phase, message FROM deployment_events WHERE deployment_id = ? ORDER BY id"
        return database.execute(query, (made["id"],)).fetchall()


def cancel(up: Server, made: dict[str, Any]) -> None:
    code, found = up.api("PATCH", f"/deployments/{made['id']}", {"status": "cancelled"})
    assert (code, found["status"]) == (200, "cancelled")


@pytest.mark.parametrize(
    ("name", "code", "strategy", "reason"),
    [
        ("errs", ILL % (5, 0), "canary", "error_rate"),
        ("slow", ILL % (10_000, 60), "canary", "latency"),
        ("blue", ILL % (5, 0), "bluegreen", "error_rate"),
    ],
)
def test_a_release_that_answers_badly_is_rolled_back(
    shared: Server, name: str, code: str, strategy: str, reason: str
) -> None:
    up = shared
    up.deploy(name, hello("old"))
    rules = {"steps": [20, 100], "step_secs": 60, "bake_secs": 60, "min_requests": 30}
    with Hammer(up, name) as hammer:
        done = up.deploy(name, {"server.js": code}, strategy=strategy, rollout=rules)
        count = len(hammer.answers)
        hammer.wait(40)
    assert (done["status"], done["error"]["code"], done["release"]) == ("rolled_back", reason, None)
    assert "up ill" in done["error"]["log_tail"]
    assert not hammer.failures
    assert said(hammer, count + 8).keys() == {"old"}
    phases = [phase for phase, _ in events(up, done["id"])]
    assert phases[-2:] == ["rolling_back", "rolled_back"]
    app = up.app(name)
    assert (app["status"], app["release"]["version"]) == ("running", 1)
    assert app["instances"] == {"desired": 1, "ready": 1}
    assert up.deploy(name, hello("next"))["release"] == 2


def test_an_instance_that_ends_on_trial_takes_the_release_back(shared: Server) -> None:
    up = shared
    up.deploy("fell", hello("old"))
    begun = up.begin("fell", FALLS, strategy="bluegreen", rollout=LONG)
    on_trial(up, "fell", "falls")
    up.get("fell", "/fall")
    done = up.settled(begun["id"])
    assert (done["status"], done["error"]["code"]) == ("rolled_back", "exited")
    assert up.said("fell") == "old"


def test_bluegreen_switches_at_once_and_promotes_after_its_bake_time(shared: Server) -> None:
    up = shared
    up.deploy("green", hello("old"))
    with Hammer(up, "green") as hammer:
        began = time.monotonic()
        done = up.deploy("green", hello("new"), strategy="bluegreen", rollout={"bake_secs": 2})
        assert time.monotonic() - began >= 2
    assert done["status"] == "active"
    assert not hammer.failures
    words = [text.split()[0] for _, text in hammer.answers]
    switch = words.index("new")
    assert "old" not in words[switch + 8 :], "traffic was mixed"
    assert up.said("green") == "new"


def test_a_canary_without_visitors_goes_on_by_time_and_a_first_release_needs_no_trial(shared: Server) -> None:
    up = shared
    assert up.deploy("quiet", hello("old"), strategy="canary")["status"] == "active"
    rules = {"steps": [50, 100], "step_secs": 1}
    done = up.deploy("quiet", hello("new"), strategy="canary", rollout=rules)
    assert done["status"] == "active"
    assert "no requests" in events(up, done["id"])[-3][1]
    assert up.said("quiet") == "new"


def test_a_release_that_never_gets_healthy_has_failed_and_was_never_asked(shared: Server) -> None:
    up = shared
    up.deploy("never", hello("old"))
    silent = {"server.js": "setInterval(() => {}, 1000);"}
    done = up.deploy("never", silent, strategy="canary", timeout_secs=2, rollout=LONG)
    assert (done["status"], done["error"]["code"]) == ("failed", "never_listened")


@pytest.mark.parametrize("strategy", ["canary", "bluegreen"])
def test_a_cancelled_or_overtaken_trial_is_taken_back(shared: Server, strategy: str) -> None:
    up = shared
    app = f"halt-{strategy}"
    up.deploy(app, hello("old"))
    begun = up.begin(app, hello("new"), strategy=strategy, rollout=LONG)
    on_trial(up, app, "new")
    with Hammer(up, app) as hammer:
        cancel(up, begun)
        hammer.wait(40)
    assert not hammer.failures
    assert {code for code, _ in hammer.answers} == {200}
    wait_for(lambda: up.app(app)["instances"] == {"desired": 1, "ready": 1})
    assert up.said(app) == "old"
    overtaken = up.begin(app, hello("newer"), strategy=strategy, rollout=LONG)
    on_trial(up, app, "newer")
    assert up.deploy(app, hello("newest"))["status"] == "active"
    assert up.settled(overtaken["id"])["status"] == "cancelled"
    assert up.said(app) == "newest"


@pytest.mark.parametrize("strategy", ["canary", "bluegreen"])
@pytest.mark.parametrize("killed", [True, False])
def test_a_trial_survives_the_server(own: Server, strategy: str, killed: bool) -> None:
    up = own
    up.deploy("tough", hello("old"))
    begun = up.begin("tough", hello("new"), strategy=strategy, rollout=LONG)
    on_trial(up, "tough", "new")
    before = set(up.instances())
    if killed:
        up.kill9()
    else:
        assert up.stop() == 0
    up.start()
    on_trial(up, "tough", "new")
    assert status(up, begun) == "rolling_out"
    if killed:
        assert set(up.instances()) == before, "an instance was started anew"
    assert [m for _, m in up_events(up, begun)][-1].startswith("50%" if strategy == "canary" else "100%")
    cancel(up, begun)
    wait_for(lambda: len(up.instances()) == 1)
    assert Counter(up.said("tough") for _ in range(20)) == {"old": 20}


def test_rules_that_make_no_sense_are_refused(shared: Server) -> None:
    up = shared
    body = {"app": "rules", "digest": up.upload("rules", hello("x")), "strategy": "canary"}
    for rollout, named in [({"steps": [50, 10]}, "steps"), ({"step_secs": 0}, "step_secs"), ({"odd": 1}, "odd")]:
        code, error = up.api("POST", "/deployments", {**body, "rollout": rollout})
        assert code == 400
        assert named in json.dumps(error)
