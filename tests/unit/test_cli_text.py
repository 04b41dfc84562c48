"""What the command line reads and writes: names, variables, releases, tables, safe text, completions."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.cli import completions
from aether.cli.arguments import Arguments, seconds
from aether.cli.contents import listing
from aether.cli.interrupts import Interrupts, Terminated
from aether.cli.logs import text as log_text
from aether.cli.main import verbs
from aether.cli.output import escape, fields, size, table
from aether.cli.project import app_of, variables
from aether.cli.releases import find
from aether.cli.rollback import choose
from aether.model.errors import AetherError, BadRequest, ConfigError, NotFound, UsageError


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"aether.toml": 'app = "shop"', "package.json": '{"name": "other"}'}, "shop"),
        ({"package.json": '{"name": "@acme/My_Shop"}'}, "my-shop"),
        ({"pyproject.toml": '[project]\nname = "Blue.Shop"'}, "blue-shop"),
        ({"requirements.txt": "flask"}, "my-folder"),
        ({"package.json": "{}"}, "my-folder"),
    ],
)
def test_the_app_of_a_folder(tmp_path: Path, files: dict[str, str], name: str) -> None:
    folder = tmp_path / "My Folder"
    folder.mkdir()
    for path, content in files.items():
        (folder / path).write_text(content)
    assert app_of(Arguments(), str(folder)) == name
    assert app_of(Arguments(app="given"), str(folder)) == "given"


def test_no_app_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--app"):
        app_of(Arguments(), str(tmp_path))
    with pytest.raises(BadRequest):
        app_of(Arguments(app="No Good"), str(tmp_path))
    (tmp_path / "aether.toml").write_text("app = ")
    with pytest.raises(ConfigError, match=r"aether\.toml"):
        app_of(Arguments(), str(tmp_path))
    (tmp_path / "aether.toml").unlink()
    (tmp_path / "package.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"package\.json"):
        app_of(Arguments(), str(tmp_path))


def test_variables() -> None:
    environ = {"FROM_HERE": "secret"}
    given = ["A=1", "B=", "C=x=y", "FROM_HERE"]
    assert variables(given, environ) == {"A": "1", "B": "", "C": "x=y", "FROM_HERE": "secret"}
    for bad in ("=x", "1A=x", "A-B=x", "Ä=x", "A\0=x", "A=x\0", "MISSING", ""):
        with pytest.raises(UsageError):
            variables([bad], environ)


def release(version: int, digest: str, status: str = "superseded") -> Any:
    return {"version": version, "digest": digest * 8, "deployment_id": f"dep-{version}", "status": status}


RELEASES = [
    release(4, "aaaabbbb"), release(3, "aaaacccc", "active"), release(2, "12345678"), release(1, "aaaabbbb"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("to", "version"),
    [("v2", 2), ("V2", 2), ("2", 2), ("dep-1", 1), ("aaaacccc", 3), ("AAAABBB", 4), ("12345678", 2), ("1234567", 2)],
)
def test_naming_a_release(to: str, version: int) -> None:
    assert find(RELEASES, to, "shop")["version"] == version


@pytest.mark.parametrize(
    ("to", "kind"),
    [
        ("v9", NotFound), ("dep-9", NotFound), ("abcdef0", NotFound), ("abc", UsageError), ("latest", UsageError),
        ("v", UsageError), ("", UsageError), ("f" * 65, UsageError),
    ],
)  # fmt: skip
def test_naming_no_release(to: str, kind: type[AetherError]) -> None:
    with pytest.raises(kind):
        find(RELEASES, to, "shop")


def test_a_digest_that_fits_several_artifacts_is_refused() -> None:
    with pytest.raises(UsageError, match="2 artifacts"):
        find([release(2, "aaaaaaab"), release(1, "aaaaaaac")], "aaaaaaa", "shop")


def test_the_release_before_the_active_one() -> None:
    assert choose(RELEASES, None, "shop")["version"] == 2
    with pytest.raises(UsageError, match="no earlier release"):
        choose([release(1, "aaaabbbb", "active")], None, "shop")
    with pytest.raises(UsageError, match="no earlier release"):
        choose([], None, "shop")


@given(st.text())
def test_escaped_text_cannot_steer_a_terminal(text: str) -> None:
    shown = escape(text)
    for character in shown:
        point = ord(character)
        assert point >= 0x20
        assert not 0x7F <= point < 0xA0
        assert character not in "\u202e\u2066\u200f\ufeff\u2028"
    shown.encode()
    if text.isprintable() and text.isascii():
        assert shown == text


def test_what_stays_and_what_is_escaped() -> None:
    assert escape("grün ✓ 日本") == "grün ✓ 日本"
    assert escape("a\tb\nc\x1b[31m", keep="\t") == "a\tb\\nc\\x1b[31m"
    assert escape("\u202eevil") == "\\u202eevil"
    assert table(("A", "LONG"), [("x\ny", None), (1, "")]) == "A     LONG\nx\\ny  -\n1     -"
    assert table(("A",), []) == "A"
    assert fields([("a", 1), ("long", "x"), ("none", None)]) == "a     1\nlong  x"


def test_log_lines() -> None:
    line: Any = {
        "time": "2026-01-02T03:04:05.000006Z", "stream": "stderr", "line": "\x1b[31mred\tx", "app": "a",
        "release": None, "deployment_id": "a-00000001", "digest": "0",
        "process": "web", "instance": "0123456789abcdef",
    }  # fmt: skip
    assert log_text(line, True) == "2026-01-02T03:04:05.000006Z ~00000001 web.89abcdef ! \\x1b[31mred\tx"
    assert log_text({**line, "release": 3}, False) == "2026-01-02T03:04:05.000006Z v3 web.89abcdef ! \x1b[31mred\tx"


def test_times_and_sizes() -> None:
    assert [seconds(text) for text in ("90", "90s", "5m", "1h")] == [90, 90, 300, 3600]
    for bad in ("0", "-1", "s", "1.5", "25h", "x", ""):
        with pytest.raises(Exception, match="is not a time"):
            seconds(bad)
    assert [size(n) for n in (0, 999, 1000, 1_500_000, 2_000_000_000)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.5 MB",
        "2.0 GB",
    ]


def test_a_signal_waits_while_it_is_held_and_a_second_does_not() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        interrupts.hold()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.release()
        interrupts.hold()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupts.release()
        interrupts.release()
    assert signal.getsignal(signal.SIGTERM) is before


def test_contents_of_an_artifact_of_many_members() -> None:
    import gzip

    def tar(files: dict[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        raw = buffer.getvalue()
        return b"".join(gzip.compress(raw[at : at + 700]) for at in range(0, len(raw), 700))

    before, after = listing(tar({"a": b"1", "b": b"2"})), listing(tar({"a": b"1", "b": b"3", "c": b""}))
    assert before["a"] == after["a"]
    assert before["b"] != after["b"]
    assert set(after) == {"a", "b", "c"}
    with pytest.raises(AetherError, match="cannot be read"):
        listing(b"not an artifact")
    with pytest.raises(AetherError, match="cannot be read"):
        listing(tar({"a": b"1" * 5000})[:-40])


def complete(script: Path, *words: str) -> set[str]:
    """What bash would offer for the last word."""
    quoted = " ".join(f"'{word}'" for word in words)
    run = f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _aether; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True, check=True, cwd=script.parent)
    return set(done.stdout.split())


def test_bash_completes(tmp_path: Path) -> None:
    script = tmp_path / "aether.bash"
    script.write_text(completions.bash(completions.commands()))
    (tmp_path / "folder").mkdir()
    assert set(verbs()) <= complete(script, "aether", "")
    assert complete(script, "aether", "dep") == {"deploy"}
    assert complete(script, "aether", "--log-level", "de") == {"debug"}
    assert complete(script, "aether", "--log-level", "debug", "roll") == {"rollback"}
    assert complete(script, "aether", "deploy", "--dry") == {"--dry-run"}
    assert complete(script, "aether", "deploy", "fol") == {"folder"}
    assert complete(script, "aether", "list", "--format", "") == {"text", "json"}
    assert complete(script, "aether", "apps", "de") == {"delete"}
    assert complete(script, "aether", "apps", "delete", "--y") == {"--yes"}
    assert complete(script, "aether", "config", "set", "--det") == {"--detach"}


@pytest.mark.parametrize("make", [completions.zsh, completions.fish])
def test_other_shells_name_every_verb_and_flag(make: Any) -> None:
    script = make(completions.commands())
    for verb in verbs():
        assert verb in script
    for flag in ("dry-run", "compression-level", "yes", "follow"):
        assert flag in script
