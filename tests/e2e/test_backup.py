"""A server backed up under load, destroyed and restored; backups that were cut, altered or killed in the middle."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from aether.model.errors import ConfigError, LocalIOError
from aether.topology.backups import put_back
from support.product import AETHER, Product, node_app, product

SECRET = "a-secret-that-comes-back"
PASSWORD = "correct horse battery"
COUNTED = ("applications", "users", "teams", "configs", "tokens")
TELL = """
const http = require('http');
http.createServer((q, r) => r.end('%s ' + (process.env.KEY || '-'))).listen(process.env.PORT);
process.on('SIGTERM', () => process.exit(0));
"""


def counts(data: Path) -> dict[str, int]:
    with closing(sqlite3.connect(data / "aether.db")) as database:
        return {table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in COUNTED}


@pytest.fixture
def passphrase(tmp_path: Path) -> Path:
    file = tmp_path / "passphrase"
    file.write_text("a long passphrase\n")
    return file


@pytest.fixture
def up(tmp_path: Path) -> Product:
    return Product(tmp_path / "home", extra_env={"AETHER_STOP_GRACE_SECS": "2"})


def filled(it: Product, tmp_path: Path) -> None:
    """Two apps, releases, a secret, replicas, a user, a team, a volume."""
    it.start()
    it.login()
    shop = node_app(tmp_path / "shop", TELL % "one")
    it.deploy(shop)
    it.run("config", "set", "--secret", "KEY", "--app", "shop", stdin=SECRET)
    (shop / "server.js").write_text(TELL % "two")
    it.deploy(shop)
    it.run("scale", "web=2", "--app", "shop")
    it.deploy(node_app(tmp_path / "other", TELL % "other"))
    it.run("user", "create", "ann", "--role", "deployer", stdin=PASSWORD + "\n")
    it.run("team", "create", "web")
    volume = it.data / "volumes" / "shop" / "files"
    (volume / "empty").mkdir(parents=True)
    (volume / "big").write_bytes(random.Random(1).randbytes(3_000_001))
    (volume / "link").symlink_to("big")
    (volume / "run.sh").write_text("#!/bin/sh\n")
    (volume / "run.sh").chmod(0o755)


def test_a_server_destroyed_comes_back_from_its_backup(up: Product, tmp_path: Path, passphrase: Path) -> None:
    over = threading.Event()

    def load() -> None:
        project, number = node_app(tmp_path / "busy", TELL % "busy"), 0
        while not over.is_set():
            number += 1
            (project / "server.js").write_text(TELL % f"busy {number}")
            up.deploy(project, check=False)

    loader = threading.Thread(target=load)
    try:
        filled(up, tmp_path)
        loader.start()
        time.sleep(1.5)
        file = tmp_path / "b.tar"
        made = up.run("backup", "--out", str(file), "--passphrase-file", str(passphrase), "--format", "json").json
        over.set()
        loader.join()
        assert made["size_bytes"] == file.stat().st_size
        assert file.stat().st_mode & 0o777 == 0o600
        content = file.read_bytes()
        assert SECRET.encode() not in content
        keys = (up.data / "secrets.key").read_text().splitlines()[-1]
        assert keys.encode() not in content
        assert up.token().encode() not in content
        assert not list((up.data / "run").glob("backup-*"))
        before = counts(up.data)
        looked = up.run(
            "restore", str(file), "--verify", "--passphrase-file", str(passphrase), "--format", "json"
        ).json
        assert looked["counts"]["users"] == before["users"]
        up.stop()
        shutil.rmtree(up.data)

        back = up.run("restore", str(file), "--passphrase-file", str(passphrase), "--format", "json").json
        print("restored in", back["seconds"], "s:", back["size_bytes"], "bytes")
        assert back["missing"] == []
        assert {name: back["counts"][name] for name in COUNTED} == before == counts(up.data)
        volume = up.data / "volumes" / "shop" / "files"
        assert (volume / "big").read_bytes() == random.Random(1).randbytes(3_000_001)
        assert os.readlink(volume / "link") == "big"
        assert (volume / "run.sh").stat().st_mode & 0o777 == 0o755
        assert (volume / "empty").is_dir()
        up.start()
        up.run("status", "--app", "shop")
        assert up.get("shop") == (200, f"two {SECRET}")
        assert up.get("other") == (200, "other -")
        assert up.get("busy")[0] == 200
        assert up.api("GET", "/apps/shop")[1]["instances"]["desired"] == 2
        up.run("rollback", "v1", "--app", "shop")
        assert up.get("shop") == (200, "one -")
        login = up.api("POST", "/auth/login", {"username": "ann", "password": PASSWORD}, token=None)
        assert login[0] == 200
    finally:
        over.set()
        up.close()


def test_a_backup_of_a_stopped_server_and_what_is_refused(up: Product, tmp_path: Path, passphrase: Path) -> None:
    file = tmp_path / "b.tar"
    try:
        filled(up, tmp_path)
        running = up.run("backup", "--data-dir", str(up.data), "--without-keys", check=False)
        assert running.code == 30
        assert "already runs" in running.stderr
        assert up.run("backup", "--out", str(file), check=False).code == 2, "no passphrase, no choice: refused"
        up.run("user", "token", "ci", "--user", "ann", check=False)
        up.stop()
        up.run("backup", "--data-dir", str(up.data), "--passphrase-file", str(passphrase), "--out", str(file))
        used = up.run("restore", str(file), "--passphrase-file", str(passphrase), check=False)
        assert "is not empty" in used.stderr
        target = tmp_path / "elsewhere"

        def refused(content: bytes, word: str, known: str = "a long passphrase") -> None:
            with pytest.raises((LocalIOError, ConfigError), match=word):
                put_back(io.BytesIO(content), target, lambda: known, force=False)
            assert not list(tmp_path.glob("elsewhere*")), "something was left beside the target"

        whole = file.read_bytes()
        draw = random.Random(7)
        for size in [0, 100, 511, 512, 5000, len(whole) // 2, len(whole) - 3000, *draw.sample(range(len(whole)), 8)]:
            if size < len(whole) - 2048:
                refused(whole[:size], "backup")
        for at in draw.sample(range(len(whole) - 12_000), 20):
            if not whole[max(0, at - 512) : at + 512].strip(b"\0"):
                continue  # the filling between members, which holds nothing
            altered = bytearray(whole)
            altered[at] ^= 0x41
            refused(bytes(altered), "backup")
        refused(whole, "is the passphrase right", "another passphrase")
        (tmp_path / "cut.tar").write_bytes(whole[:5000])
        done = up.run(
            "restore", str(tmp_path / "cut.tar"), "--passphrase-file", str(passphrase), "--force", check=False
        )
        assert done.code == 30
        assert "cut or altered" in done.stderr

        forced = up.run(
            "restore", str(file), "--passphrase-file", str(passphrase), "--force", "--format", "json"
        ).json  # fmt: skip
        assert Path(forced["before"]).is_dir(), "the old directory is kept"
        up.start()
        assert up.get("shop") == (200, f"two {SECRET}")
        none = tmp_path / "none.tar"
        up.run("backup", "--without-keys", "--no-volumes", "--out", str(none))
        said = up.run("restore", str(none), "--data-dir", str(target))
        assert "put your secrets.key" in said.stderr
        assert not (target / "secrets.key").exists()
        assert not (target / "volumes").exists()
    finally:
        up.close()


def test_a_restore_killed_in_the_middle_is_repeated(tmp_path: Path, passphrase: Path) -> None:
    file, target = tmp_path / "b.tar", tmp_path / "target"
    with product(tmp_path / "home") as up:
        volume = up.data / "volumes" / "x" / "y"
        volume.mkdir(parents=True)
        for number in range(300):
            (volume / f"{number}").write_bytes(os.urandom(200_000))
        up.run("backup", "--passphrase-file", str(passphrase), "--out", str(file))
        words = [AETHER, "restore", str(file), "--data-dir", str(target), "--passphrase-file", str(passphrase)]
        for _ in range(3):
            running = subprocess.Popen(words, env=up.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 30
            while not list(tmp_path.glob("target.restoring/volumes/x/y/*")):
                assert time.monotonic() < deadline
                assert running.poll() is None, "it was over before it could be killed"
                time.sleep(0.002)
            running.send_signal(signal.SIGKILL)
            running.wait()
            assert not target.exists(), "half a directory took the place"
        up.run(*words[1:])
        assert len(list((target / "volumes" / "x" / "y").iterdir())) == 300
        assert sorted(path.name for path in tmp_path.glob("target*")) == ["target"]


def test_a_backup_made_by_a_newer_version_is_refused(own: Product, tmp_path: Path) -> None:
    file = tmp_path / "b.tar"
    with sqlite3.connect(own.data / "aether.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    own.run("backup", "--plain-keys", "--out", str(file))
    refused = own.run("restore", str(file), "--data-dir", str(tmp_path / "t"), check=False)
    assert refused.code == 10
    assert "made by a newer Aether" in refused.stderr
    assert not (tmp_path / "t").exists()
    with sqlite3.connect(own.data / "aether.db") as database:
        from aether.stores.database.schema import HEAD

        database.execute("UPDATE alembic_version SET version_num = ?", (HEAD,))
    database.close()
