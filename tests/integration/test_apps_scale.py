"""Several instances of an app: started, balanced, lost, adopted, stopped and rolled out, with the real runtime."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.server import Server, hello, server, wait_for
from support.traffic import Hammer

EXITS = {"server.js": "console.error('no database'); process.exit(7);"}
SHY = {
    "server.js": """
const http = require('http');
const asked = http.createServer((q, r) => { if (q.url == '/die') process.exit(3); r.end(process.pid + '\\n'); });
asked.listen(process.env.PORT, () => console.log('up'));
process.on('SIGTERM', () => process.exit(0));
"""
}


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path / "up", AETHER_STOP_GRACE_SECS="2", AETHER_DRAIN_TIMEOUT_SECS="3") as it:
        yield it


def scale(up: Server, app: str, web: int) -> dict[str, object]:
    status, found = up.api("POST", f"/apps/{app}/scale", {"web": web})
    assert status == 200, found
    return found


def settle(up: Server, app: str, web: int) -> None:
    """Wait until exactly so many instances are ready and none else is left."""
    wait_for(lambda: up.app(app)["instances"] == {"desired": web, "ready": web})
    wait_for(lambda: len(up.instances()) == web)


def loggers(up: Server, app: str) -> Counter[str]:
    lines = up.api("GET", f"/apps/{app}/logs?tail=500")[1].decode().splitlines()
    return Counter(json.loads(line)["instance"] for line in lines)


def kill_one(up: Server, app: str) -> None:
    """Have one instance end itself: by POST, which the edge sends once only."""
    connection = http.client.HTTPConnection("127.0.0.1", up.port, timeout=20)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("POST", "/die", headers={"Host": f"{app}.localhost"})
        connection.getresponse().read()


def keepers(up: Server) -> dict[str, str]:
    """Instance id → when its record says that it was started."""
    folder = up.data / "instances"
    return {name: (folder / name / "state.json").read_text() for name in up.instances()}


def test_an_app_is_scaled_up_and_down_without_a_failed_request(up: Server) -> None:
    up.deploy("many", hello("one"))
    with Hammer(up, "many") as hammer:
        assert scale(up, "many", 3)["instances"]["desired"] == 3
        settle(up, "many", 3)
        hammer.wait(60)
        scale(up, "many", 1)
        settle(up, "many", 1)
        hammer.wait(20)
    assert not hammer.failures
    assert {status for status, _ in hammer.answers} == {200}
    assert len(set(loggers(up, "many"))) == 3, "every instance's lines carry its own name"
    assert up.app("many")["status"] == "running"


def test_a_stopped_app_says_so_and_comes_back(up: Server) -> None:
    up.deploy("nap", hello("one"))
    assert scale(up, "nap", 0)["status"] == "stopped"
    status, text = up.get("nap")
    assert status == 503
    assert "scaled to 0" in json.loads(text)["message"]
    settle(up, "nap", 0)
    assert up.deploy("nap", hello("two"))["status"] == "active", "a stopped app can be deployed to"
    assert not up.instances()
    up.kill9()
    up.start()
    assert up.get("nap")[0] == 503
    assert (up.app("nap")["status"], up.instances()) == ("stopped", [])
    scale(up, "nap", 2)
    settle(up, "nap", 2)
    assert up.said("nap") == "two"


def test_bounds_and_unknown_processes_are_refused(up: Server) -> None:
    up.api("POST", "/apps", {"name": "strict"})
    for body in ({"web": 51}, {"web": -1}, {"web": 1.5}, {"nope": 1}, {}):
        status, error = up.api("POST", "/apps/strict/scale", body)
        assert (status, error["code"]) == (400, "bad_request"), (body, error)
    assert up.api("POST", "/apps/none/scale", {"web": 1})[0] == 404
    assert up.app("strict")["instances"] == {"desired": 0, "ready": 0}
    assert scale(up, "strict", 2)["instances"] == {"desired": 2, "ready": 0}
    up.deploy("strict", hello("one"))
    settle(up, "strict", 2)


def test_all_replicas_are_adopted_after_kill9(up: Server) -> None:
    up.deploy("herd", SHY)
    scale(up, "herd", 4)
    settle(up, "herd", 4)
    before, pids = keepers(up), up.pids()
    up.kill9()
    assert up.pids() == pids
    up.start()
    settle(up, "herd", 4)
    assert (keepers(up), up.pids()) == (before, pids), "an instance was started anew"
    assert up.get("herd")[0] == 200
    assert up.stop() == 0
    assert not up.pids()
    up.start()
    settle(up, "herd", 4)


def test_replicas_lost_while_the_server_was_down_are_replaced(up: Server) -> None:
    up.deploy("torn", SHY)
    scale(up, "torn", 3)
    settle(up, "torn", 3)
    before = set(up.instances())
    victim = sorted(before)[0]
    up.kill9()
    for pid in up.pids():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if (Path("/proc") / str(pid) / "cwd").readlink().is_relative_to(up.data / "instances" / victim):
                os.kill(pid, signal.SIGKILL)
    up.start()
    wait_for(lambda: up.app("torn")["instances"] == {"desired": 3, "ready": 3})
    wait_for(lambda: len(set(up.instances()) & before) == 2 and len(up.instances()) == 3)


def test_a_crashed_replica_leaves_the_others_serving(up: Server) -> None:
    up.deploy("brave", SHY)
    scale(up, "brave", 3)
    settle(up, "brave", 3)
    with Hammer(up, "brave") as hammer:
        hammer.wait(20)
        for _ in range(2):
            before = set(up.instances())
            kill_one(up, "brave")
            # the next POST could otherwise meet the same one, dying
            wait_for(lambda before=before: not before <= set(up.instances()))
            settle(up, "brave", 3)
        hammer.wait(100)
    assert not [status for status, _ in hammer.answers if status == 503], "nobody was left to serve"
    settle(up, "brave", 3)
    assert sum(loggers(up, "brave").values()) == 5


def test_a_rollout_replaces_every_replica_and_capacity_never_falls(up: Server) -> None:
    up.deploy("fleet", hello("old"))
    scale(up, "fleet", 3)
    settle(up, "fleet", 3)
    lowest = 3
    begun = up.begin("fleet", hello("new"))
    with Hammer(up, "fleet") as hammer:
        while up.api("GET", f"/deployments/{begun['id']}")[1]["status"] not in ("active", "failed"):
            lowest = min(lowest, up.app("fleet")["instances"]["ready"])
        hammer.wait(20)
    assert up.settled(begun["id"])["status"] == "active"
    assert lowest == 3
    assert not hammer.failures
    assert {status for status, _ in hammer.answers} == {200}
    settle(up, "fleet", 3)
    assert up.said("fleet") == "new"


def test_a_bad_release_of_a_scaled_app_starts_few_and_leaves_the_old_one_whole(up: Server) -> None:
    up.deploy("solid", hello("old"))
    scale(up, "solid", 4)
    settle(up, "solid", 4)
    before = set(up.instances())
    done = up.deploy("solid", EXITS)
    assert (done["status"], done["error"]["code"]) == ("failed", "exited")
    assert "no database" in done["error"]["log_tail"]
    settle(up, "solid", 4)
    assert set(up.instances()) == before
    failed = [name for name in loggers(up, "solid") if name not in before]
    assert len(failed) == 1, "a second batch was started"


@pytest.mark.parametrize("delay_ms", [0, 100, 300, 600])
def test_kill9_in_the_middle_of_a_rollout_of_several(up: Server, delay_ms: int) -> None:
    up.deploy("mids", hello("old"))
    scale(up, "mids", 3)
    settle(up, "mids", 3)
    begun = up.begin("mids", hello("new"))
    with contextlib.suppress(AssertionError):
        wait_for(lambda: False, delay_ms / 1000)
    up.kill9()
    up.start()
    assert up.settled(begun["id"])["status"] == "active"
    settle(up, "mids", 3)
    assert up.said("mids") == "new"


def test_scaling_in_the_middle_of_a_rollout(up: Server) -> None:
    up.deploy("shift", hello("old"))
    scale(up, "shift", 2)
    settle(up, "shift", 2)
    begun = up.begin("shift", hello("new"))
    scale(up, "shift", 4)
    assert up.settled(begun["id"])["status"] == "active"
    settle(up, "shift", 4)
    begun = up.begin("shift", hello("newer"))
    scale(up, "shift", 1)
    assert up.settled(begun["id"])["status"] == "active"
    settle(up, "shift", 1)
    assert up.said("shift") == "newer"


def test_recreate_with_several_replicas_never_mixes_releases(up: Server) -> None:
    up.deploy("pure", hello("old"))
    scale(up, "pure", 3)
    settle(up, "pure", 3)
    with Hammer(up, "pure") as hammer:
        hammer.wait(20)
        assert up.deploy("pure", hello("new"), strategy="recreate")["status"] == "active"
        hammer.wait(20)
    said = [text.split()[0] for status, text in hammer.answers if status == 200]
    assert said.index("new") > max(n for n, word in enumerate(said) if word == "old") - 5
    settle(up, "pure", 3)


@pytest.mark.parametrize(("method", "ended"), [("GET", 2), ("POST", 1)])
def test_a_request_that_ends_its_instance_ends_two_at_most(up: Server, method: str, ended: int) -> None:
    """An idempotent one is sent once more, and never a third time."""
    up.deploy("shy", SHY)
    scale(up, "shy", 4)
    settle(up, "shy", 4)
    for _ in range(40):
        assert up.get("shy")[0] == 200  # so that every instance has a kept-open connection
    before = set(up.instances())
    connection = http.client.HTTPConnection("127.0.0.1", up.port, timeout=20)
    with contextlib.closing(connection):
        connection.request(method, "/die", headers={"Host": "shy.localhost"})
        assert connection.getresponse().status == 502
    wait_for(lambda: len(before - set(up.instances())) >= ended)
    settle(up, "shy", 4)
    assert len(before - set(up.instances())) == ended
    assert up.get("shy")[0] == 200
