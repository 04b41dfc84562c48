"""`aether logs` as its users have it: nothing lost, nothing twice, through restarts, stalls and time-outs."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.test_faults import wait_for
from support.product import AETHER, Product, node_app, product

# Each process writes `<random name> <number>` as fast as every 4 ms allow, and says its last number before it ends.
COUNTER = """
const name = require('crypto').randomBytes(4).toString('hex');
let n = 0, on = true;
const more = () => {
  let text = '';
  for (let i = 0; i < BATCH; i++) text += name + ' ' + (++n) + '\\n';
  if (on) process.stdout.write(text, () => setTimeout(more, 4));
};
const end = (code) => { on = false; process.stdout.write(name + ' last ' + n + '\\n', () => process.exit(code)); };
process.on('SIGTERM', () => end(0));
require('http').createServer((q, s) => {
  s.end(name);
  if (q.url === '/crash') end(3);
}).listen(process.env.PORT, more);
"""


class Follower:
    """`aether logs --follow --format json` with everything it printed."""

    def __init__(self, up: Product, app: str, *flags: str) -> None:
        command = [AETHER, "logs", "--follow", "--app", app, "--format", "json", *flags]
        self.errors = (up.home / "follower.stderr").open("w+")
        self.process = subprocess.Popen(command, env=up.env, stdout=subprocess.PIPE, stderr=self.errors)
        self.records: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.records.append(json.loads(line))

    def said(self, text: str) -> int:
        return sum(1 for record in list(self.records) if text in record["line"])

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(20)
        self._thread.join(20)
        self.errors.close()
        return code


@contextlib.contextmanager
def following(up: Product, app: str, *flags: str) -> Iterator[Follower]:
    follower = Follower(up, app, *flags)
    try:
        yield follower
    finally:
        if follower.process.poll() is None:
            follower.process.kill()
            follower.process.wait()
        assert follower.process.stdout is not None
        follower.process.stdout.close()


def by_process(records: list[dict[str, Any]]) -> dict[str, list[list[str]]]:
    found: dict[str, list[list[str]]] = defaultdict(list)
    for record in records:
        words = record["line"].split()
        if len(words) >= 2 and len(words[0]) == 8:
            found[words[0]].append(words[1:])
    return found


def test_nothing_is_lost_or_doubled_through_every_kind_of_restart(own: Product, tmp_path: Path) -> None:
    project = node_app(tmp_path / "many", COUNTER.replace("BATCH", "20"), name="many")
    own.deploy(project)
    own.run("scale", "web=3", "--app", "many")
    with following(own, "many", "--tail", "0") as follower:
        wait_for(lambda: len(by_process(follower.records)) == 3)
        own.get("many", "/crash")
        wait_for(lambda: len(by_process(follower.records)) >= 4)
        own.kill9()
        time.sleep(0.5)  # the apps go on writing meanwhile
        own.start()
        before = len(follower.records)
        wait_for(lambda: len(follower.records) > before + 2000)
        (project / "extra.txt").write_text("another release")
        own.deploy(project)
        wait_for(lambda: follower.said(" last ") >= 4)
        own.stop()
        own.start()
        wait_for(lambda: follower.said(" last ") >= 7, 60)
        own.run("scale", "web=1", "--app", "many")
        wait_for(lambda: follower.said(" last ") >= 9, 60)
        assert follower.end() == 130
    records = follower.records
    assert not [record for record in records if record.get("skipped")]
    processes = by_process(records)
    assert len(processes) >= 10
    ended = 0
    for name, lines in processes.items():
        numbers = [int(words[0]) for words in lines if len(words) == 1]
        # `--tail 0`: of the three first the beginning is not wanted; of all others every line is
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), f"{name} has gaps or repetitions"
        last = [int(words[1]) for words in lines if words[0] == "last"]
        if last:
            ended += 1
            assert last == [numbers[-1]], f"{name} ended with lines missing"
    assert ended >= 9
    assert sum(1 for lines in processes.values() if lines[0] == ["1"]) >= len(processes) - 3
    seen: dict[str, int] = {}
    for record in records:
        assert record["deployment_id"]
        assert len(record["digest"]) == 64
        if record["instance"] in seen:
            assert record["seq"] == seen[record["instance"]] + 1
        seen[record["instance"]] = record["seq"]


def test_a_reader_that_stalls_is_told_what_it_missed(tmp_path: Path) -> None:
    settings = {"AETHER_APP_LOG_BYTES": "200000", "AETHER_EDGE_IDLE_TIMEOUT_SECS": "2"}
    with product(tmp_path / "home", **settings) as up:
        up.deploy(node_app(tmp_path / "flood", COUNTER.replace("BATCH", "400"), name="flood"))
        command = [AETHER, "logs", "--follow", "--app", "flood", "--format", "json"]
        follower = subprocess.Popen(command, env=up.env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert follower.stdout is not None
        try:
            assert up.process is not None
            first = json.loads(follower.stdout.readline())
            while "flood@" in first["line"] or not first["line"].strip() or first["line"].startswith(">"):
                first = json.loads(follower.stdout.readline())  # what `npm start` says
            ahead = first["seq"] - int(first["line"].split()[1])
            server, client = rss(up.process.pid), rss(follower.pid)
            time.sleep(8)  # four time-outs of the edge, and hundreds of rotations
            assert rss(up.process.pid) < server + 30_000, "a stalled reader's lines pile up in the server"
            assert rss(follower.pid) < client + 10_000, "a stalled reader's lines pile up in the client"
            position = first["seq"]
            gaps = 0
            until = time.monotonic() + 30
            while gaps < 1 or position < 100_000:
                assert time.monotonic() < until
                record = json.loads(follower.stdout.readline())
                if skipped := record.get("skipped"):
                    gaps += 1
                    position += skipped
                    assert record["stream"] == "aether"
                    assert f"{skipped} log lines were skipped" in record["line"]
                else:
                    position += 1
                    assert int(record["line"].split()[1]) + ahead == position, (
                        "lines are missing, and nothing says so"
                    )
                assert record["seq"] == position
        finally:
            follower.kill()
            follower.wait()
            follower.stdout.close()


def rss(pid: int) -> int:
    """Resident KiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError(f"{pid} has ended")


