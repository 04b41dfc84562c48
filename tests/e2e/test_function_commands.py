"""Functions as a user has them: made, called, changed, broken and mended with the command line, on a whole server."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.product import AETHER, Done, Product, product

ECHO = """
const http = require('http');
http.createServer((request, response) => {
  const parts = [];
  request.on('data', (part) => parts.push(part));
  request.on('end', () => {
    const [status] = request.url.slice(1).split('?');
    response.statusCode = /^[1-5][0-9][0-9]$/.test(status) ? Number(status) : 200;
    response.setHeader('content-type', 'application/json');
    response.end(JSON.stringify({
      version: process.env.V || 'one', method: request.method, url: request.url, headers: request.headers,
      body: Buffer.concat(parts).toString(),
    }));
  });
}).listen(process.env.PORT, () => console.log('up ' + (process.env.V || 'one')));
process.on('SIGTERM', () => process.exit(0));
"""
BROKEN = "console.log('about to fail'); console.error('no such thing'); process.exit(3);"


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    with product(tmp_path_factory.mktemp("functions"), AETHER_FUNCTION_RUNTIME="process") as it:
        yield it


def folder(path: Path, code: str = ECHO, name: str = "index.js") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(code)
    return path


def create(up: Product, name: str, code: Path, *more: str) -> Done:
    words = ("--runtime", "node", "--entrypoint", "index.js", "--code", str(code), "--format", "json", *more)
    return up.run("function", "create", name, *words)


def project(path: Path, code: str = ECHO, table: str = "") -> Path:
    """A project that is a function called as its folder is."""
    folder(path, code)
    (path / "package.json").write_text(json.dumps({"name": path.name, "main": "index.js"}))
    (path / "aether.toml").write_text(f'kind = "function"\n[function]\nmemory_mb = 64\n{table}')
    return path


def test_a_function_is_made_called_changed_and_deleted(up: Product, tmp_path: Path) -> None:
    made = create(up, "echo", folder(tmp_path / "code"), "--env", "V=two", "--memory", "96").json
    assert (made["version"], made["code"]["form"], made["memory_mb"]) == (2, "tar.gz", 96)
    answer = up.run("function", "invoke", "echo", "--path", "/a/b?c=d", "-d", '{"x": 1}', "-H", "X-Mine: yes")
    said = answer.json
    assert (said["version"], said["method"], said["body"]) == ("two", "POST", '{"x": 1}')
    assert said["headers"]["content-type"] == "application/json"
    assert said["headers"]["x-mine"] == "yes"
    assert "authorization" not in said["headers"], "the token of the API was shown to the function"
    assert said["url"].endswith("/a/b?c=d")

    shown = up.run("function", "show", "echo").stdout
    assert f"http://127.0.0.1:{up.port}/functions/echo/" in shown
    assert "serving" in shown
    assert [line.split()[0] for line in up.run("function", "list").stdout.splitlines()] == ["NAME", "echo"]

    changed = up.run("function", "update", "echo", "--env", "V=three", "--timeout", "5", "--format", "json").json
    assert (changed["version"], changed["env_vars"], changed["timeout_secs"]) == (3, {"V": "three"}, 5.0)
    assert until(up, "echo", "three")
    up.run("function", "rollback", "echo")
    assert until(up, "echo", "two")
    up.run("team", "create", "crew")
    assert up.run("function", "transfer", "echo", "--to", "crew").stdout == "echo belongs to crew now\n"
    versions = up.run("function", "versions", "echo", "--format", "json").json["items"]
    assert [(one["version"], one["rollback_of"]) for one in versions] == [(4, 2), (3, None), (2, None), (1, None)]

    assert "up two" in up.run("function", "logs", "echo").stdout
    calls = recorded(up, "echo")
    assert {one["status"] for one in calls} == {200}
    assert "cold" in {one["start"] for one in calls}

    done = up.run("function", "delete", "echo", check=False)
    assert (done.code, "--yes" in done.stderr) == (2, True)
    up.run("function", "delete", "echo", "--yes")
    assert up.run("function", "show", "echo", check=False).code == 2
    assert up.run("function", "invoke", "echo", check=False).code != 0


def until(up: Product, name: str, version: str) -> bool:
    """Whether the version answers after a while; until then another one does, and none fails."""
    return any(up.run("function", "invoke", name).json["version"] == version for _ in range(300))


def recorded(up: Product, name: str) -> list[dict[str, object]]:
    """Its calls, once they have been written down."""
    for _ in range(100):
        if found := up.run("function", "invocations", name, "--all", "--format", "json").json["items"]:
            return found
    return []


def test_archives_are_taken_as_they_are(up: Product, tmp_path: Path) -> None:
    code = folder(tmp_path / "code")
    with zipfile.ZipFile(tmp_path / "code.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(code / "index.js", "index.js")
    with tarfile.open(tmp_path / "code.tar.gz", "w:gz") as archive:
        archive.add(code / "index.js", "main.js")
    assert create(up, "zipped", tmp_path / "code.zip").json["code"]["form"] == "zip"
    assert up.run("function", "invoke", "zipped").json["method"] == "GET"
    update = ("function", "update", "zipped", "--code", str(tmp_path / "code.tar.gz"))
    refused = up.run(*update, check=False)
    assert (refused.code, "no file 'index.js'" in refused.stderr) == (2, True)
    done = up.run(*update, "--entrypoint", "main.js", "--format", "json").json
    assert (done["version"], done["entrypoint"]) == (3, "main.js")
    (code / "link").symlink_to("index.js")
    for given, told in (
        (str(code), "is a link"),
        (str(tmp_path / "nothing"), "no folder and no file"),
        (str(code / "index.js"), "neither a zip nor a tar.gz"),
    ):
        refused = up.run("function", "update", "zipped", "--code", given, check=False)
        assert refused.code == 2, refused
        assert told in refused.stderr


def test_invoke_passes_on_and_tells_by_its_exit_code(up: Product, tmp_path: Path) -> None:
    create(up, "codes", folder(tmp_path / "code"))
    for status, code in ((200, 0), (204, 0), (302, 0), (404, 20), (500, 20)):
        done = up.run("function", "invoke", "codes", "--path", f"/{status}", check=False)
        assert done.code == code, done
    shown = up.run("function", "invoke", "codes", "--path", "/500", "--format", "json", check=False)
    assert (shown.code, shown.json["status"], json.loads(shown.json["body"])["url"]) == (20, 500, "/500")
    (tmp_path / "body").write_bytes(b"\x00\xffraw")
    done = up.run("function", "invoke", "codes", "-X", "put", "-d", f"@{tmp_path / 'body'}")
    assert (done.json["method"], done.json["headers"]["content-length"]) == ("PUT", "5")
    assert up.run("function", "invoke", "codes", "-d", "-", stdin="from stdin").json["body"] == "from stdin"
    for words in (("-H", "no colon"), ("-H", "A: b\nC: d"), ("-X", "G T")):
        assert up.run("function", "invoke", "codes", *words, check=False).code == 2
    assert up.run("function", "invoke", "codes", "-d", f"@{tmp_path / 'none'}", check=False).code == 30


def test_a_function_that_does_not_start_shows_its_log(up: Product, tmp_path: Path) -> None:
    create(up, "broken", folder(tmp_path / "code", BROKEN))
    done = up.run("function", "invoke", "broken", check=False)
    assert done.code == 40, done
    assert "about to fail" in done.stderr
    assert "no such thing" in done.stderr
    shown = up.run("function", "show", "broken", "--format", "json").json
    assert shown["status"] == "failing"
    assert "no such thing" in shown["state"]["last_failure"]["log"]


def test_deploy_ships_a_function_and_undoes_one_that_fails(up: Product, tmp_path: Path) -> None:
    path = project(tmp_path / "shipped")
    first = up.deploy(path, "--env", "V=first").json
    assert (first["app"], first["function"], first["version"], first["status"]) == ("shipped", "shipped", 2, "active")
    assert first["url"] == f"http://127.0.0.1:{up.port}/functions/shipped/"
    assert first["timings_ms"]["rollout"] > 0
    assert up.run("function", "invoke", "shipped").json["version"] == "first"
    shown = up.run("function", "show", "shipped", "--format", "json").json
    assert (shown["code"]["form"], shown["code"]["digest"]) == ("artifact", first["digest"])
    assert (shown["memory_mb"], shown["env_vars"]) == (64, {"V": "first"})

    again = up.deploy(path, "--env", "V=first").json
    assert (again["version"], again["bytes_uploaded"]) == (2, 0)

    (path / "index.js").write_text(BROKEN)
    failed = up.deploy(path, check=False)
    assert (failed.code, failed.json["error"]["code"]) == (50, "rollout_failed")
    assert "version 2 is current again" in failed.json["error"]["message"]
    assert "no such thing" in failed.stderr
    assert up.run("function", "invoke", "shipped").json["version"] == "first"

    (path / "index.js").write_text(ECHO + "// mended\n")
    mended = up.deploy(path, "--env", "V=mended").json
    assert mended["version"] == 5
    assert until(up, "shipped", "mended")

    detached = up.deploy(path, "--env", "V=detached", "--detach").json
    assert (detached["version"], detached["status"], detached["url"]) == (6, "deployed", first["url"])
    assert until(up, "shipped", "detached")
    said = up.run("deploy", str(path), "--env", "V=detached").stdout
    assert said == first["url"] + "\n"


def test_deploy_of_a_function_says_what_it_would_do(up: Product, tmp_path: Path) -> None:
    path = project(tmp_path / "planned", table="concurrency = 3\n")
    dry = up.deploy(path, "--dry-run").json
    assert dry["function"] == {
        "memory_mb": 64, "concurrency": 3, "runtime": "node", "entrypoint": "index.js",
    }  # fmt: skip
    assert up.run("function", "show", "planned", check=False).code == 2
    assert up.deploy(path, "--strategy", "canary", check=False).code == 2
    for table, told in (
        ("memory_mb = 1", "memory_mb is a whole number"),
        ('colour = "red"', "no field 'colour'"),
        ('entrypoint = "/x"', "relative to the code"),
    ):
        (path / "aether.toml").write_text(f'kind = "function"\n[function]\n{table}\n')
        refused = up.deploy(path, "--dry-run", check=False)
        assert refused.code == 10, refused
        assert told in refused.json["error"]["message"]
    (path / "aether.toml").write_text("[function]\nmemory_mb = 64\n")
    assert up.deploy(path, "--dry-run", check=False).code == 10


def test_a_python_function_has_its_packages(up: Product, tmp_path: Path) -> None:
    path = tmp_path / "snake"
    package = path / "greeting"
    package.mkdir(parents=True)
    (package / "pyproject.toml").write_text(
        '[project]\nname = "greeting"\nversion = "1"\n[build-system]\nrequires = []\n'
        'build-backend = "backend"\nbackend-path = ["."]\n'
    )
    (package / "backend.py").write_text(BACKEND)
    (path / "requirements.txt").write_text("./greeting\n")
    (path / "aether.toml").write_text('kind = "function"\n')
    (path / "main.py").write_text(SNAKE)
    done = up.deploy(path, check=False)
    assert done.code == 0, done
    assert up.run("function", "invoke", "snake").stdout == "hello from a package"


BACKEND = """
import zipfile

