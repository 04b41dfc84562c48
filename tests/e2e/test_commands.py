"""The other commands as a user calls them."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from pathlib import Path

from support.product import AETHER, HELLO, Product, node_app


def test_the_first_start_makes_a_credential_of_its_own(own: Product) -> None:
    token_file = own.data / "admin-token"
    assert token_file.stat().st_mode & 0o777 == 0o600
    assert len(token_file.read_text().strip()) >= 32
    assert own.token() not in "".join(own.printed), "the credential was printed"
    database = (own.data / "aether.db").read_bytes()
    assert own.token().encode() not in database
    session = own.home / "cache" / "aether" / "session.json"
    assert session.stat().st_mode & 0o777 == 0o600
    assert own.token() not in session.read_text()


def test_login_finds_a_server_of_this_machine_on_another_port(own: Product) -> None:
    own.run("logout")
    without = {k: v for k, v in own.env.items() if k != "AETHER_API_BASE"}
    done = subprocess.run([AETHER, "login"], env=without, cwd=own.home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"http://127.0.0.1:{own.port}" in done.stdout
    done = subprocess.run([AETHER, "list"], env=without, cwd=own.home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_config_makes_a_release_and_rollback_restores_it(up: Product, tmp_path: Path) -> None:
    code = "require('http').createServer((q, r) => r.end(process.env.COLOUR || 'none')).listen(process.env.PORT);"
    up.deploy(node_app(tmp_path / "colours", code))
    assert up.get("colours")[1] == "none"
    up.run("config", "set", "COLOUR=blue", "--app", "colours")
    assert up.get("colours")[1] == "blue"
    shown = up.run("config", "--app", "colours", "--show", "--format", "json").json
    assert shown["env"] == {"COLOUR": "blue"}
    up.run("rollback", "--app", "colours", "v1")
    assert up.get("colours")[1] == "none"
    up.run("rollback", "--app", "colours", "v2")
    assert up.get("colours")[1] == "blue"
    up.run("config", "unset", "COLOUR", "--app", "colours")
    assert up.get("colours")[1] == "none"


def test_logs_of_the_past_and_followed(up: Product, tmp_path: Path) -> None:
    code = """
    let n = 0;
    require('http').createServer((q, r) => { console.log('request ' + ++n);
      console.error('\\x1b[31mred'); r.end('ok'); })
      .listen(process.env.PORT, () => console.log('ready'));
    """
    up.deploy(node_app(tmp_path / "talker", code))
    follower = subprocess.Popen(
        [AETHER, "logs", "-f", "--app", "talker", "--format", "json", "--tail", "0"],
        env=up.env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        time.sleep(1.0)
        for _ in range(5):
            up.get("talker")
        assert follower.stdout is not None
        seen: list[str] = []
        while "request 5" not in seen:
            record = json.loads(follower.stdout.readline())
            assert record["app"] == "talker"
            assert record["deployment_id"]
            assert re.fullmatch("[0-9a-f]{64}", record["digest"])
            if record["stream"] == "stdout":
                seen.append(record["line"])
        numbers = [line for line in seen if line.startswith("request ")]
        assert numbers == sorted(set(numbers)), "lost or doubled lines"
    finally:
        follower.terminate()
        follower.communicate(timeout=10)
    past = up.run("logs", "--app", "talker", "--tail", "100").stdout
    assert past.count("ready") == 1
    head = subprocess.run(
        f"{AETHER} logs --app talker | head -1", shell=True, env=up.env, cwd=tmp_path, capture_output=True, text=True,
        timeout=30, check=False,
    )  # fmt: skip
    assert head.stdout.count("\n") == 1
    assert head.stderr == ""


def test_status_list_open_and_releases(up: Product, tmp_path: Path) -> None:
    up.deploy(node_app(tmp_path / "shown", HELLO % "x"))
    assert "shown" in up.run("list").stdout
    status = up.run("status", "--app", "shown", "--format", "json").json
    assert status["status"] == "running"
    assert status["instances"] == {"desired": 1, "ready": 1}
    assert up.run("open", "--app", "shown", "--print").stdout.strip() == f"http://shown.localhost:{up.port}/"
    up.run("status", cwd=tmp_path / "shown")
    assert "v1" in up.run("releases", cwd=tmp_path / "shown").stdout


def test_rollback_says_what_it_cannot_find(up: Product, tmp_path: Path) -> None:
    up.deploy(node_app(tmp_path / "once", HELLO % "x"))
    done = up.run("rollback", "--app", "once", check=False)
    assert done.code == 2, done
    done = up.run("rollback", "--app", "once", "0123456789abcdef", check=False)
    assert done.code == 2, done
    assert "0123456789ab" in done.stderr
    assert up.get("once")[0] == 200


def test_dry_run_and_pack_only_touch_nothing_on_the_server(up: Product, tmp_path: Path) -> None:
    project = node_app(tmp_path / "dry", HELLO % "x")
    (project / ".env").write_text("SECRET=1")
    (project / ".git").mkdir()
    (project / ".git" / "HEAD").write_text("x")
    out = tmp_path / "out"
    done = up.deploy(project, "--dry-run", "--out", str(out)).json
    assert not out.exists()
    excluded = {e["path"].rstrip("/"): e["reason"] for e in done["excluded"]}
    assert set(excluded) >= {".env", ".git"}
    packed = up.deploy(project, "--pack-only", "--out", str(out)).json
    assert Path(packed["artifact"]).parent == out
    assert up.api("GET", "/apps/dry")[0] == 404


def test_completions_are_valid_shell(up: Product, tmp_path: Path) -> None:
    script = tmp_path / "aether.bash"
    script.write_text(up.run("completions", "--shell", "bash").stdout)
    subprocess.run(["bash", "-n", str(script)], check=True)
    for shell in ("zsh", "fish"):
        assert "deploy" in up.run("completions", "--shell", shell).stdout


def test_delete_removes_everything(up: Product, tmp_path: Path) -> None:
    up.deploy(node_app(tmp_path / "gone", HELLO % "x"))
    up.run("apps", "delete", "gone", "--yes")
    assert up.get("gone")[0] == 404
    assert up.api("GET", "/apps/gone")[0] == 404
    assert not list((up.data / "objects").rglob("*gone*"))
    up.deploy(node_app(tmp_path / "gone2", HELLO % "again", name="gone"))
    assert up.get("gone")[1] == "again\n"


def test_openapi_and_metrics(up: Product) -> None:
    status, spec, _ = up.api("GET", "/openapi.json")
    assert status == 200
    assert spec["openapi"].startswith("3.1")
    assert "bearer_auth" in spec["components"]["securitySchemes"]
    for path in ("/apps", "/deployments", "/artifacts/presign", "/artifacts/complete"):
        assert path in spec["paths"]
    status, text, _ = up.api("GET", "/metrics")
    assert status == 200
    assert b"artifact_presign_requests_total" in text
    status, page, _ = up.api("GET", "/swagger")
    assert status == 200
    assert b"https://" not in page.replace(b"https://spec.openapis.org", b""), "the page asks the internet"


def test_an_app_is_scaled_and_stopped(up: Product, tmp_path: Path) -> None:
    up.deploy(node_app(tmp_path / "wide", HELLO % "wide"))
    done = up.run("scale", "web=3", "--app", "wide")
    assert done.stdout.strip() == "wide: web 3 of 3 ready"
    assert "3 of 3 ready" in up.run("status", "--app", "wide").stdout
    assert re.search(r"wide +running +v1 +3/3", up.run("list", "--filter", "wide").stdout)
    stopped = up.run("scale", "web=0", "--app", "wide", "--format", "json").json
    assert (stopped["status"], stopped["instances"]) == ("stopped", {"desired": 0, "ready": 0})
    assert up.get("wide")[0] == 503
    assert up.run("scale", "web=51", "--app", "wide", check=False).code == 2
    assert up.run("scale", "--app", "wide").stdout.strip() == "wide: web 0 (stopped)"


def test_a_canary_shows_its_steps_and_a_bad_one_is_rolled_back(up: Product, tmp_path: Path) -> None:
    project = node_app(tmp_path / "trial", HELLO % "old")
    (project / "aether.toml").write_text('[rollout]\nstrategy = "canary"\nsteps = [50, 100]\nstep_secs = 1\n')
    up.deploy(project)
    node_app(project, HELLO % "new", name="trial")
    done = up.run("deploy", str(project))
    assert "50% of the requests" in done.stderr
    assert "100% of the requests" in done.stderr
    assert "release v2 is serving" in done.stderr
    ill = HELLO.replace("response.end(", "response.writeHead(request.headers['user-agent'] ? 200 : 500).end(") % "ill"
    node_app(project, ill, name="trial")
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            up.get("trial")

    asking = threading.Thread(target=ask)
    asking.start()
    failed = up.run("deploy", str(project), "--strategy", "bluegreen", "--bake-time", "60", check=False)
    stop.set()
    asking.join()
    assert failed.code == 50
    assert "answers of the new release were errors" in failed.stderr
    assert "release v2 keeps serving" in failed.stderr
    assert up.get("trial") == (200, "new\n")
