"""`aether run` and volumes as a user has them: pipes, a terminal of one's own, lost clients and killed servers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.product import AETHER, HELLO, Product, node_app

APP = "tool"
VOLUMES = '[[volumes]]\nname = "data"\npath = "/data"\n\n[[volumes]]\nname = "uploads"\npath = "/app/uploads"\n'


@pytest.fixture(scope="module")
def shop(up: Product, tmp_path_factory: pytest.TempPathFactory) -> Product:
    project = node_app(tmp_path_factory.mktemp("project") / APP, HELLO % "hi")
    (project / "aether.toml").write_text(f'app = "{APP}"\n{VOLUMES}')
    up.deploy(project, "--env", "GREETING=hello")
    return up


def wait_for(what: Callable[[], Any], secs: float = 30) -> Any:
    deadline = time.monotonic() + secs
    while not (found := what()):
        assert time.monotonic() < deadline, f"waited {secs} s in vain"
        time.sleep(0.05)
    return found


def piped(up: Product, *words: str, data: bytes = b"", flags: tuple[str, ...] = ()) -> tuple[int, bytes, bytes]:
    done = subprocess.run(
        [AETHER, "run", "--app", APP, *flags, *words],
        env=up.env, input=data, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def listed(up: Product, app: str = APP) -> list[dict[str, Any]]:
    return up.run("run", "--app", app, "--list", "--format", "json").json


def test_streams_codes_and_environment(shop: Product) -> None:
    assert piped(shop, "echo $GREETING; echo no >&2; exit 3") == (3, b"hello\n", b"no\n")
    assert piped(shop, "printf", "%s|", "a b", "$HOME", "-x") == (0, b"a b|$HOME|-x|", b"")
    assert piped(shop, "cat", data=b"x\n") == (0, b"x\n", b"")
    assert piped(shop, "sh", "-c", "kill -9 $$")[0] == 137
    assert piped(shop, "echo $EXTRA", flags=("--env", "EXTRA=one two"))[1] == b"one two\n"
    assert piped(shop, "--", "echo", "--list")[1] == b"--list\n"


def test_megabytes_through_cat_are_the_same(shop: Product) -> None:
    data = os.urandom(5_000_000)
    code, out, err = piped(shop, "cat", data=data)
    assert (code, err) == (0, b"")
    assert out == data


def test_a_reader_that_has_enough_ends_the_run(shop: Product) -> None:
    command = f"{AETHER} run --app {APP} yes | head -n 1"
    done = subprocess.run(["sh", "-c", command], env=shop.env, capture_output=True, timeout=60, check=False)
    assert done.stdout == b"y\n"
    wait_for(lambda: not [run for run in listed(shop) if run["status"] == "running"])


def test_a_run_is_recorded_logged_and_audited(shop: Product) -> None:
    piped(shop, "echo written by a run; exit 4")
    newest = listed(shop)[0]
    assert (newest["status"], newest["exit_code"], newest["release"]) == ("ended", 4, 1)
    assert newest["command"] == "echo written by a run; exit 4"
    lines = shop.run("logs", "--app", APP, "--format", "json").stdout.splitlines()
    assert newest["id"] in [line["instance"] for line in map(json.loads, lines) if line["line"] == "written by a run"]
    rows = shop.api("GET", "/audit")[1]["items"]
    mine = [row for row in rows if row["action"] == "POST /apps/{app}/runs"]
    assert mine
    assert mine[0]["target"] == APP
    assert "written by a run" not in json.dumps(rows), "what was run is not in the audit log"


def test_detached_runs_are_listed_logged_and_ended(shop: Product) -> None:
    begun = shop.run("run", "--app", APP, "--detach", "--format", "json", "echo from afar; sleep 600").json
    assert [run["status"] for run in listed(shop) if run["id"] == begun["id"]] == ["running"]
    wait_for(lambda: "from afar" in shop.run("logs", "--app", APP).stdout)
    shop.run("run", "--app", APP, "--stop", begun["id"])
    ended = next(run for run in listed(shop) if run["id"] == begun["id"])
    assert ended["status"] == "ended"
    assert ended["reason"].startswith("stopped by ")
    again = shop.run("run", "--app", APP, "--stop", begun["id"], check=False)
    assert again.code != 0
    assert "has ended" in again.stderr


def test_its_time_ends_it(shop: Product) -> None:
    code, _, err = piped(shop, "sleep", "60", flags=("--timeout", "1s"))
    assert code == 124
    assert b"its time was over" in err


def test_wrong_input(shop: Product) -> None:
    for words, text in (
        (("run", "--app", APP), "give a command"),
        (("run", "--app", APP, "--release", "99", "ls"), "no release 99"),
        (("run", "--app", "nosuch", "ls"), "no app 'nosuch'"),
        (("run", "--app", APP, "--timeout", "0", "ls"), "not a time"),
        (("run", "--app", APP, "--tty", "ls"), "needs a terminal"),
        (("run", "--app", APP, "--format", "json", "ls"), "--detach"),
    ):
        done = shop.run(*words, check=False)
        assert (done.code, text in done.stderr + done.stdout) == (2, True), (words, done)


def test_so_many_at_once_and_no_more(shop: Product) -> None:
    begun = [shop.run("run", "--app", APP, "--detach", "--format", "json", "sleep 600").json["id"] for _ in range(10)]
    refused = shop.run("run", "--app", APP, "ls", check=False)
    assert "10 runs under way" in refused.stderr
    for run_id in begun:
        shop.run("run", "--app", APP, "--stop", run_id)


# --- a vanished client, a killed server


@contextlib.contextmanager
def client(up: Product, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [AETHER, "run", "--app", APP, *words],
        env=up.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def test_ctrl_c_goes_to_the_command(shop: Product) -> None:
    with client(shop, "trap 'echo caught; exit 9' INT; echo on; while :; do sleep 0.05; done") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"caught\n"
        assert process.wait(20) == 9


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_vanished_client_ends_its_run(shop: Product, number: signal.Signals) -> None:
    with client(shop, "echo on; exec sleep 600") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        process.send_signal(number)
        assert process.wait(20) == (-number if number is signal.SIGKILL else 128 + number)
    ended = wait_for(lambda: [run for run in listed(shop)[:1] if run["status"] == "ended"])[0]
    assert ended["reason"] == "its caller was gone"


def test_kill9_of_the_server_ends_attached_runs_and_spares_detached_ones(own: Product, tmp_path: Path) -> None:
    project = node_app(tmp_path / APP, HELLO % "hi")
    own.deploy(project)
    with client(own, "echo on; exec sleep 600") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        kept = own.run("run", "--app", APP, "--detach", "--format", "json", "sleep 4; echo still here; exit 6").json
        own.kill9()
        assert process.wait(60) == 40
    folders = own.data / "instances"
    states = {folder.name: folder / "state.json" for folder in folders.iterdir()}
    lost = [
        name
        for name in states
        if name not in (kept["id"],) and "sleep 600" in (folders / name / "spec.json").read_text()
    ]
    assert len(lost) == 1
    wait_for(lambda: '"phase": "exited"' in states[lost[0]].read_text())
    own.start()
    by_id = {run["id"]: run for run in listed(own)}
    assert by_id[lost[0]]["status"] == "ended" or wait_for(
        lambda: {run["id"]: run for run in listed(own)}[lost[0]]["status"] == "ended"
    )
    wait_for(lambda: {run["id"]: run for run in listed(own)}[kept["id"]]["exit_code"] == 6)
    assert "still here" in own.run("logs", "--app", APP).stdout
    wait_for(lambda: lost[0] not in os.listdir(folders) and kept["id"] not in os.listdir(folders))


def test_a_stopping_server_ends_runs_and_says_so(own: Product, tmp_path: Path) -> None:
    own.deploy(node_app(tmp_path / APP, HELLO % "hi"))
    with client(own, "echo on; exec sleep 600") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        began = time.monotonic()
        assert own.stop() == 0
        assert time.monotonic() - began < 20
        _, err = process.communicate(timeout=20)
        assert b"the server was stopped" in err
        assert process.returncode == 143
    own.start()
    assert listed(own)[0]["reason"] == "the server was stopped"


# --- a terminal


class Terminal:
    """A terminal on which `aether run` is typed into."""

    def __init__(self, up: Product, *words: str) -> None:
        self.shown = b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(AETHER, [AETHER, "run", "--app", APP, *words], {**up.env, "TERM": "xterm"})

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, text: str, secs: float = 30) -> str:
        deadline = time.monotonic() + secs
        while text.encode() not in self.shown:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} was not shown: {self.shown!r}"
            if select.select([self.fd], [], [], left)[0]:
                try:
                    piece = os.read(self.fd, 65536)
                except OSError:
                    piece = b""
                assert piece or text.encode() in self.shown, f"the end, without {text!r}: {self.shown!r}"
                self.shown += piece
        before, _, self.shown = self.shown.partition(text.encode())
        return before.decode(errors="replace")

    def raw(self) -> bool:
        return not termios.tcgetattr(self.fd)[3] & termios.ECHO

    def wait(self) -> int:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                while select.select([self.fd], [], [], 0.05)[0] and (piece := os.read(self.fd, 65536)):
                    self.shown += piece
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline, self.shown

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def terminal(shop: Product) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_(*words: str) -> Terminal:
        opened.append(Terminal(shop, *words))
        return opened[-1]

    yield open_
    for it in opened:
        it.close()


SHELL = ("--env", "PS1=ready> ", "bash", "--norc", "-i")


def test_a_shell_on_a_terminal(terminal: Callable[..., Terminal]) -> None:
    it = terminal(*SHELL)
    it.until("ready> ")
    assert it.raw()
    it.resize(31, 97)
    it.type("stty size\r")
    it.until("31 97")
    it.type("trap '' WINCH; echo $TERM $GREETING; sleep 600\r")
    it.until("xterm hello")
    time.sleep(0.5)
    it.type("\x03")
    it.until("ready> ")
    it.type("echo code=$?\r")
    it.until("code=130")
    it.until("ready> ")
    it.type("\x04")
    assert it.wait() == 0
    assert not it.raw(), "the terminal is as it was"


def test_ctrl_c_on_a_terminal_is_the_commands(terminal: Callable[..., Terminal]) -> None:
    it = terminal("trap 'echo caught; exit 5' INT; echo on; while :; do sleep 0.05; done")
    it.until("on")
    it.type("\x03")
    it.until("caught")
    assert it.wait() == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signalled_client_leaves_the_terminal_as_it_was(
    terminal: Callable[..., Terminal], shop: Product, number: signal.Signals
) -> None:
    it = terminal(*SHELL)
    it.until("ready> ")
    os.kill(it.pid, number)
    assert it.wait() == 128 + number
    assert not it.raw()
    wait_for(lambda: listed(shop)[0]["status"] == "ended")


def test_a_killed_server_leaves_the_terminal_as_it_was(own: Product, tmp_path: Path) -> None:
    own.deploy(node_app(tmp_path / APP, HELLO % "hi"))
    it = Terminal(own, *SHELL)
    try:
        it.until("ready> ")
        own.kill9()
        assert it.wait() == 40
        assert not it.raw()
        assert b"aether: " in it.shown
    finally:
        it.close()


# --- volumes


def test_volumes_are_shared_by_runs_and_outlive_deployments(shop: Product, tmp_path: Path) -> None:
    assert piped(shop, "echo kept >/data/note; echo pic >/app/uploads/pic; ls -ld /data | cut -c1-10")[0] == 0
    project = node_app(tmp_path / "second", HELLO % "again")
    (project / "aether.toml").write_text(f'app = "{APP}"\n{VOLUMES}')
    shop.deploy(project)
    assert piped(shop, "cat /data/note /app/uploads/pic")[1] == b"kept\npic\n"
    shop.run("scale", "--app", APP, "web=2")
    assert piped(shop, "cat /data/note")[1] == b"kept\n"
    found = shop.run("volumes", "--app", APP, "--format", "json").json
    assert [(item["name"], item["path"], item["in_use"]) for item in found] == [
        ("data", "/data", True),
        ("uploads", "/app/uploads", True),
    ]
    refused = shop.run("volumes", "delete", "--app", APP, "data", "--yes", check=False)
    assert "in use" in refused.stderr
    assert piped(shop, "cat /data/note", flags=("--release", "1"))[1] == b"kept\n"
    shop.run("rollback", "--app", APP)
    assert piped(shop, "cat /data/note")[1] == b"kept\n"


def test_a_volume_is_deleted_once_nobody_needs_it(own: Product, tmp_path: Path) -> None:
    project = node_app(tmp_path / APP, HELLO % "hi")
    (project / "aether.toml").write_text(VOLUMES)
    own.deploy(project)
    piped(own, "echo one >/data/a")
    other = node_app(tmp_path / "other", HELLO % "other")
    (other / "aether.toml").write_text(VOLUMES)
    own.deploy(other)
    seen = own.run("run", "--app", "other", "--no-tty", "ls /data /app/uploads; id -u")
    assert "a" not in seen.stdout.split()
    (project / "aether.toml").unlink()
    own.deploy(project)
    own.run("volumes", "delete", "--app", APP, "data", "--yes")
    assert [item["name"] for item in own.run("volumes", "--app", APP, "--format", "json").json] == ["uploads"]
    own.run("apps", "delete", "other", "--yes")
    assert sorted(os.listdir(own.data / "volumes")) == [APP]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/etc/x", "is the system's"),
        ("/app", "would hide the app"),
        ("data", "must be absolute"),
        ("/a/../b", "plain"),
    ],
)
def test_paths_that_are_refused(up: Product, tmp_path: Path, path: str, why: str) -> None:
    project = node_app(tmp_path / "wrong", HELLO % "hi")
    (project / "aether.toml").write_text(f'[[volumes]]\nname = "v"\npath = "{path}"\n')
    done = up.run("deploy", str(project), check=False)
    assert done.code == 10
    assert why in done.stderr