def build_wheel(directory, config_settings=None, metadata_directory=None):
    name = "greeting-1-py3-none-any.whl"
    info = "greeting-1.dist-info"
    with zipfile.ZipFile(f"{directory}/{name}", "w") as wheel:
        wheel.writestr("greeting.py", "TEXT = 'hello from a package'\\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: greeting\\nVersion: 1\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", f"greeting.py,,\\n{info}/METADATA,,\\n{info}/WHEEL,,\\n{info}/RECORD,,\\n")
    return name
"""
SNAKE = """
import http.server, os
import greeting

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(greeting.TEXT.encode())

http.server.HTTPServer(("", int(os.environ["PORT"])), Handler).serve_forever()
"""


def test_an_interrupted_deploy_leaves_the_version_before(up: Product, tmp_path: Path) -> None:
    import signal
    import time

    path = project(tmp_path / "halted")
    up.deploy(path, "--env", "V=kept")
    (path / "index.js").write_text("setInterval(() => {}, 1000); console.log('never listens');")
    process = subprocess.Popen(
        [AETHER, "deploy", str(path)], env=up.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while current(up, "halted") < 3:
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "version 2 is current again" in said
    assert up.run("function", "invoke", "halted").json["version"] == "kept"


def current(up: Product, name: str) -> int:
    return up.api("GET", f"/api/functions/{name}")[1]["version"]


def test_the_answer_is_passed_on_while_it_comes(up: Product, tmp_path: Path) -> None:
    code = """
    const http = require('http');
    http.createServer((request, response) => {
      if (request.url === '/go') { waiting.end('last\\n'); return response.end(); }
      waiting = response;
      response.write('first\\n');
    }).listen(process.env.PORT);
    let waiting;
    """
    create(up, "streams", folder(tmp_path / "code", code), "--max-instances", "1")
    with subprocess.Popen(
        [AETHER, "function", "invoke", "streams"], env=up.env, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "first\n"
        connection = http.client.HTTPConnection("127.0.0.1", up.port, timeout=20)
        connection.request("GET", "/functions/streams/go")
        assert connection.getresponse().status == 200
        connection.close()
        assert process.stdout.read() == "last\n"
        assert process.wait(20) == 0


def test_functions_come_back_from_a_backup(tmp_path: Path) -> None:
    with product(tmp_path / "home", AETHER_FUNCTION_RUNTIME="process") as up:
        create(up, "saved", folder(tmp_path / "code"), "--env", "V=a-value-to-look-for")
        assert up.run("function", "invoke", "saved").json["version"] == "a-value-to-look-for"
        file = tmp_path / "b.tar"
        up.run("backup", "--out", str(file), "--plain-keys")
        content = file.read_bytes()
        assert b"a-value-to-look-for" not in content
        assert b"functions/kv.db" not in content, "what only the running server needs is in the backup"
        up.stop()
        shutil.rmtree(up.data)
        back = up.run("restore", str(file), "--format", "json").json
        assert (back["missing"], back["counts"]["functions"]) == ([], 1)
        up.start()
        assert up.run("function", "invoke", "saved").json["version"] == "a-value-to-look-for"
