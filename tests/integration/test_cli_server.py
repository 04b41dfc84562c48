"""The client and the installed `aether` against a small real HTTP server that breaks in chosen ways."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aether.client.api import Api
from aether.client.follow import follow_log, watch_deployment
from aether.client.transport import Transport
from aether.model.errors import (
    AetherError,
    ConfigError,
    Conflict,
    NetworkError,
    NotFound,
    PayloadTooLarge,
    ServiceUnavailable,
    Unauthorized,
)
from support.breaking import Exchange, Handler, Server, serving

AETHER = str(Path(sys.executable).parent / "aether")


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as it:
        yield it


@pytest.fixture
def api(server: Server) -> Iterator[Api]:
    with Api(Transport(server.url, "secret")) as it:
        yield it


APP = {
    "id": "1", "name": "shop", "owner": "ada", "created_at": "2026-01-02T03:04:05.000006Z", "url": "http://shop.localhost/",
    "status": "running", "release": {"version": 3, "digest": "a" * 64, "deployment_id": "d3",
    "created_at": "2026-01-02T03:04:05.000006Z"}, "instances": {"desired": 1, "ready": 1},
}  # fmt: skip


# --- the transport ---------------------------------------------------------------------------------


def test_one_connection_serves_many_calls(server: Server, api: Api) -> None:
    server.routes["/apps/shop"] = lambda it: it.reply(APP)
    for _ in range(3):
        assert api.app("shop")["name"] == "shop"
    assert len({it.client_address for it in server.seen}) == 1
    assert {it.headers["Authorization"] for it in server.seen} == {"Bearer secret"}


def test_hosts_below_localhost_are_dialled_on_loopback(server: Server) -> None:
    server.routes["/apps"] = lambda it: it.reply({"items": [], "next_cursor": None})
    with Api(Transport(f"http://api.localhost:{server.server_port}")) as api:
        api.apps()
    assert server.seen[0].headers["Host"] == f"api.localhost:{server.server_port}"


def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "api.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    asked: list[bytes] = []

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            asked.append(connection.recv(65536))
            payload = json.dumps(APP).encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(payload), payload))

    thread = threading.Thread(target=answer)
    thread.start()
    with Api(Transport(f"unix:{path}")) as api:
        assert api.app("shop")["name"] == "shop"
    thread.join()
    listener.close()
    assert asked[0].startswith(b"GET /apps/shop HTTP/1.1\r\n")
    assert b"\r\nHost: localhost\r\n" in asked[0]


@pytest.mark.parametrize(
    ("status", "content", "kind", "said"),
    [
        (404, {"code": "not_found", "message": "no app 'x'", "trace_id": "t1"}, NotFound, "no app 'x'"),
        (409, {"code": "conflict", "message": "taken", "details": {"name": "x"}}, Conflict, "taken"),
        (401, {"code": "unauthorized", "message": "bad token"}, Unauthorized, "aether login"),
        (413, b"<html>too big</html>", PayloadTooLarge, "413"),
        (503, b"", ServiceUnavailable, "503"),
        (500, {"code": "internal", "message": "oops", "trace_id": "t2"}, AetherError, "oops"),
        (404, b"{not json", NotFound, "404"),
        (200, b"<html>a router's login page</html>", NetworkError, "is the address right"),
    ],
)
def test_errors_of_the_server(
    server: Server, api: Api, status: int, content: Any, kind: type[Exception], said: str
) -> None:
    server.routes["/apps/x"] = lambda it: it.reply(content, status)
    with pytest.raises(kind, match=said):
        api.app("x")
    assert len(server.seen) == 1, "an answer was asked for again"


def test_the_trace_id_and_details_stay(server: Server, api: Api) -> None:
    envelope = {"code": "conflict", "message": "taken", "details": {"name": "x"}, "trace_id": "t1"}
    server.routes["/apps"] = lambda it: it.reply(envelope, 409)
    with pytest.raises(Conflict) as caught:
        api.create_app("x")
    assert caught.value.details == {"name": "x", "trace_id": "t1"}


def test_an_unknown_code_keeps_its_code(server: Server, api: Api) -> None:
    server.routes["/apps/x"] = lambda it: it.reply({"code": "teapot", "message": "short"}, 418)
    with pytest.raises(Exception, match="short") as caught:
        api.app("x")
    assert getattr(caught.value, "code", None) == "teapot"


def test_what_may_be_repeated_is_repeated_after_a_broken_connection(server: Server, api: Api) -> None:
    server.routes["/apps/shop"] = lambda it: it.cut() if it.number < 3 else it.reply(APP)
    assert api.app("shop")["name"] == "shop"
    assert len(server.seen) == 3
    server.routes["/apps/other"] = lambda it: it.cut()
    with pytest.raises(NetworkError):
        api.app("other")
    assert len(server.seen) == 6, "retries are not bounded"


def test_what_may_not_be_repeated_is_sent_once(server: Server, api: Api) -> None:
    server.routes["/apps"] = lambda it: it.cut()
    with pytest.raises(NetworkError):
        api.create_app("shop")
    assert len(server.seen) == 1
    server.routes["/deployments"] = lambda it: it.cut() if it.number == 1 else it.reply({"id": "d"}, 201)
    made, created = api.create_deployment("shop", digest="d", runtime="node20", command="x", idempotency_key="k")
    assert (made["id"], created) == ("d", True)
    assert [it.headers["Idempotency-Key"] for it in server.seen[1:]] == ["k", "k"]


def test_a_connection_that_the_server_closed_in_between_costs_nothing(server: Server, api: Api) -> None:
    def answer(it: Exchange) -> None:
        it.reply(APP, 201)
        it.cut()

    server.routes["/apps"] = answer
    for n in range(3):
        api.create_app(f"a{n}")
        time.sleep(0.05)  # the close has to arrive; a POST must not run into it
    assert len(server.seen) == 3


def test_a_body_that_ends_early_is_no_answer(server: Server, api: Api) -> None:
    def answer(it: Exchange) -> None:
        it.send_response(200)
        it.send_header("Content-Length", "1000")
        it.end_headers()
        it.wfile.write(b'{"name": "shop"}')
        it.wfile.flush()
        it.cut()

    server.routes["/apps/shop"] = answer
    with pytest.raises(NetworkError):
        api.app("shop")


def test_a_slow_server_meets_the_deadline(server: Server) -> None:
    stop = threading.Event()

    def drip(it: Exchange) -> None:
        it.send_response(200)
        it.send_header("Content-Length", "1000")
        it.end_headers()
        while not stop.wait(0.05):
            it.wfile.write(b" ")
            it.wfile.flush()

    def silence(it: Exchange) -> None:
        stop.wait(20)
        it.cut()

    server.routes.update({"/apps/drip": drip, "/apps/silence": silence})
    try:
        for name in ("drip", "silence"):
            with Api(Transport(server.url, timeout_s=0.4)) as api:
                started = time.monotonic()
                with pytest.raises(NetworkError, match="in time"):
                    api.app(name)
                assert time.monotonic() - started < 3
    finally:
        stop.set()


def test_redirects_keep_the_token_at_home(server: Server, api: Api) -> None:
    with serving() as elsewhere:
        elsewhere.routes["/blob"] = lambda it: it.reply(b"bytes")
        server.routes["/artifacts/d/download"] = lambda it: it.reply(status=307, Location=f"{elsewhere.url}/blob")
        assert api.download("d") == b"bytes"
        assert server.seen[0].headers["Authorization"] == "Bearer secret"
        assert elsewhere.seen[0].headers["Authorization"] is None
    server.routes["/artifacts/e/download"] = lambda it: it.reply(status=307, Location="/blob?x=1")
    server.routes["/blob"] = lambda it: it.reply(b"own")
    assert api.download("e") == b"own"
    assert server.seen[-1].headers["Authorization"] == "Bearer secret"
    server.routes["/artifacts/f/download"] = lambda it: it.reply(status=302, Location="/artifacts/f/download")
    with pytest.raises(NetworkError, match="without end"):
        api.download("f")
    server.routes["/apps"] = lambda it: it.reply(status=302, Location="/elsewhere")
    with pytest.raises(NetworkError, match="turn it into a GET"):
        api.create_app("x")
    server.routes["/artifacts/g/download"] = lambda it: it.reply(status=302, Location="file:///etc/passwd")
    with pytest.raises(ConfigError, match="not an address"):
        api.download("g")


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Api(Transport(f"http://127.0.0.1:{port}")) as api, pytest.raises(NetworkError, match="aether up"):
        api.apps()


# --- streams over broken connections ---------------------------------------------------------------


def log_line(n: int) -> dict[str, Any]:
    return {
        "time": f"2026-01-02T03:04:{n // 10:02d}.{n % 10}00000Z", "stream": "stdout", "line": f"line {n}",
        "app": "shop",
        "release": 1, "deployment_id": "d", "digest": "0" * 64, "process": "web",
        "instance": "i1", "seq": n + 1,
    }  # fmt: skip


def log_server(total: int, drop_every: int) -> Handler:
    """Serves lines as the API does, but every connection breaks in the middle of a line after `drop_every`."""

    def answer(it: Exchange) -> None:
        query = dict(part.split("=", 1) for part in it.path.partition("?")[2].split("&"))
        since = query.get("since", "").replace("%3A", ":")
        fresh = [log_line(n) for n in range(total)]
        lines = [line for line in fresh if line["time"] >= since][-int(query["tail"]) :]
        it.begin_chunks("application/x-ndjson")
        start = 0
        if since:
            start = next(n for n, line in enumerate(lines) if line["time"] > newest[0])
        for n, line in enumerate(lines):
            raw = json.dumps(line).encode() + b"\n"
            if n >= start + drop_every:
                it.chunk(raw[:20])
                it.cut()
                return
            newest[0] = max(newest[0], line["time"])
            it.chunk(b"\n" + raw[:9])
            it.chunk(raw[9:])
        it.chunk(b"")

    newest = [""]
    return answer


def test_a_followed_log_survives_its_connections(server: Server) -> None:
    total = 120
    server.routes["/apps/shop/logs"] = log_server(total, 25)
    got: list[str] = []
    states: list[str] = []
    with Transport(server.url) as transport:
        follow = follow_log(transport, "shop", tail=1000, on_state=states.append, pause=lambda _: None)
        for batch in follow:
            got += [line["line"] for _, line in batch]
            if len(got) >= total:
                break
        follow.close()
    assert got == [f"line {n}" for n in range(total)]
    assert len(server.seen) >= 5
    assert any("connecting again" in state for state in states)


def test_a_log_that_is_not_followed_ends_and_an_unknown_app_is_said(server: Server, api: Api) -> None:
    server.routes["/apps/shop/logs"] = log_server(30, 20)
    got = [line["line"] for batch in api.log("shop", tail=1000) for _, line in batch]
    assert got == [f"line {n}" for n in range(30)]
    server.routes["/apps/none/logs"] = lambda it: it.reply({"code": "not_found", "message": "no app 'none'"}, 404)
    with pytest.raises(NotFound, match="none"):
        list(api.log("none", follow=True))


def test_following_ends_when_the_app_goes_or_patience_does(server: Server) -> None:
    def gone(it: Exchange) -> None:
        if it.number > 1:
            it.reply({"code": "not_found", "message": "deleted"}, 404)
        else:
            it.begin_chunks("application/x-ndjson")
            it.chunk(b"\n")
            it.cut()

    server.routes["/apps/shop/logs"] = gone
    with Transport(server.url) as transport, pytest.raises(NotFound, match="deleted"):
        list(follow_log(transport, "shop", pause=lambda _: None))

    def broken(it: Exchange) -> None:
        if it.number > 1:
            it.reply({"code": "service_unavailable", "message": "restarting"}, 503)
        else:
            it.begin_chunks("application/x-ndjson")
            it.cut()

    server.routes["/apps/other/logs"] = broken
    with Transport(server.url) as transport, pytest.raises(ServiceUnavailable, match="restarting"):
        list(follow_log(transport, "other", patience_s=0.2, pause=lambda _: time.sleep(0.01)))


def test_an_outage_is_said_once(server: Server) -> None:
    def answer(it: Exchange) -> None:
        if 1 < it.number < 6:
            it.reply({"code": "service_unavailable", "message": "restarting"}, 503)
        else:
            it.begin_chunks("application/x-ndjson")
            it.chunk(b"\n" if it.number == 1 else json.dumps(log_line(1)).encode() + b"\n")
            it.cut()

    server.routes["/apps/shop/logs"] = answer
    states: list[str] = []
    with Transport(server.url) as transport:
        for batch in follow_log(transport, "shop", on_state=states.append, pause=lambda _: None):
            if batch:
                break
    assert [state for state in states if "restarting" in state] == [
        "the log stream ended (restarting); connecting again"
    ]
    assert states[-1] == "connected again"


def test_silence_without_keep_alive_is_a_broken_connection(server: Server) -> None:
    stop = threading.Event()

    def answer(it: Exchange) -> None:
        it.begin_chunks("application/x-ndjson")
        it.chunk(json.dumps(log_line(it.number)).encode() + b"\n")
        stop.wait(20)

    server.routes["/apps/shop/logs"] = answer
    with Transport(server.url) as transport:
        follow = follow_log(transport, "shop", silence_s=0.2, pause=lambda _: None)
        got = [next(follow)[0][1]["line"] for _ in range(3)]
        follow.close()
    stop.set()
    assert got == ["line 1", "line 2", "line 3"]


DEPLOYMENT = {
    "id": "d4", "app": "shop", "status": "active", "release": 4, "error": None, "url": "http://shop.localhost/",
    "digest": "a" * 64,
}  # fmt: skip


def event(n: int, phase: str = "rolling_out") -> bytes:
    data = {"id": n, "deployment_id": "d4", "phase": phase, "message": f"step {n}", "timestamp": "2026"}
    return f"id: {n}\nevent: phase\ndata: {json.dumps(data)}\n\n".encode()


def test_events_resume_after_the_last_one(server: Server) -> None:
    def answer(it: Exchange) -> None:
        last = int(it.headers.get("Last-Event-ID") or 0)
        it.begin_chunks("text/event-stream")
        it.chunk(b": keep-alive\n\n")
        # a server that repeats one event too many does no harm
        for n in range(max(1, last), last + 3):
            it.chunk(event(n))
        if last >= 5:
            it.chunk(b"event: end\ndata: " + json.dumps(DEPLOYMENT).encode() + b"\n\n")
            it.chunk(b"")
        else:
            it.chunk(event(last + 9)[:30])
            it.cut()

    server.routes["/deployments/d4/events"] = answer
    got: list[int] = []
    with Transport(server.url) as transport:
        found = watch_deployment(transport, "d4", lambda it: got.append(it["id"]), pause=lambda _: None)
    assert found["status"] == "active"
    assert got == sorted(set(got))
    assert got[0] == 1
    assert [it.headers["Last-Event-ID"] for it in server.seen][:2] == [None, "2"]


def test_watching_stops_at_its_deadline(server: Server) -> None:
    stop = threading.Event()

    def answer(it: Exchange) -> None:
        it.begin_chunks("text/event-stream")
        while not stop.wait(0.05):
            it.chunk(b": keep-alive\n\n")

    server.routes["/deployments/d4/events"] = answer
    started = time.monotonic()
    try:
        with Transport(server.url) as transport, pytest.raises(TimeoutError):
            watch_deployment(transport, "d4", lambda _: None, deadline=started + 0.4)
    finally:
        stop.set()
    assert time.monotonic() - started < 5


# --- the installed command -------------------------------------------------------------------------


@pytest.fixture
def environ(server: Server, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AETHER_")}
    folders = {f"XDG_{kind}_HOME": str(tmp_path / kind) for kind in ("CONFIG", "CACHE", "DATA")}
    return kept | folders | {"AETHER_API_BASE": server.url, "AETHER_TOKEN": "secret"}


def aether(environ: dict[str, str], *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [AETHER, *words], env=environ, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


def test_list_in_text_and_json(server: Server, environ: dict[str, str]) -> None:
    evil = {**APP, "name": "ev\x1b[2Jil"}
    server.routes["/apps"] = lambda it: it.reply({"items": [APP, evil], "next_cursor": "c1"})
    done = aether(environ, "list", "--filter", "sh op", "--limit", "2")
    assert done.returncode == 0
    assert done.stdout.splitlines()[1].split() == ["shop", "running", "v3", "1/1", "http://shop.localhost/"]
    assert "\x1b" not in done.stdout
    assert "--cursor c1" in done.stderr
    assert server.paths() == ["/apps?q=sh+op&limit=2"]
    done = aether(environ, "list", "--format", "json")
    assert json.loads(done.stdout) == {"items": [APP, evil], "next_cursor": "c1"}
    assert done.stderr == ""


def test_every_page(server: Server, environ: dict[str, str]) -> None:
    def answer(it: Exchange) -> None:
        at = int(it.path.partition("cursor=")[2] or 0)
        it.reply({"items": [{**APP, "name": f"app{at}"}], "next_cursor": str(at + 1) if at < 3 else None})

    server.routes["/apps"] = answer
    done = aether(environ, "list", "--all", "--format", "json")
    assert [app["name"] for app in json.loads(done.stdout)["items"]] == ["app0", "app1", "app2", "app3"]


def test_login_sends_the_token_once_and_keeps_the_session(
    server: Server, environ: dict[str, str], tmp_path: Path
) -> None:
    del environ["AETHER_TOKEN"]
    answer = {"token": "session", "name": "ada", "role": "admin", "expires_at": "2027"}
    server.routes.update({
        "/healthz": lambda it: it.reply({"status": "ok"}),
        "/auth/login": lambda it: it.reply(answer),
        "/auth/logout": lambda it: it.reply(status=204),
    })  # fmt: skip
    assert aether(environ, "login").returncode == 2, "no token and nobody to ask"
    done = aether(environ, "login", "--format", "json", stdin="typed\n")
    assert json.loads(done.stdout)["name"] == "ada"
    assert json.loads(server.seen[-1].body) == {"token": "typed"}
    session = tmp_path / "CACHE" / "aether" / "session.json"
    assert session.stat().st_mode & 0o777 == 0o600
    assert "typed" not in session.read_text() + done.stdout + done.stderr

    data = tmp_path / "DATA" / "aether"
    data.mkdir(parents=True)
    (data / "admin-token").write_text("local\n")
    assert aether(environ, "login").returncode == 0
    assert json.loads(server.seen[-1].body) == {"token": "local"}
    (data / "up.json").write_text(json.dumps({"api": "http://127.0.0.1:1", "pid": 1}))
    assert aether(environ, "login", stdin="typed").returncode == 0
    assert json.loads(server.seen[-1].body) == {"token": "typed"}, "another server's credential was sent"

    done = aether(environ, "login", "--username", "bob", "--token", "x")
    assert done.returncode == 10
    assert "belongs to ada" in done.stderr
    assert server.paths()[-1] == "/auth/logout"

    assert aether(environ, "logout").returncode == 0
    assert server.seen[-1].headers["Authorization"] == "Bearer session"
    assert not session.exists()
    assert aether(environ, "logout").returncode == 0


def test_logout_forgets_even_when_the_server_is_away(environ: dict[str, str], tmp_path: Path) -> None:
    session = tmp_path / "CACHE" / "aether" / "session.json"
    session.parent.mkdir(parents=True)
    session.write_text(json.dumps({"api_base": "http://127.0.0.1:1", "token": "t"}))
    done = aether(environ, "logout")
    assert done.returncode == 40
    assert "not revoked" in done.stderr
    assert not session.exists()


def test_a_reader_that_leaves_ends_a_followed_log(server: Server, environ: dict[str, str]) -> None:
    stop = threading.Event()

    def answer(it: Exchange) -> None:
        it.begin_chunks("application/x-ndjson")
        it.chunk(json.dumps(log_line(1)).encode() + b"\n")
        while not stop.wait(0.05):
            it.chunk(b"\n")

    server.routes["/apps/shop/logs"] = answer
    follower = subprocess.Popen(
        [AETHER, "logs", "-f", "--app", "shop"],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follower.stdout is not None
    assert follower.stderr is not None
    try:
        assert "line 1" in follower.stdout.readline(), "a line was kept back in a pipe"
        follower.stdout.close()
        assert follower.wait(20) == 141
        assert follower.stderr.read() == ""
    finally:
        stop.set()
        follower.kill()
        follower.wait()
        follower.stderr.close()


def test_ctrl_c_ends_a_followed_log_without_a_word(server: Server, environ: dict[str, str]) -> None:
    stop = threading.Event()

    def answer(it: Exchange) -> None:
        it.begin_chunks("application/x-ndjson")
        it.chunk(json.dumps(log_line(1)).encode() + b"\n")
        stop.wait(30)

    server.routes["/apps/shop/logs"] = answer
    follower = subprocess.Popen(
        [AETHER, "logs", "-f", "--app", "shop"],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert follower.stdout is not None
        follower.stdout.readline()
        follower.send_signal(signal.SIGINT)
        _, errors = follower.communicate(timeout=20)
        assert follower.returncode == 130
        assert errors == ""
    finally:
        stop.set()
        follower.kill()
        follower.wait()


def rollback_routes(server: Server, events: Handler) -> None:
    releases = [
        {"version": n, "digest": str(n) * 64, "deployment_id": f"d{n}", "status": "superseded"} for n in (3, 2, 1)
    ]
    releases[0]["status"] = "active"
    server.routes.update({
        "/apps/shop": lambda it: it.reply(APP),
        "/apps/shop/releases": lambda it: it.reply({"items": releases, "next_cursor": None}),
        "/apps/shop/rollback": lambda it: it.reply({**DEPLOYMENT, "status": "pending", "release": None}, 201),
        "/deployments/d4/events": events,
    })  # fmt: skip


def ending(status: str, error: Any = None) -> Handler:
    def answer(it: Exchange) -> None:
        it.begin_chunks("text/event-stream")
        it.chunk(event(1))
        it.chunk(
            b"event: end\ndata: " + json.dumps({**DEPLOYMENT, "status": status, "error": error}).encode() + b"\n\n"
        )

    return answer


def test_rollback_waits_and_says_where_to(server: Server, environ: dict[str, str]) -> None:
    rollback_routes(server, ending("active"))
    done = aether(environ, "rollback", "--app", "shop", "1111111")
    assert done.returncode == 0, done
    assert "rolled back shop to v1 (111111111111), now release v4" in done.stdout
    asked = next(it for it in server.seen if it.path == "/apps/shop/rollback")
    assert json.loads(asked.body) == {"deployment_id": "d1"}


def test_a_failed_rollout_shows_the_apps_lines_and_what_serves(server: Server, environ: dict[str, str]) -> None:
    error = {"code": "rollout_failed", "message": "it exited with code 7.", "log_tail": ["one", "\x1b[31mtwo"]}
    rollback_routes(server, ending("failed", error))
    done = aether(environ, "rollback", "--app", "shop", "--format", "json")
    assert done.returncode == 50, done
    said = json.loads(done.stdout)["error"]
    assert said == {"code": "rollout_failed", "message": "shop: it exited with code 7; release v3 keeps serving"}
    assert "  | one\n  | \\x1b[31mtwo\n" in done.stderr


def test_a_cancelled_rollout_says_why(server: Server, environ: dict[str, str]) -> None:
    def overtaken(it: Exchange) -> None:
        it.begin_chunks("text/event-stream")
        why = {"phase": "cancelled", "message": "deployment d5 took its place", "id": 1, "deployment_id": "d4"}
        it.chunk(b"id: 1\nevent: phase\ndata: " + json.dumps(why).encode() + b"\n\n")
        it.chunk(b"event: end\ndata: " + json.dumps({**DEPLOYMENT, "status": "cancelled"}).encode() + b"\n\n")

    rollback_routes(server, overtaken)
    done = aether(environ, "rollback", "--app", "shop")
    assert done.returncode == 50, done
    assert "shop: the rollout was cancelled: deployment d5 took its place; release v3" in done.stderr


def test_an_app_that_wrote_nothing_says_so(server: Server, environ: dict[str, str]) -> None:
    server.routes["/apps/shop/logs"] = lambda it: it.reply(b"")
    done = aether(environ, "logs", "--app", "shop")
    assert (done.returncode, done.stdout) == (0, ""), done
    assert "shop has written nothing yet" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_cancels_the_rollout_and_waits_for_the_word(
    server: Server, environ: dict[str, str], number: int, code: int
) -> None:
    began, cancelled = threading.Event(), threading.Event()

    def events(it: Exchange) -> None:
        it.begin_chunks("text/event-stream")
        it.chunk(event(1))
        began.set()
        cancelled.wait(30)
        it.chunk(b"event: end\ndata: " + json.dumps({**DEPLOYMENT, "status": "cancelled"}).encode() + b"\n\n")

    def patch(it: Exchange) -> None:
        assert json.loads(it.body) == {"status": "cancelled"}
        it.reply({**DEPLOYMENT, "status": "rolling_out"})
        cancelled.set()

    rollback_routes(server, events)
    server.routes["/deployments/d4"] = patch
    command = subprocess.Popen(
        [AETHER, "rollback", "--app", "shop"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert began.wait(30)
        assert command.stderr is not None
        while "step 1" not in command.stderr.readline():
            assert command.poll() is None
        command.send_signal(number)
        out, errors = command.communicate(timeout=30)
        assert command.returncode == code, errors
        assert out == ""
        assert errors.endswith("aether: interrupted: the rollout is cancelled; release v3 keeps serving\n")
        assert [it.command for it in server.seen if it.path == "/deployments/d4"] == ["PATCH"]
    finally:
        cancelled.set()
        command.kill()
        command.wait()


def test_the_clients_own_deadline_cancels_too(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from aether.cli import rollout
    from aether.cli.main import entry

    cancelled = threading.Event()

    def events(it: Exchange) -> None:
        it.begin_chunks("text/event-stream")
        while not cancelled.wait(0.05):
            it.chunk(b": keep-alive\n\n")
        it.chunk(b"event: end\ndata: " + json.dumps({**DEPLOYMENT, "status": "cancelled"}).encode() + b"\n\n")

    def patch(it: Exchange) -> None:
        cancelled.set()
        it.reply({**DEPLOYMENT, "status": "cancelled"})

    rollback_routes(server, events)
    server.routes["/deployments/d4"] = patch
    monkeypatch.setattr(rollout, "GRACE_S", 0.2)
    for name, value in {"AETHER_API_BASE": server.url, "AETHER_TOKEN": "t", "XDG_CACHE_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert entry(["rollback", "--app", "shop", "--timeout", "1"]) == 50
    assert cancelled.is_set(), "the rollout was left running"
    assert "did not end within 1 s: the rollout is cancelled; release v3 keeps serving" in capsys.readouterr().err


def test_config_masks_and_reads_a_secret_from_standard_input(server: Server, environ: dict[str, str]) -> None:
    def answer(it: Exchange) -> None:
        if it.command == "GET":
            it.reply({"version": 1, "env": {"KEY": "hush"}, "secrets": []})
        else:
            env = json.loads(it.body)["set"]
            it.reply({"version": 2, "env": env, "secrets": [], "changed": sorted(env), "deployment_id": None})

    server.routes["/apps/shop/config"] = answer
    done = aether(environ, "config", "--app", "shop", "--format", "json")
    assert json.loads(done.stdout) == {"version": 1, "env": {"KEY": "****"}, "secrets": []}
    assert "hush" in aether(environ, "config", "--app", "shop", "--show").stdout
    assert aether(environ, "config", "get", "KEY", "--app", "shop").stdout == "hush\n"
    assert aether(environ, "config", "get", "OTHER", "--app", "shop").returncode == 2
    done = aether(environ, "config", "set", "A=1", "KEY", "--app", "shop", "--format", "json", stdin="from\nstdin\n")
    assert json.loads(server.seen[-1].body)["set"] == {"A": "1", "KEY": "from\nstdin"}
    assert json.loads(done.stdout)["env"] == {"A": "****", "KEY": "****"}


def test_a_full_disk_under_stdout_is_an_io_error(server: Server, environ: dict[str, str]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("component: /dev/full")
    server.routes["/apps"] = lambda it: it.reply({"items": [APP], "next_cursor": None})
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [AETHER, "list"], env=environ, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.returncode == 30
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_log_lines_of_the_client_itself(server: Server, environ: dict[str, str]) -> None:
    server.routes["/apps"] = lambda it: it.reply({"items": [], "next_cursor": None})
    done = aether(environ, "--log-level", "debug", "list", "--log-format", "json")
    record = json.loads(done.stderr.splitlines()[0])
    assert record["message"] == "http"
    assert record["status"] == 200
    assert "secret" not in done.stderr
