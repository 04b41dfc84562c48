"""Wrong projects, wrong tokens, failing starts: a clear message, the right exit code, and nothing broken."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from support.product import AETHER, HELLO, Product, node_app


def error_of(done: object) -> dict[str, str]:
    body = done.json  # type: ignore[attr-defined]
    assert set(body) == {"error"}, body
    return body["error"]


def test_an_empty_folder(up: Product, tmp_path: Path) -> None:
    done = up.deploy(tmp_path, check=False)
    assert done.code == 10, done
    assert "package.json" in error_of(done)["message"]


def test_broken_package_json_names_file_and_line(up: Product, tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{\n  "name": "x",\n  oops\n}')
    done = up.deploy(tmp_path, check=False)
    assert done.code == 10, done
    assert "package.json" in error_of(done)["message"]
    assert "3" in error_of(done)["message"]


def test_broken_lockfile_shows_what_npm_says(up: Product, tmp_path: Path) -> None:
    project = node_app(tmp_path / "broken-lock", HELLO % "x", dependencies={"ms": "2.1.3"})
    (project / "package-lock.json").write_text('{"lockfileVersion": 3, "packages": {"": {"name": "x"}}}')
    done = up.deploy(project, check=False)
    assert done.code == 20, done
    assert error_of(done)["code"] == "build_failed"
    assert "npm" in error_of(done)["message"]


def test_failing_build_shows_its_last_lines(up: Product, tmp_path: Path) -> None:
    project = node_app(tmp_path / "bad-build", HELLO % "x")
    manifest = json.loads((project / "package.json").read_text())
    manifest["scripts"]["build"] = "echo the compiler is unhappy; exit 3"
    (project / "package.json").write_text(json.dumps(manifest))
    done = up.deploy(project, check=False)
    assert done.code == 20, done
    assert "the compiler is unhappy" in error_of(done)["message"] + done.stderr
    assert up.api("GET", "/apps/bad-build")[0] == 404, "a failed build left an app behind"


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [
        ("exits", "console.log('about to give up'); process.exit(7);", ("about to give up", "7")),
        ("silent", "console.log('not listening'); setInterval(() => {}, 1000);", ("not listening", "PORT")),
        ("sick", "require('http').createServer((q, r) => { console.log('oh no'); r.statusCode = 500; r.end(); })"
                 ".listen(process.env.PORT);", ("oh no", "500")),
    ],
)  # fmt: skip
def test_a_failed_start_keeps_the_old_release_and_shows_the_apps_lines(
    up: Product, tmp_path: Path, name: str, code: str, expected: tuple[str, str]
) -> None:
    project = node_app(tmp_path / name, HELLO % "the old one")
    up.deploy(project)
    (project / "server.js").write_text(code)
    done = up.deploy(project, "--timeout", "6", check=False)
    assert done.code == 50, done
    assert error_of(done)["code"] == "rollout_failed"
    text = error_of(done)["message"] + done.stderr
    for part in expected:
        assert part in text, text
    assert up.get(name) == (200, "the old one\n")
    app = up.api("GET", f"/apps/{name}")[1]
    assert app["release"]["version"] == 1
    assert app["instances"] == {"desired": 1, "ready": 1}


def test_an_app_that_ignores_sigterm_is_replaced_all_the_same(up: Product, tmp_path: Path) -> None:
    stubborn = "process.on('SIGTERM', () => console.log('no')); " + (HELLO % "old").replace(
        "process.on('SIGTERM', () => process.exit(0));", ""
    )
    project = node_app(tmp_path / "stubborn", stubborn)
    up.deploy(project)
    (project / "server.js").write_text(HELLO % "new")
    up.deploy(project)
    assert up.get("stubborn")[1] == "new\n"
    deadline = time.monotonic() + 30
    while up.api("GET", "/apps/stubborn")[1]["instances"] != {"desired": 1, "ready": 1}:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_no_request_fails_during_a_swap(up: Product, tmp_path: Path) -> None:
    project = node_app(tmp_path / "swap", HELLO % "r0")
    up.deploy(project)
    stop = threading.Event()
    seen: list[tuple[int, str]] = []
    failures: list[BaseException] = []

    def hammer() -> None:
        while not stop.is_set():
            try:
                seen.append(up.get("swap"))
            except Exception as error:
                failures.append(error)

    workers = [threading.Thread(target=hammer) for _ in range(4)]
    for worker in workers:
        worker.start()
    try:
        for n in range(1, 4):
            (project / "server.js").write_text(HELLO % f"r{n}")
            up.deploy(project)
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert not failures
    assert {status for status, _ in seen} == {200}
    assert {body for _, body in seen} == {f"r{n}\n" for n in range(4)}


def test_ctrl_c_in_a_rollout_cancels_it_on_the_server(up: Product, tmp_path: Path) -> None:
    project = node_app(tmp_path / "patient", "setInterval(() => {}, 1000); console.log('warming up');")
    command = subprocess.Popen(
        [AETHER, "deploy", str(project), "--timeout", "60"],
        env=up.env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while True:
        status, body, _ = up.api("GET", "/deployments?app=patient")
        if status == 200 and body["items"] and body["items"][0]["status"] == "rolling_out":
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    command.send_signal(signal.SIGINT)
    out, err = command.communicate(timeout=30)
    assert command.returncode == 130, out + err
    assert up.api("GET", "/deployments?app=patient")[1]["items"][0]["status"] == "cancelled"
    assert "Traceback" not in err


def test_tokens(up: Product, tmp_path: Path) -> None:
    project = node_app(tmp_path / "guarded", HELLO % "x")
    nobody = {"AETHER_TOKEN": "wrong"}
    done = up.deploy(project, check=False, env=nobody)
    assert done.code == 10, done
    assert error_of(done)["code"] == "unauthorized"
    done = up.run("list", check=False, env={"XDG_CACHE_HOME": str(tmp_path / "fresh")})
    assert done.code == 10, done
    assert "aether login" in done.stderr
    for path in ("/apps", "/deployments", "/artifacts", "/metrics", "/openapi.json", "/swagger"):
        status, body, _ = up.api("GET", path, token=None)
        assert status == 401, path
        assert body["code"] == "unauthorized"
    for path in ("/healthz", "/health", "/readyz", "/startupz"):
        assert up.api("GET", path, token=None)[0] == 200, path


def test_a_second_server_on_the_port_or_the_data(up: Product, tmp_path: Path) -> None:
    done = up.run("up", "--port", str(up.port), "--data-dir", str(tmp_path / "other"), check=False)
    assert done.code == 30, done
    assert str(up.port) in done.stderr
    assert "Traceback" not in done.stderr
    done = up.run("up", "--port", "0", check=False)
    assert done.code in (10, 30), done
    assert "already" in done.stderr
    assert up.get("nothing-here")[0] == 404


def test_port_held_by_another_program(own: Product) -> None:
    own.stop()
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", own.port))
        held.listen()
        done = own.run("up", "--port", str(own.port), check=False)
    assert done.code == 30, done
    assert f"{own.port}" in done.stderr
    own.start()


def test_odd_files_in_a_project(up: Product, tmp_path: Path) -> None:
    project = node_app(tmp_path / "odd", HELLO % "odd")
    (project / "new\nline.txt").write_text("x")
    (Path(os.fsdecode(os.fsencode(project) + b"/latin-\xe9.txt"))).write_text("x")
    (project / "empty").mkdir()
    (project / "dangling").symlink_to("nowhere.txt")
    up.deploy(project)
    assert up.get("odd")[1] == "odd\n"
    (project / "escape").symlink_to("../../etc/passwd")
    done = up.deploy(project, check=False)
    assert done.code != 0
    assert "escape" in error_of(done)["message"]
    (project / "escape").unlink()
    os.mkfifo(project / "pipe")
    done = up.deploy(project, check=False)
    assert done.code != 0
    assert "pipe" in error_of(done)["message"]
