"""Rollouts with real instances behind the real edge: swaps, failures, cancellations, rollbacks, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator

import aiohttp
import pytest

from support.server import Server, hello, server, wait_for
from support.traffic import Hammer

NEVER_LISTENS = {"server.js": "console.log('idle hands'); setInterval(() => {}, 1000);"}
EXITS = {"server.js": "console.error('no database'); process.exit(7);"}
SICK = {
    "server.js": "require('http').createServer((q, r) => { r.statusCode = 500; r.end(); }).listen(process.env.PORT);"
}
DEAF = {
    "server.js": "process.on('SIGTERM', () => console.log('not now'));"
    "require('http').createServer((q, r) => r.end('deaf\\n')).listen(process.env.PORT);"
}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("up"), AETHER_STOP_GRACE_SECS="1") as it:
        yield it


def newest(up: Server, app: str) -> dict[str, object]:
    return up.api("GET", f"/deployments?app={app}&limit=1")[1]["items"][0]


def live(up: Server, app: str) -> int:
    """How many instances of the app are left on the machine."""
    specs = [up.data / "instances" / name / "spec.json" for name in up.instances()]
    return sum(spec.exists() and json.loads(spec.read_text())["spec"]["app"] == app for spec in specs)


def test_a_deployed_app_answers_and_tells_what_runs(up: Server) -> None:
    assert up.api("POST", "/apps", {"name": "first"})[0] == 201
    assert up.app("first")["status"] == "empty"
    assert up.get("first")[0] == 503
    done = up.deploy("first", hello("one"))
    assert (done["status"], done["release"], done["error"]) == ("active", 1, None)
    assert up.said("first") == "one"
    app = up.app("first")
    assert app["status"] == "running"
    assert app["instances"] == {"desired": 1, "ready": 1}
    assert app["release"]["digest"] == done["digest"]
    assert app["url"] == f"http://first.localhost:{up.port}/"


def test_no_request_fails_while_releases_follow_one_another(up: Server) -> None:
    up.deploy("swap", hello("r0"))
    with Hammer(up, "swap") as hammer:
        for n in range(1, 5):
            assert up.deploy("swap", hello(f"r{n}"))["status"] == "active"
            assert up.said("swap") == f"r{n}"
    assert not hammer.failures
    assert {status for status, _ in hammer.answers} == {200}
    assert len(hammer.answers) > 50
    assert {text.split()[0] for _, text in hammer.answers} >= {"r0", "r4"}


@pytest.mark.parametrize(
    ("name", "files", "code", "told", "line"),
    [
        ("exits", EXITS, "exited", "code 7", "no database"),
        ("silent", NEVER_LISTENS, "never_listened", "PORT", "idle hands"),
        ("sick", SICK, "health_bad_status", "500", None),
    ],
)
def test_a_bad_release_fails_with_its_lines_and_the_old_one_serves(
    up: Server, name: str, files: dict[str, str], code: str, told: str, line: str | None
) -> None:
    up.deploy(name, hello("old"))
    done = up.deploy(name, files, timeout_secs=2)
    assert done["status"] == "failed"
    assert done["error"]["code"] == code
    assert told in done["error"]["message"]
    assert line is None or line in done["error"]["log_tail"]
    assert up.said(name) == "old"
    app = up.app(name)
    assert (app["status"], app["release"]["version"]) == ("running", 1)
    wait_for(lambda: live(up, name) == 1)


def test_the_port_that_is_listened_on_instead_is_named(up: Server) -> None:
    code = {
        "server.js": "require('http').createServer((q, r) => r.end('x')).listen(3000, () => console.log('on 3000'));"
    }
    done = up.deploy("portly", code, timeout_secs=2)
    assert done["error"]["code"] == "wrong_port"
    assert "3000" in done["error"]["message"]
    assert "process.env.PORT" in done["error"]["message"]


def test_content_that_is_not_what_the_upload_said_is_not_run(up: Server) -> None:
    digest = up.upload("liar", hello("x"), content_digest="c" * 64)
    status, made = up.api("POST", "/deployments", {"app": "liar", "digest": digest, "command": "node server.js"})
    assert status == 201
    done = up.settled(made["id"])
    assert (done["status"], done["error"]["code"]) == ("failed", "digest_mismatch")
    assert not (up.data / "releases" / "liar" / digest).exists()


def test_a_first_release_that_fails_leaves_a_failed_app(up: Server) -> None:
    assert up.deploy("stillborn", EXITS)["status"] == "failed"
    assert up.app("stillborn")["status"] == "failed"
    assert up.get("stillborn")[0] == 503


def test_a_configured_path_must_answer_well(up: Server) -> None:
    code = {
        "server.js": "require('http').createServer((q, r) => { r.statusCode = q.url == '/ok' ? 200 : 404; r.end(); })"
        ".listen(process.env.PORT);"
    }
    assert up.deploy("paths", code)["status"] == "active"
    failed = up.deploy("paths", code, health={"path": "/missing"}, timeout_secs=1)
    assert "404" in failed["error"]["message"]
    assert up.deploy("paths", code, health={"path": "/ok", "port": 4321})["status"] == "active"


def test_an_app_that_ignores_sigterm_is_replaced(up: Server) -> None:
    up.deploy("deaf", DEAF)
    began = time.monotonic()
    assert up.deploy("deaf", hello("new"))["status"] == "active"
    assert time.monotonic() - began < 5, "the new release waited for the old one's end"
    assert up.said("deaf") == "new"


def test_repeats_are_recognised_only_against_the_newest(up: Server) -> None:
    a, b = hello("a"), hello("b")
    first = up.deploy("abba", a)
    again = up.begin("abba", a)
    assert again["id"] == first["id"]
    other = up.begin("abba", a, runtime="node18")
    assert other["id"] != first["id"], "the same artifact for another runtime is not the same deployment"
    first = up.settled(other["id"])
    second = up.deploy("abba", b)
    third = up.deploy("abba", a)
    assert len({first["id"], second["id"], third["id"]}) == 3
    assert [first["release"], second["release"], third["release"]] == [2, 3, 4]
    assert up.deploy("abba", EXITS)["status"] == "failed"
    failed = newest(up, "abba")
    fourth = up.begin("abba", EXITS)
    assert fourth["id"] != failed["id"], "a failed deployment is no reason not to try again"
    assert up.settled(fourth["id"])["status"] == "failed"


def test_idempotency_keys(up: Server) -> None:
    digest = up.upload("keyed", hello("k"))
    body = {"app": "keyed", "digest": digest, "command": "node server.js"}
    status, made = up.api("POST", "/deployments", body, {"Idempotency-Key": "k1"})
    assert status == 201
    assert up.api("POST", "/deployments", body, {"Idempotency-Key": "k1"})[0] == 200
    status, error = up.api("POST", "/deployments", {**body, "command": "node x"}, {"Idempotency-Key": "k1"})
    assert (status, error["code"]) == (409, "idempotency_conflict")
    assert up.settled(made["id"])["status"] == "active"


def test_a_newer_deployment_supersedes_the_one_under_way(up: Server) -> None:
    up.deploy("race", hello("old"))
    slow = up.begin("race", NEVER_LISTENS, timeout_secs=60)
    fast = up.begin("race", hello("fast"))
    assert up.settled(slow["id"])["status"] == "cancelled"
    assert up.settled(fast["id"])["status"] == "active"
    assert up.said("race") == "fast"


def test_many_deployments_at_once_end_with_one_active(up: Server) -> None:
    digests = [up.upload("storm", hello(f"s{n}")) for n in range(6)]
    made: list[dict[str, object]] = []

    def send(digest: str) -> None:
        made.append(
            up.api("POST", "/deployments", {"app": "storm", "digest": digest, "command": "node server.js"})[1]
        )

    threads = [threading.Thread(target=send, args=(digest,)) for digest in digests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    states = [up.settled(str(item["id"]))["status"] for item in made]
    rows = up.api("GET", "/deployments?app=storm")[1]["items"]
    assert [row["status"] for row in rows].count("active") == 1
    assert set(states) <= {"active", "cancelled", "superseded"}
    active = next(row for row in rows if row["status"] == "active")
    assert active["id"] == rows[0]["id"], "not the newest one won"
    wait_for(lambda: up.app("storm")["instances"] == {"desired": 1, "ready": 1})


def test_cancel_keeps_the_old_release(up: Server) -> None:
    up.deploy("halt", hello("old"))
    begun = up.begin("halt", NEVER_LISTENS, timeout_secs=60)
    wait_for(lambda: newest(up, "halt")["status"] == "rolling_out")
    status, cancelled = up.api("PATCH", f"/deployments/{begun['id']}", {"status": "cancelled"})
    assert (status, cancelled["status"]) == (200, "cancelled")
    assert up.settled(begun["id"])["status"] == "cancelled"
    status, error = up.api("PATCH", f"/deployments/{begun['id']}", {"status": "cancelled"})
    assert (status, error["code"]) == (409, "conflict")
    assert up.said("halt") == "old"
    assert up.deploy("halt", hello("after"))["status"] == "active", "the cancelled rollout left a lock"


def test_recreate_stops_the_old_first_and_brings_it_back_on_failure(up: Server) -> None:
    up.deploy("single", hello("old"))
    assert up.deploy("single", hello("new"), strategy="recreate")["status"] == "active"
    assert up.said("single") == "new"
    assert up.deploy("single", EXITS, strategy="recreate")["status"] == "failed"
    wait_for(lambda: up.said("single") == "new")
    wait_for(lambda: up.app("single")["instances"] == {"desired": 1, "ready": 1})


def test_rollback_is_exactly_the_named_release(up: Server) -> None:
    one = up.deploy("back", hello("one"), env={"SAY": "env-one"})
    two = up.deploy("back", hello("two"))
    three = up.deploy("back", hello("three"))
    status, made = up.api("POST", "/apps/back/rollback", {"digest": one["digest"][:12]})
    assert status == 201
    assert made["digest"] == one["digest"]
    assert made["rollback_of"] == one["id"]
    assert up.settled(made["id"])["release"] == 4
    assert up.said("back") == "env-one"
    made = up.api("POST", "/apps/back/rollback", {})[1]
    assert made["digest"] == three["digest"], "nothing named means the release before the active one"
    up.settled(made["id"])
    made = up.api("POST", "/apps/back/rollback", {"version": 2})[1]
    assert made["digest"] == two["digest"]
    up.settled(made["id"])
    assert up.said("back") == "two"
    assert up.api("POST", "/apps/back/rollback", {"version": 99})[0] == 404
    assert up.api("POST", "/apps/back/rollback", {"version": 1, "digest": one["digest"]})[0] == 400
    versions = [r["version"] for r in up.api("GET", "/apps/back/releases")[1]["items"]]
    assert versions == [6, 5, 4, 3, 2, 1]


def test_a_rollback_that_is_sent_twice_with_one_key_is_done_once(up: Server) -> None:
    one, two = up.deploy("twice", hello("one")), up.deploy("twice", hello("two"))
    assert (one["release"], two["release"]) == (1, 2)
    key = {"Idempotency-Key": "one-intent"}
    first = up.api("POST", "/apps/twice/rollback", {}, key)[1]
    assert up.settled(first["id"])["status"] == "active"
    # the answer was lost and the client asks again: "the release before the active one" is another one by now
    second = up.api("POST", "/apps/twice/rollback", {}, key)[1]
    assert second["id"] == first["id"]
    assert up.said("twice") == "one"
    assert len(up.api("GET", "/deployments?app=twice")[1]["items"]) == 3
    assert up.api("POST", "/deployments", {"app": "twice", "digest": two["digest"]}, key)[0] == 409


def test_a_config_change_deploys_and_a_rollback_brings_the_old_config_back(up: Server) -> None:
    status, config = up.api("PUT", "/apps/conf/config", {"set": {"SAY": "x"}})
    assert status == 404
    up.api("POST", "/apps", {"name": "conf"})
    config = up.api("PUT", "/apps/conf/config", {"set": {"SAY": "early"}})[1]
    assert (config["version"], config["deployment_id"]) == (1, None)
    up.deploy("conf", hello("default"))
    assert up.said("conf") == "early"
    config = up.api("PUT", "/apps/conf/config", {"set": {"SAY": "late", "OTHER": "1"}})[1]
    assert up.settled(config["deployment_id"])["config_version"] == 2
    assert up.said("conf") == "late"
    same = up.api("PUT", "/apps/conf/config", {"set": {"SAY": "late"}})[1]
    assert (same["version"], same["env"], same["changed"]) == (2, {"SAY": "late", "OTHER": "1"}, [])
    assert same["deployment_id"] is None
    back = up.api("POST", "/apps/conf/rollback", {"version": 1})[1]
    up.settled(back["id"])
    assert up.said("conf") == "early"
    assert up.api("GET", "/apps/conf/config")[1]["env"] == {"SAY": "early"}
    config = up.api("PUT", "/apps/conf/config", {"unset": ["SAY"]})[1]
    up.settled(config["deployment_id"])
    assert up.said("conf") == "default"
    status, error = up.api("PUT", "/apps/conf/config", {"set": {"PORT": "1"}})
    assert (status, error["code"]) == (400, "bad_request")
    assert "PORT" in error["message"]


def test_a_killed_instance_is_restarted(up: Server) -> None:
    code = {
        "server.js": "require('http').createServer((q, r) => { if (q.url == '/die') process.exit(3); r.end('ok'); })"
        ".listen(process.env.PORT, () => console.log('listening'));"
    }
    up.deploy("phoenix", code)
    with contextlib.suppress(OSError, http.client.HTTPException):
        up.get("phoenix", "/die")
    wait_for(lambda: up.get("phoenix")[0] == 200, 10)
    wait_for(lambda: up.app("phoenix")["instances"] == {"desired": 1, "ready": 1})
    lines = up.api("GET", "/apps/phoenix/logs")[1].decode().splitlines()
    assert [json.loads(line)["line"] for line in lines].count("listening") == 2
    assert len({json.loads(line)["instance"] for line in lines}) == 2


def test_logs_follow_from_one_release_to_the_next(up: Server) -> None:
    up.deploy("talk", hello("one"))
    connection = http.client.HTTPConnection("127.0.0.1", up.port, timeout=20)
    token = (up.data / "admin-token").read_text().strip()
    headers = {"Authorization": f"Bearer {token}"}
    connection.request("GET", "/apps/talk/logs?follow=true&tail=10", headers=headers)
    answer = connection.getresponse()
    try:
        assert json.loads(answer.readline())["line"] == "up one"
        two = up.deploy("talk", hello("two"))
        seen = json.loads(answer.readline())
        assert seen["line"] == "up two"
        assert seen["deployment_id"] == two["id"]
        assert seen["digest"] == two["digest"]
    finally:
        connection.close()
    assert up.api("GET", "/apps/talk/logs?since=yesterday")[0] == 400
    assert up.api("GET", "/apps/talk/logs?tail=1")[1].decode().count("\n") == 1
    assert up.api("GET", "/apps/none/logs")[0] == 404


def test_events_resume_where_they_were_left(up: Server) -> None:
    done = up.deploy("seen", hello("x"))
    text = up.api("GET", f"/deployments/{done['id']}/events")[1].decode()
    ids = [int(line[4:]) for line in text.split("\n") if line.startswith("id: ")]
    phases = [json.loads(line[6:])["phase"] for line in text.split("\n") if line.startswith('data: {"id":') and
              "phase" in line]  # fmt: skip
    assert phases == ["pending", "verifying", "rolling_out", "rolling_out", "active"]
    resumed = up.api("GET", f"/deployments/{done['id']}/events", headers={"Last-Event-ID": str(ids[2])})[1].decode()
    assert [int(line[4:]) for line in resumed.split("\n") if line.startswith("id: ")] == ids[3:]


def test_deleting_an_app_leaves_nothing(up: Server) -> None:
    before = up.instances()
    up.deploy("gone", hello("x"))
    # others that were on their way out may have gone meanwhile
    assert len(set(up.instances()) - set(before)) == 1
    assert up.api("DELETE", "/apps/gone")[0] == 204
    assert up.get("gone")[0] == 404
    assert up.api("GET", "/apps/gone")[0] == 404
    assert up.api("DELETE", "/apps/gone")[0] == 404
    assert not [p for p in up.data.rglob("*") if "gone" in p.name and "uids" not in p.name]
    assert set(up.instances()) <= set(before)
    assert up.deploy("gone", hello("again"))["release"] == 1


def test_old_unpacked_releases_are_pruned(up: Server) -> None:
    done = [up.deploy("lean", hello(f"v{n}"))["digest"] for n in range(4)]
    folder = up.data / "releases" / "lean"
    wait_for(lambda: {p.name for p in folder.iterdir()} == set(done[-2:]))


def test_bad_requests_name_the_field(up: Server) -> None:
    digest = up.upload("strict", hello("x"))
    body = {"app": "strict", "digest": digest}
    for change, named in [
        ({"strategy": "yolo"}, "strategy"),
        ({"timeout_secs": -1}, "timeout_secs"),
        ({"timeout_secs": "soon"}, "timeout_secs"),
        ({"command": " "}, "command"),
        ({"env": {"1X": "y"}}, "1X"),
        ({"health": {"path": "no-slash"}}, "health.path"),
        ({"unknown": 1}, "unknown"),
    ]:
        status, error = up.api("POST", "/deployments", {**body, **change})
        assert status == 400, (change, error)
        assert named in json.dumps(error), (change, error)
    assert up.api("POST", "/deployments", {**body, "digest": "zz"})[1]["code"] == "invalid_digest"
    assert up.api("POST", "/deployments", {**body, "digest": "0" * 64})[0] == 404
    assert up.api("POST", "/apps", {"name": "No"})[0] == 400
    assert up.api("POST", "/apps", {"name": "strict"})[0] == 409
    assert up.api("GET", "/deployments?status=odd")[0] == 400
    assert up.api("GET", "/deployments/none")[0] == 404


def test_deleting_an_app_in_the_middle_of_its_rollout(up: Server) -> None:
    up.deploy("torn", hello("old"))
    up.begin("torn", NEVER_LISTENS, timeout_secs=60)
    wait_for(lambda: live(up, "torn") == 2)
    assert up.api("DELETE", "/apps/torn")[0] == 204
    assert live(up, "torn") == 0
    assert not (up.data / "releases" / "torn").exists()
    assert up.deploy("torn", hello("fresh"))["release"] == 1


async def test_logs_over_a_websocket(up: Server) -> None:
    await asyncio.to_thread(up.deploy, "wired", hello("one"))
    token = (up.data / "admin-token").read_text().strip()
    base = f"ws://127.0.0.1:{up.port}/apps/wired/logs?tail=5"
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(base, headers={"Authorization": f"Bearer {token}"}) as socket:
            first = await socket.receive_json(timeout=10)
            assert (first["line"], first["stream"], first["app"]) == ("up one", "stdout", "wired")
            await asyncio.to_thread(up.deploy, "wired", hello("two"))
            assert (await socket.receive_json(timeout=10))["line"] == "up two"
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await session.ws_connect(base)


def test_an_app_that_keeps_falling_over_is_restarted_ever_more_slowly(up: Server) -> None:
    code = {
        "server.js": "console.log('start');"
        "require('http').createServer((q, r) => r.end('x')).listen(process.env.PORT);"
        "setTimeout(() => process.exit(1), 400);"
    }
    assert up.deploy("wobbly", code)["status"] == "active"
    time.sleep(6)
    starts = len(up.api("GET", "/apps/wobbly/logs")[1].decode().splitlines())
    assert 3 <= starts <= 7, starts
    assert live(up, "wobbly") <= 1