def test_silence_beyond_every_time_out_breaks_nothing(tmp_path: Path) -> None:
    settings = {
        "AETHER_EDGE_IDLE_TIMEOUT_SECS": "1", "AETHER_EDGE_UPSTREAM_TIMEOUT_SECS": "1",
        "AETHER_STREAM_HEARTBEAT_SECS": "0.3",
    }  # fmt: skip
    code = """
    require('http').createServer((q, s) => { console.log('asked ' + q.url); s.end('ok') }).listen(process.env.PORT);
    """
    with product(tmp_path / "home", **settings) as up:
        up.deploy(node_app(tmp_path / "quiet", code, name="quiet"))
        with following(up, "quiet", "--tail", "0") as follower:
            time.sleep(5)
            up.get("quiet", "/after")
            wait_for(lambda: follower.said("/after"))
            assert follower.end() == 130
        assert (up.home / "follower.stderr").read_text().count("connecting again") == 0


def test_a_closed_pipe_ends_the_follower_quietly(up: Product, tmp_path: Path) -> None:
    up.deploy(node_app(tmp_path / "piped", COUNTER.replace("BATCH", "5"), name="piped"))
    script = f"{AETHER} logs --follow --app piped | head -3; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], env=up.env, capture_output=True, text=True, timeout=30, check=False
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert lines[3] == "141", "as a program that SIGPIPE ended"
    assert done.stderr == ""


HOSTILE = """
const bytes = Buffer.concat([
  Buffer.from('\\x1b[31mred\\x1b[0m \\x1b]8;;http://evil\\x07link\\x1b]8;;\\x07 '),
  Buffer.from('\\x1b]52;c;Zm9v\\x07 a\\rb\\u009b2J\\u202e\\0'),
  Buffer.from([0xff, 0xfe, 0x0a])]);
process.stdout.write(bytes);
process.stdout.write('y'.repeat(40000) + '\\n');
require('http').createServer((q, s) => s.end('ok')).listen(process.env.PORT);
"""


