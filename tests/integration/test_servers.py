"""Several servers on one database and one machine: any of them takes changes, one runs an app, another takes over."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.databases import KINDS, fresh_url
from support.fleet import Fleet, fleet
from support.server import hello, wait_for

AETHER = str(Path(sys.executable).parent / "aether")
SLOW_JS = """
const http = require('http');
setTimeout(() => http.createServer((request, response) => response.end('%s ' + process.pid + '\\n'))
  .listen(process.env.PORT), 500);
process.on('SIGTERM', () => process.exit(0));
"""


@pytest.fixture(scope="module", params=KINDS)
def three(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    if request.param == "sqlite":
        with fleet(folder) as it:
            yield it
        return
    with (
        fresh_url(request, request.param, folder) as url,
        fleet(folder, DATABASE_URL=url) as it,
    ):
        yield it


def until_all_say(three: Fleet, app: str, word: str) -> None:
    """Servers that do not run the app hear of a new release a moment later."""
    wait_for(lambda: {answer.split()[0] for answer in three.serving(app).values()} == {word}, 10)


def test_one_was_first_and_made_the_credential(three: Fleet) -> None:
    assert sum(member.first_start for member in three.members.values()) == 1


def test_every_server_takes_changes_and_sees_them(three: Fleet) -> None:
    a, b, c = (three[name] for name in "abc")
    assert a.deploy("shop", hello("one"))["status"] == "active"
    assert [item["name"] for item in b.api("GET", "/apps")[1]["items"]] == ["shop"]
    made = b.begin("shop", hello("two"))
    assert c.settled(made["id"])["status"] == "active", "a follower at a third server hears of the end"
    until_all_say(three, "shop", "two")
    assert c.api("POST", "/apps/shop/scale", {"web": 2})[0] == 200
    wait_for(lambda: a.app("shop")["instances"]["ready"] == 2)
    assert a.api("DELETE", "/apps/shop")[0] in (200, 202, 204)
    wait_for(lambda: b.api("GET", "/apps/shop")[0] == 404 and not a.instances())


@pytest.mark.parametrize("after_ms", [0, 60, 200, 450, 900])
def test_another_finishes_what_a_killed_one_was_rolling_out(three: Fleet, after_ms: int) -> None:
    three.start()
    app = f"job{after_ms}"
    first = three["a"].deploy(app, {"server.js": SLOW_JS % "one"})
    assert first["status"] == "active"
    made = three["a"].begin(app, {"server.js": SLOW_JS % "two"})
    time.sleep(after_ms / 1000)  # where in the rollout it falls is the point
    three["a"].kill9()
    ended = three["b"].settled(made["id"])
    assert (ended["status"], ended["release"]) == ("active", 2)
    until_all_say(three, app, "two")
    releases = three["c"].api("GET", f"/apps/{app}/releases")[1]["items"]
    assert sorted(item["version"] for item in releases) == [1, 2]
    wait_for(lambda: three["b"].app(app)["instances"]["ready"] == 1)
    assert three["b"].api("DELETE", f"/apps/{app}")[0] in (200, 202, 204)
    wait_for(lambda: not three["b"].instances())


def test_an_app_goes_on_when_its_server_ends(three: Fleet) -> None:
    three.start()
    assert three["a"].deploy("calm", hello("calm"))["status"] == "active"
    before = three["a"].get("calm")[1]
    assert three["a"].stop() == 0
    assert set(three.serving("calm").values()) == {before}, "the same process answers: it was adopted"
    three["b"].kill9()
    assert set(three.serving("calm").values()) == {before}
    three["c"].stop()
    three.start()
    assert set(three.serving("calm").values()) == {before}, "also after all were gone"


def test_a_release_on_trial_gets_its_share_at_every_server(three: Fleet) -> None:
    three.start()
    assert three["a"].deploy("tried", hello("old"))["status"] == "active"
    until_all_say(three, "tried", "old")
    rollout = {"steps": [50, 100], "step_secs": 120, "min_requests": 1_000_000}
    made = three["a"].begin("tried", hello("new"), strategy="canary", rollout=rollout)
    for name in "abc":
        wait_for(lambda name=name: {three[name].get("tried")[1].split()[0] for _ in range(2)} == {"old", "new"})
        said = [three[name].get("tried")[1].split()[0] for _ in range(20)]
        assert said.count("new") == 10, name
    assert three["c"].api("PATCH", f"/deployments/{made['id']}", {"status": "cancelled"})[0] == 200
    assert three["b"].settled(made["id"])["status"] in ("cancelled", "rolled_back")
    until_all_say(three, "tried", "old")


def test_an_app_answers_at_every_other_server_while_it_is_taken_over(three: Fleet) -> None:
    three.start()
    assert three["a"].deploy("steady", hello("steady"))["status"] == "active"
    until_all_say(three, "steady", "steady")
    three["a"].kill9()
    answers: list[tuple[int, str]] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            answers.extend(member.get("steady") for member in three.live)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        wait_for(lambda: any(member.took_up("steady") for member in three.live))
        assert three["b"].api("POST", "/apps/steady/scale", {"web": 2})[0] == 200
        wait_for(lambda: three["b"].app("steady")["instances"]["ready"] == 2)
    finally:
        over.set()
        asking.join()
    assert {status for status, _ in answers} == {200}, [answer for answer in answers if answer[0] != 200][:3]


def test_up_is_refused_beside_them_and_they_beside_it(three: Fleet, tmp_path: Path) -> None:
    three.start()
    said = _refused("up", three["a"].data)
    assert "another server" in said
    up = subprocess.Popen(
        [AETHER, "up", "--port", "0", "--data-dir", str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env=_environment(),
    )  # fmt: skip
    try:
        assert up.stdout is not None
        assert up.stdout.readline()
        assert "'aether up'" in _refused("server", tmp_path)
    finally:
        up.terminate()
        up.wait(30)
        assert up.stdout is not None
        up.stdout.close()


def _refused(verb: str, data: Path) -> str:
    done = subprocess.run(
        [AETHER, verb, "--port", "0", "--data-dir", str(data)],
        capture_output=True, text=True, timeout=60, check=False, env=_environment(),
    )  # fmt: skip
    assert done.returncode == 30, done.stderr
    return done.stderr


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("AETHER_") and k != "DATABASE_URL"}
