"""Running tools: output, limits, and processes that stay behind."""

import os
import time
from pathlib import Path

import pytest

from aether.build.command import TAIL_LINES, run
from aether.model.errors import BuildFailed, ConfigError


def sh(script: str, tmp_path: Path, lines: list[str] | None = None, timeout_s: float = 60) -> None:
    seen = lines if lines is not None else []
    run(["/bin/sh", "-c", script], tmp_path, what="the tool", timeout_s=timeout_s, on_line=seen.append)


def test_lines_arrive_as_they_are(tmp_path: Path) -> None:
    lines: list[str] = []
    sh(r"printf 'a\r\n\nb\377\nlast'; echo err >&2", tmp_path, lines)
    assert lines == ["a", "", "b\ufffd", "lasterr"]


def test_long_lines_are_cut(tmp_path: Path) -> None:
    lines: list[str] = []
    sh("head -c 500000 /dev/zero | tr '\\0' x", tmp_path, lines)
    assert lines
    assert max(map(len, lines)) <= 4096


def test_the_error_is_shown_where_advice_follows_it(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed) as caught:
        sh("echo 'npm error the reason'; for i in $(seq 50); do echo advice $i; done; exit 2", tmp_path)
    assert caught.value.details
    tail = caught.value.details["log_tail"]
    assert tail[0] == "npm error the reason"
    assert tail[-1] == "advice 50"
    assert len(tail) == TAIL_LINES
    assert len(set(tail)) == TAIL_LINES


def test_short_output_is_shown_whole_and_once(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match=r"the tool failed with exit code 2:\n  npm error a\n  b$"):
        sh("echo 'npm error a'; echo b; echo; exit 2", tmp_path)


def test_a_background_program_does_not_hold_the_deploy(tmp_path: Path) -> None:
    started = time.monotonic()
    sh("setsid sleep 30 & echo $! > pid; echo done", tmp_path)
    assert time.monotonic() - started < 20
    os.kill(int((tmp_path / "pid").read_text()), 9)


def test_a_signal_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="the tool ended by SIGSEGV"):
        sh("kill -SEGV $$", tmp_path)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no program 'no-such-program'"):
        run(["no-such-program"], tmp_path, what="the tool", timeout_s=5)


def test_the_limit_ends_what_ignores_signals(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match=r"took longer than 0\.5 s"):
        sh("trap '' TERM INT; echo hi; while :; do sleep 0.1; done", tmp_path, timeout_s=0.5)


def test_an_error_of_the_listener_ends_the_tool(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(["/bin/sh", "-c", "echo $$ > pid; echo x; sleep 60"], tmp_path, what="x", timeout_s=60, on_line=stop)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