def test_an_app_cannot_steer_a_terminal(up: Product, tmp_path: Path) -> None:
    up.deploy(node_app(tmp_path / "hostile", HOSTILE, name="hostile"))
    for flags in ([], ["--format", "json"]):
        raw = on_a_terminal([AETHER, "logs", "--app", "hostile", *flags], up)
        text = raw.decode()
        controls = {c for c in text if (ord(c) < 32 and c not in "\r\n") or 0x7F <= ord(c) < 0xA0 or c == "\u202e"}
        assert controls == set(), f"{flags} let {controls!r} through"
        assert "\r" not in text.replace("\r\n", "\n")
        assert "red" in text
    piped = up.run("logs", "--app", "hostile", "--format", "json").stdout.splitlines()
    records = [json.loads(line) for line in piped]
    first = next(record for record in records if "red" in record["line"])
    assert first["line"].startswith("\x1b[31mred\x1b[0m \x1b]8;;")
    assert first["line"].endswith("\0\ufffd\ufffd")
    pieces = [record for record in records if record["line"].startswith("yyy")]
    assert [record.get("partial", False) for record in pieces] == [True, True, False]
    assert "".join(record["line"] for record in pieces) == "y" * 40000


def on_a_terminal(command: list[str], up: Product) -> bytes:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=up.env, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    said = b""
    until = time.monotonic() + 30
    with contextlib.suppress(OSError):  # EIO: the other side was closed
        while time.monotonic() < until:
            if select.select([ours], [], [], 0.2)[0]:
                data = os.read(ours, 65536)
                if not data:
                    break
                said += data
    os.close(ours)
    assert process.wait(10) == 0
    return said


def test_tail_and_since_over_releases_and_instances(up: Product, tmp_path: Path) -> None:
    code = """
    for (let i = 1; i <= 5; i++) console.log('RELEASE ' + i);
    require('http').createServer((q, s) => s.end('ok')).listen(process.env.PORT);
    process.on('SIGTERM', () => process.exit(0));
    """
    project = node_app(tmp_path / "history", code.replace("RELEASE", "one"), name="history")
    up.deploy(project)
    (project / "server.js").write_text(code.replace("RELEASE", "two"))
    up.deploy(project)
    up.run("scale", "web=2", "--app", "history")
    wait_for(lambda: up.run("logs", "--app", "history").stdout.count("two 5") == 2)

    def lines(*flags: str) -> list[dict[str, Any]]:
        out = up.run("logs", "--app", "history", "--format", "json", *flags).stdout
        return [json.loads(line) for line in out.splitlines()]

    everything = lines()
    said = [line["line"] for line in everything if line["line"][:3] in ("one", "two")]
    assert said[:5] == [f"one {n}" for n in range(1, 6)], "the release before is still told of"
    assert sorted(said[5:]) == sorted(2 * [f"two {n}" for n in range(1, 6)])
    assert [line["time"] for line in everything] == sorted(line["time"] for line in everything)
    assert lines("--tail", "4") == everything[-4:]
    assert lines("--tail", "0") == []
    assert lines("--since", "1h") == everything
    assert lines("--since", everything[7]["time"]) == everything[7:]
    newest = lines("--since", "deployment")
    assert {line["release"] for line in newest} == {2}
    assert len(newest) == len([line for line in everything if line["release"] == 2])
    wrong = up.run("logs", "--app", "history", "--since", "yesterday", check=False)
    assert wrong.code == 2, wrong
    assert "deployment" in wrong.stderr


def test_an_app_that_crashes_on_and_on_keeps_its_disk(tmp_path: Path) -> None:
    code = "process.stdout.write(('z'.repeat(99) + '\\n').repeat(3000), () => process.exit(1));"
    with product(tmp_path / "home", AETHER_APP_LOG_BYTES="100000") as up:
        project = node_app(tmp_path / "wreck", COUNTER.replace("BATCH", "1"), name="wreck")
        up.deploy(project)
        logs = up.data / "logs" / "wreck"
        (project / "server.js").write_text(code)
        seen: set[str] = set()
        for _ in range(6):
            up.deploy(project, "--timeout", "5", check=False)
            (project / "extra").write_text(str(time.time_ns()))
            seen |= {path.name for path in logs.iterdir()}
        assert len(seen) > 6
        used = sum(path.stat().st_size for path in logs.iterdir())
        assert used <= 12 * 2 * 100_000


@pytest.mark.parametrize("setting", ["0", "-1", "x", "61"])
def test_a_heartbeat_that_could_not_keep_a_stream_alive_is_refused(tmp_path: Path, setting: str) -> None:
    it = Product(tmp_path / "home", extra_env={"AETHER_STREAM_HEARTBEAT_SECS": setting})
    it.home.mkdir()
    done = it.run("up", check=False, timeout=20)
    assert done.code == 10, done
    assert "AETHER_STREAM_HEARTBEAT_SECS" in done.stderr
