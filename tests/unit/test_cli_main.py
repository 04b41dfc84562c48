"""The verb table, the global flags, exit codes, and what is loaded on the hot path."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aether import __version__
from aether.cli import failure
from aether.cli.arguments import Parser
from aether.cli.main import entry, load, verbs
from aether.model import errors

AETHER = str(Path(sys.executable).parent / "aether")
NOT_LISTED = {"dev", "slice", "gateway", "worker", "node"}


def test_every_verb_in_the_table_exists_and_describes_itself() -> None:
    for verb in verbs():
        module = load(verb)
        parser = Parser(prog=f"aether {verb}")
        module.configure(parser)
        assert parser.format_help().startswith(f"usage: aether {verb}")
        assert callable(module.run)
    assert not NOT_LISTED & set(verbs()), "a verb is listed before it exists"


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["-h"], ["help"], ["--log-level", "debug", "--help"]):
        assert entry(words) == 0
        shown = capsys.readouterr()
        assert all(f"  {verb} " in shown.out for verb in verbs())
        assert shown.err == ""
    assert entry([]) == 2
    assert "usage: aether" in capsys.readouterr().err
    assert entry(["--version"]) == 0
    assert capsys.readouterr().out == f"aether {__version__}\n"


@pytest.mark.parametrize("words", [["deploy", "--help"], ["help", "deploy"], ["--log-level=warn", "deploy", "-h"]])
def test_help_of_a_verb(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(words) == 0
    shown = capsys.readouterr().out
    for flag in (
        "--dry-run", "--pack-only", "--no-upload", "--out", "--compression-level", "--no-cache", "--no-sbom",
        "--legacy-sbom", "--format", "--app", "--dev-hot", "--env", "--runtime", "--start", "--strategy", "--timeout",
        "--detach", "--ignore-scripts",
    ):  # fmt: skip
        assert flag in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["deplyo"], "did you mean 'deploy'"),
        (["xyzzy"], "no command 'xyzzy'"),
        (["--bogus"], "unknown flag '--bogus'"),
        (["--log-level", "loud", "list"], "--log-level must be one of"),
        (["--log-level"], "--log-level must be one of"),
        (["list", "--log-format", "xml"], "--log-format"),
        (["list", "--bogus"], "aether list --help"),
        (["list", "--limit", "0"], "between 1 and 500"),
        (["completions"], "--shell"),
        (["deploy", "--canary-steps", "50,20"], "must rise"),
        (["deploy", "--canary-steps", "few"], "percentages"),
        (["deploy", "--strategy", "sideways"], "rolling, recreate"),
        (["deploy", "--dev-hot"], "not offered"),
        (["deploy", "--legacy-sbom", "--no-sbom"], "exclude each other"),
        (["deploy", "--start", " "], "--start is empty"),
        (["deploy", "--app", ""], "--app is empty"),
        (["deploy", "/no/such/folder"], "is not a folder"),
        (["deploy", "--timeout", "0"], "is not a time"),
        (["deploy", "--compression-level", "10"], "from 0 to 9"),
        (["deploy", ".", "--env", "1A=x"], "cannot name a variable"),
        (["up", "--host", "0.0.0.0"], "--insecure-http"),
        (["up", "--port", "70000"], "65535"),
        (["apps", "create", "Not_Good"], "cannot name an app"),
        (["logs", "--app", "x", "--tail", "-1"], "--tail"),
        (["login", "--api-base", "http://10.1.2.3"], "--insecure-http"),
    ],
)
def test_usage_errors_exit_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(words) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""
    assert entry([*words, "--format", "json"]) == 2
    shown = capsys.readouterr()
    assert set(json.loads(shown.out)) == {"error"}
    assert set(json.loads(shown.out)["error"]) == {"code", "message"}


@pytest.mark.parametrize(
    ("error", "code", "exit_code"),
    [
        (errors.UsageError("x"), "usage", 2),
        (errors.BadRequest("x"), "bad_request", 2),
        (errors.NotFound("x"), "not_found", 2),
        (errors.ConfigError("x"), "config", 10),
        (errors.Unauthorized("x"), "unauthorized", 10),
        (errors.BuildFailed("x"), "build_failed", 20),
        (errors.Internal("x"), "internal", 20),
        (ZeroDivisionError("x"), "internal", 20),
        (errors.LocalIOError("x"), "io", 30),
        (OSError(28, "No space left on device"), "io", 30),
        (errors.NetworkError("x"), "network", 40),
        (errors.ServiceUnavailable("x"), "service_unavailable", 40),
        (errors.RolloutFailed("x"), "rollout_failed", 50),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_exit_codes(error: BaseException, code: str, exit_code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert failure.report(error, ["list"]) == exit_code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("aether: ")
    assert shown.err.count("\n") == 1
    assert failure.report(error, ["list", "--format=json"]) == exit_code
    assert json.loads(capsys.readouterr().out)["error"]["code"] == code


def test_an_error_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    failure.report(errors.NotFound("no app \x1b[2J\x07 here"), [])
    assert capsys.readouterr().err == "aether: no app \\x1b[2J\\x07 here\n"


def test_another_interrupt_while_a_failure_is_told_of_shows_no_stack_trace() -> None:
    program = (
        "import os, signal, sys, aether.cli.failure as failure, aether.cli.main as main\n"
        "failure.wants_json = lambda given: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.argv = ['aether', 'nonsense']\n"
        "main.entry()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""


def loaded(*words: str, environ: dict[str, str] | None = None) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", AETHER, *words],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **(environ or {})},
    )  # fmt: skip
    return set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE))


def at_start() -> set[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "pass"], capture_output=True, text=True, check=True
    )
    return set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE))


def test_help_loads_nothing_but_its_table() -> None:
    assert loaded("--help") - at_start() == {"aether", "aether.cli", "aether.cli.main"}


def test_list_stays_light(tmp_path: Path) -> None:
    environ = {
        "XDG_CACHE_HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path),
        "AETHER_API_BASE": "http://127.0.0.1:9",
    }
    found = loaded("list", environ=environ)
    ours = {name for name in found if name.startswith("aether")}
    assert ours == {
        "aether", "aether.cli", "aether.cli.main", "aether.cli.arguments", "aether.cli.context", "aether.cli.log",
        "aether.cli.output", "aether.cli.list", "aether.cli.failure", "aether.cli.interrupts", "aether.client",
        "aether.client.api", "aether.client.failures",
        "aether.client.dial", "aether.client.session", "aether.client.transport", "aether.model",
        "aether.model.errors",
    }  # fmt: skip
    assert not found & {
        "typing", "dataclasses", "inspect", "asyncio", "logging", "importlib.metadata", "tomllib", "subprocess",
        "shutil", "tempfile", "pathlib", "threading", "rich", "msgspec", "httpx", "aiohttp", "encodings.idna",
    }  # fmt: skip


def test_only_what_works_on_a_data_directory_reaches_the_servers_side() -> None:
    folder = Path(str(importlib.import_module("aether.cli").__path__[0]))
    server = re.compile(
        r"aether\.(topology|settings|api|apps|backup|registry|rollout|edge|runtimes|stores|observability)\b"
    )
    reaching = {path.name for path in folder.glob("*.py") if server.search(path.read_text())}
    # login needs to know where a local server keeps its credential, and nothing else
    assert reaching == {"up.py", "doctor.py", "login.py", "backup.py", "restore.py"}
    assert set(server.findall((folder / "login.py").read_text())) == {"settings"}
