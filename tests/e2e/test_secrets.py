"""Secrets through the whole product: where their bytes are looked for and not found; a start without the key."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from support.product import HELLO, Product, node_app, product

SECRET = "correct-horse-battery-staple"
LATER = "staple-battery-horse-correct"
PLAIN = "a-plain-value-of-some-length"
TELL = """
const http = require('http'), crypto = require('crypto');
const of = name => crypto.createHash('sha256').update(process.env[name] || '').digest('hex');
http.createServer((q, r) => r.end(of(q.url.slice(1)))).listen(process.env.PORT, () => console.log('up'));
process.on('SIGTERM', () => process.exit(0));
"""
"""Answers the SHA-256 of a variable, so that no test makes the app write a secret down."""
LOOK = """
const fs = require('fs'), http = require('http');
function walk(folder, depth) {
  let found = '';
  for (const name of fs.readdirSync(folder)) {
    const path = folder + '/' + name;
    try {
      const is = fs.lstatSync(path);
      if (is.isDirectory() && depth) found += walk(path, depth - 1);
      else if (is.isFile() && is.size < 50e6) found += fs.readFileSync(path, 'latin1');
    } catch (error) { found += '\\n' + error.code; }
  }
  return found;
}
http.createServer((q, r) => {
  if (q.url === '/') return r.end('ok');
  let found = '';
  for (const name of fs.readdirSync('/proc')) {
    for (const file of ['environ', 'cmdline']) {
      try { found += fs.readFileSync(`/proc/${name}/${file}`, 'latin1'); } catch (error) { found += error.code; }
    }
  }
  const [folder, backwards] = JSON.parse(decodeURIComponent(q.url.slice(1)));
  const needle = backwards.split('').reverse().join('');
  for (const place of [folder, '/tmp', '/dev/shm', '/run']) {
    try { found += walk(place, 8); } catch (error) { found += error.code; }
  }
  r.end(JSON.stringify({ read: found.length, found: found.includes(needle), mine: found.includes('PORT=') }));
}).listen(process.env.PORT);
process.on('SIGTERM', () => process.exit(0));
"""


def sha(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def holding(folder: Path, needles: Iterable[str]) -> list[str]:
    """Files below `folder` that hold one of the texts."""
    found: list[str] = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found += [f"{path}: {needle[:8]}" for needle in needles if needle.encode() in content]
    return found


def arguments_of_all() -> dict[int, bytes]:
    """Every process of the machine with its command line."""
    found: dict[int, bytes] = {}
    for proc in Path("/proc").iterdir():
        if proc.name.isdigit() and int(proc.name) != os.getpid():
            try:
                found[int(proc.name)] = (proc / "cmdline").read_bytes()
            except OSError:
                continue
    return found


@pytest.fixture
def told(tmp_path: Path) -> Product:
    """A product whose server logs everything it can."""
    return Product(tmp_path / "home", extra_env={"AETHER_STOP_GRACE_SECS": "2"})


def test_a_secret_is_nowhere_but_in_its_app(told: Product, tmp_path: Path) -> None:
    it, code = told, TELL
    seen: list[bytes] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.extend(line for line in arguments_of_all().values() if SECRET.encode() in line)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    try:
        it.start("--log-level", "trace")
        it.login()
        it.run("apps", "create", "vaulted")
        watcher.start()
        first = it.run("config", "set", "--secret", "API_KEY", "--app", "vaulted", stdin=SECRET + "\n")
        it.run("config", "set", f"COLOUR={PLAIN}", "--app", "vaulted")
        project = node_app(tmp_path / "vaulted", code)
        made = it.deploy(project, "--env", "GIVEN", env={"GIVEN": LATER})
        it.run("scale", "web=2", "--app", "vaulted")
        assert it.get("vaulted", "/API_KEY") == (200, sha(SECRET))
        assert it.get("vaulted", "/COLOUR") == (200, sha(PLAIN))
        assert it.get("vaulted", "/GIVEN") == (200, sha(LATER))
        over.set()
        watcher.join()
        assert seen == [], "a command line held the secret"

        node_app(tmp_path / "nosy", LOOK)
        it.deploy(tmp_path / "nosy")
        from urllib.parse import quote

        looked = json.loads(it.get("nosy", "/" + quote(json.dumps([str(it.data), SECRET[::-1]]), safe=""))[1])
        assert looked["mine"], "the look did not even find its own environment"
        assert not looked["found"], looked

        answers = [first, made]
        for words in (
            ("config",), ("config", "--show"), ("releases",), ("releases", "diff", "v1", "v1"), ("status",),
            ("apps", "show", "vaulted"), ("logs",),
        ):  # fmt: skip
            for form in ("text", "json"):
                named = () if words[0] == "apps" else ("--app", "vaulted")
                answers.append(it.run(*words, *named, "--format", form, check=False))
        answers.append(it.run("deploy", str(project), "--dry-run", "--format", "json", env={"GIVEN": LATER}))
        for answer in answers:
            assert SECRET not in answer.stdout + answer.stderr, answer
        _, audit, _ = it.api("GET", "/audit?limit=200")
        _, described, _ = it.api("GET", f"/deployments/{made.json['deployment_id']}")
        for document in (audit, described):
            assert SECRET not in json.dumps(document)
        assert not holding(it.data, (SECRET, PLAIN, LATER)), "while the server runs, its log not written back"
        log = (it.home / "up.stderr").read_text()
        assert "PUT" in log or "/config" in log, "the server's log tells nothing, so its silence proves nothing"
        assert not [word for word in (SECRET, PLAIN, LATER) if word in log]
        it.kill9()
        assert not holding(it.data, (SECRET, PLAIN, LATER)), "after a crash"
        it.start()
        assert it.get("vaulted", "/API_KEY") == (200, sha(SECRET)), "adopted without its variables"
    finally:
        over.set()
        it.close()


def test_secrets_are_masked_and_never_told_again(own: Product, tmp_path: Path) -> None:
    own.deploy(node_app(tmp_path / "shop", TELL))
    words = own.run("config", "set", "--secret", "KEY", "--app", "shop", stdin=SECRET).stdout
    assert words.startswith("set secret KEY; config version 1, release v2")
    (tmp_path / "more.env").write_text(f"PEM='{SECRET}\nline two'\nexport OTHER={PLAIN} # not this\n")
    (tmp_path / "key.pem").write_text("whole\nfile\n")
    own.run(
        "config", "set", "--secret", "--env-file", str(tmp_path / "more.env"),
        "--from-file", f"FILE={tmp_path / 'key.pem'}", "--app", "shop",
    )  # fmt: skip
    own.run("config", "set", f"COLOUR={PLAIN}", "--app", "shop")
    assert own.get("shop", "/PEM") == (200, sha(f"{SECRET}\nline two"))
    assert own.get("shop", "/FILE") == (200, sha("whole\nfile\n"))
    shown = own.run("config", "--show", "--app", "shop", "--format", "json").json
    assert shown["env"] == {"COLOUR": PLAIN, **dict.fromkeys(("FILE", "KEY", "OTHER", "PEM"), "****")}
    assert shown["secrets"] == ["FILE", "KEY", "OTHER", "PEM"]
    assert own.run("config", "get", "COLOUR", "--app", "shop").stdout == f"{PLAIN}\n"
    refused = own.run("config", "get", "KEY", "--app", "shop", check=False)
    assert (refused.code, refused.stdout) == (10, "")
    assert "never shown again" in refused.stderr
    on_line = own.run("config", "set", "--secret", f"KEY={LATER}", "--app", "shop", check=False)
    assert on_line.code == 2
    assert "does not belong on a command line" in on_line.stderr
    assert LATER not in on_line.stderr
    # a new plain value for a secret does not make it plain
    own.run("config", "set", f"KEY={LATER}", "--app", "shop")
    assert own.get("shop", "/KEY") == (200, sha(LATER))
    assert own.run("config", "get", "KEY", "--app", "shop", check=False).code == 10

    diff = own.run("releases", "diff", "v1", "v5", "--app", "shop", "--format", "json").json
    assert {"name": "KEY", "change": "added", "secret": True} in diff["variables"]
    assert {"name": "COLOUR", "change": "added", "secret": False} in diff["variables"]
    text = own.run("releases", "diff", "v2", "v5", "--app", "shop").stdout
    assert "env KEY" in text
    assert "another value" in text
    assert not [word for word in (SECRET, PLAIN, LATER) if word in text + json.dumps(diff)]

    own.run("rollback", "v4", "--app", "shop")
    assert own.get("shop", "/KEY") == (200, sha(SECRET)), "the release's own secret"
    own.run("rollback", "v1", "--app", "shop")
    assert own.get("shop", "/KEY") == (200, sha(""))


def test_what_an_app_prints_of_its_secrets_is_masked_when_it_is_read(own: Product, tmp_path: Path) -> None:
    print_it = "console.log('key ' + process.env.KEY + '!'); console.error('short ' + process.env.SHORT);\n"
    own.run("apps", "create", "chatty")
    (tmp_path / "s.env").write_text(f"KEY={SECRET}\nSHORT=abc\n")
    own.run("config", "set", "--secret", "--env-file", str(tmp_path / "s.env"), "--app", "chatty")
    own.deploy(node_app(tmp_path / "chatty", print_it + HELLO % "hi"))
    log = own.run("logs", "--app", "chatty").stdout
    assert "key ****!" in log
    assert "short abc" in log
    assert SECRET not in log
    (tmp_path / "chatty" / "server.js").write_text(print_it + "process.exit(3)")
    failed = own.deploy(tmp_path / "chatty", "--timeout", "15", check=False)
    assert failed.code == 50
    assert "key ****!" in failed.stdout + failed.stderr
    assert SECRET not in failed.stdout + failed.stderr
    assert not [path for path in holding(own.data, [SECRET]) if "/logs/" not in path]


def test_a_rollback_does_not_reveal_what_became_a_secret(own: Product, tmp_path: Path) -> None:
    own.run("apps", "create", "shop")
    own.run("config", "set", f"KEY={SECRET}", "--app", "shop")
    own.deploy(node_app(tmp_path / "shop", TELL))
    own.run("config", "set", "--secret", "KEY", "--app", "shop", stdin=LATER)
    own.run("rollback", "v1", "--app", "shop")
    assert own.get("shop", "/KEY") == (200, sha(SECRET))
    shown = own.run("config", "--show", "--app", "shop", "--format", "json").json
    assert shown["env"] == {"KEY": "****"}


def test_unset_of_a_name_that_is_not_there_says_so(own: Product) -> None:
    own.run("apps", "create", "shop")
    own.run("config", "set", "A=1", "--app", "shop")
    none = own.run("config", "unset", "NOPE", "--app", "shop", check=False)
    assert none.code == 2
    assert "shop has no variable NOPE" in none.stderr
    some = own.run("config", "unset", "A", "NOPE", "--app", "shop")
    assert some.stdout.startswith("unset A; config version 2")
    assert "had no variable NOPE" in some.stderr


def failed_start(it: Product) -> str:
    with pytest.raises(AssertionError) as ended:
        it.start()
    assert it.process is not None
    assert it.process.stdout is not None
    it.process.stdout.close()
    it.process = None
    text = str(ended.value)
    assert "ended with 10" in text, text
    return text


def sealing_keys(it: Product) -> set[str]:
    """Keys that the database says it needs, or that some row begins with."""
    with sqlite3.connect(it.data / "aether.db") as database:
        rows = database.execute("SELECT env FROM configs UNION ALL SELECT env FROM deployments").fetchall()
        named = {row[0] for row in database.execute("SELECT id FROM secret_keys")}
    database.close()
    return named | {text.split(":")[1] for (text,) in rows}


def test_without_its_key_the_server_names_the_file_and_starts_nothing(own: Product, tmp_path: Path) -> None:
    own.deploy(node_app(tmp_path / "shop", TELL))
    own.run("config", "set", "--secret", "KEY", "--app", "shop", stdin=SECRET)
    assert own.stop() == 0
    file = own.data / "secrets.key"
    assert file.stat().st_mode & 0o777 == 0o600
    right = file.read_text()
    file.unlink()
    assert f"{file} is missing" in failed_start(own)
    assert not file.exists(), "a new key was made although rows are sealed with the old one"
    assert not any((own.data / "instances").iterdir())
    file.write_text("A" * 43 + "=\n")
    file.chmod(0o600)
    assert "does not hold the key" in failed_start(own)
    assert file.read_text() == "A" * 43 + "=\n"
    # the right key after a wrong newer one: both are read, and what the old one sealed is sealed anew
    file.write_text("A" * 43 + "=\n" + right)
    own.start()
    assert own.get("shop", "/KEY") == (200, sha(SECRET))
    deadline = time.monotonic() + 20
    while len(keys := sealing_keys(own)) > 1:
        assert time.monotonic() < deadline, keys
        time.sleep(0.05)
    # nothing needs the old key any more: it can go, and with the new one alone everything is there
    own.stop()
    file.write_text("A" * 43 + "=\n")
    own.start()
    assert own.get("shop", "/KEY") == (200, sha(SECRET))
    own.run("rollback", "v1", "--app", "shop")


def test_a_row_put_in_the_place_of_another_does_not_open(own: Product) -> None:
    for app, value in (("mine", SECRET), ("theirs", LATER)):
        own.run("apps", "create", app)
        own.run("config", "set", f"KEY={value}", "--app", app)
    with sqlite3.connect(own.data / "aether.db") as database:
        rows = dict(
            database.execute("SELECT a.name, c.env FROM configs c JOIN applications a ON a.id = c.app_id").fetchall()
        )
        database.execute(
            "UPDATE configs SET env = ? WHERE app_id = (SELECT id FROM applications WHERE name = 'mine')",
            (rows["theirs"],),
        )
    refused = own.run("config", "--show", "--app", "mine", check=False)
    assert refused.code == 40
    assert "altered, or belongs to another row" in refused.stderr
    assert LATER not in refused.stderr


def test_rows_that_an_older_version_kept_plain_are_sealed_and_leave_nothing_behind(tmp_path: Path) -> None:
    old = "left-in-a-free-page-" * 400
    with product(tmp_path / "home", AETHER_STOP_GRACE_SECS="2") as it:
        it.deploy(node_app(tmp_path / "shop", TELL))
        it.run("config", "set", "KEY=x", "--app", "shop")
        it.stop()
        file = it.data / "aether.db"
        with sqlite3.connect(file, isolation_level=None) as database:
            database.execute("PRAGMA secure_delete=OFF")
            database.execute("UPDATE configs SET env = ?", (json.dumps({"KEY": SECRET}),))
            database.execute("UPDATE deployments SET env = ?", (json.dumps({"GIVEN": PLAIN}),))
            database.execute("DELETE FROM secret_keys")
            database.execute("CREATE TABLE junk (a TEXT)")
            database.execute("INSERT INTO junk VALUES (?)", (old,))
            database.execute("DROP TABLE junk")
            database.execute("PRAGMA user_version=0")
        database.close()
        for word in (SECRET, PLAIN, old[:20]):
            assert holding(it.data, [word]), "the test has nothing to find"
        it.start()
        assert it.get("shop", "/KEY") == (200, sha(SECRET))
        assert it.get("shop", "/GIVEN") == (200, sha(PLAIN))
        assert not holding(it.data, (SECRET, PLAIN, old[:20]))
        # a start that was broken off between sealing and rewriting leaves the rewriting to the next one
        it.stop()
        with sqlite3.connect(file, isolation_level=None) as database:
            database.execute("PRAGMA secure_delete=OFF")
            database.execute("CREATE TABLE junk (a TEXT)")
            database.execute("INSERT INTO junk VALUES (?)", (old,))
            database.execute("DROP TABLE junk")
            database.execute("PRAGMA user_version=0")
        database.close()
        assert holding(it.data, [old[:20]])
        it.start()
        assert not holding(it.data, [old[:20]])
