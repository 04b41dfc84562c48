"""What is packed and why the rest is not."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aether.artifact.tree import show
from aether.build.ignore import Rules, select, select_modules
from aether.model.errors import ConfigError

PEM = "-----BEGIN RSA PRIVATE KEY-----\nabc\n"


def write(root: Path, *names: str, **content: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content.get("text", ""))


def names(root: Path, **options: object) -> set[str]:
    return {show(entry.name) for entry in select(root, **options).entries if entry.kind != "d"}  # pyright: ignore


def reasons(root: Path, **options: object) -> dict[str, str]:
    return {item.path: item.reason for item in select(root, **options).excluded}  # pyright: ignore


def test_secrets_and_version_control_are_never_packed(tmp_path: Path) -> None:
    write(tmp_path, ".git/config", ".env", ".env.production", "sub/.env.local", "server.js", "public.key", "cert.pem")
    write(tmp_path, "server.key", "deep/x.pem", "id_rsa", "id_ed25519", "id_rsa.pub", text=PEM)
    write(tmp_path, ".npmrc", text="//host/:_authToken=x")
    write(tmp_path, "sub/.npmrc", text="save-exact=true")
    write(tmp_path, "node_modules/lib/.env", "node_modules/lib/test.pem", "node_modules/.cache/x", text=PEM)
    write(tmp_path, f"app-{'0' * 64}.tar.gz", ".aether/state")
    assert names(tmp_path) == {
        "server.js",
        "public.key",
        "cert.pem",
        "id_rsa.pub",
        "sub/.npmrc",
        "node_modules/lib/.env",
        "node_modules/lib/test.pem",
    }
    found = reasons(tmp_path)
    assert set(found) == {
        ".git/",
        ".env",
        ".env.production",
        "sub/.env.local",
        "server.key",
        "deep/x.pem",
        "id_rsa",
        "id_ed25519",
        ".npmrc",
        "node_modules/.cache/",
        f"app-{'0' * 64}.tar.gz",
        ".aether/",
    }
    assert found["server.key"] == "private key"
    assert "secrets" in found[".env"]


def test_aetherignore_cannot_bring_secrets_back(tmp_path: Path) -> None:
    write(tmp_path, ".env", "a.js")
    write(tmp_path, ".aetherignore", text="!.env\n")
    assert names(tmp_path) == {"a.js", ".aetherignore"}


def test_gitignore_counts_except_for_built_output_and_modules(tmp_path: Path) -> None:
    write(tmp_path, "src/a.ts", "dist/a.js", "dist/debug.log", "coverage/x", "node_modules/m/i.js", "npm-debug.log")
    write(tmp_path, ".next/server/x.js", ".next/cache/big", "public/build/y", "keep.log", "sub/out.txt", "sub/in.txt")
    write(tmp_path, ".gitignore", text="dist\nnode_modules/\ncoverage\n*.log\n!keep.log\n.next\n/public/build\n")
    write(tmp_path, "sub/.gitignore", text="out.txt\n")
    assert names(tmp_path) == {
        ".gitignore",
        "sub/.gitignore",
        "src/a.ts",
        "dist/a.js",
        "dist/debug.log",
        "node_modules/m/i.js",
        "keep.log",
        "sub/in.txt",
        ".next/server/x.js",
        "public/build/y",
    }
    assert reasons(tmp_path) == {
        "coverage/": ".gitignore: coverage",
        "npm-debug.log": ".gitignore: *.log",
        "sub/out.txt": "sub/.gitignore: out.txt",
        ".next/cache/": "build cache",
    }


def test_aetherignore_counts_everywhere(tmp_path: Path) -> None:
    write(
        tmp_path, "a.md", "dist/b.md", "node_modules/m/readme.md", "node_modules/m/i.js", "docs/keep.md", "docs/x/y"
    )
    write(tmp_path, ".aetherignore", text="# a comment\n*.md\n!docs/keep.md\ndocs/x/\n")
    assert names(tmp_path) == {".aetherignore", "node_modules/m/i.js", "docs/keep.md"}
    found = reasons(tmp_path)
    assert found["node_modules/m/readme.md"] == ".aetherignore: *.md"
    assert found["docs/x/"] == ".aetherignore: docs/x/"


def test_replaced_folders_are_said_so(tmp_path: Path) -> None:
    write(tmp_path, "node_modules/m/i.js", "packages/a/node_modules/n/i.js", "packages/a/i.js")
    replaced = [b"node_modules", b"packages/a/node_modules"]
    assert names(tmp_path, replaced=replaced) == {"packages/a/i.js"}
    assert set(reasons(tmp_path, replaced=replaced)) == {"node_modules/", "packages/a/node_modules/"}


def test_installed_modules_leave_out_notes_of_their_manager(tmp_path: Path) -> None:
    write(tmp_path / "cache", "m/i.js", ".cache/x", ".modules.yaml", "m/node_modules/.cache/y", "m/.cache/stays")
    found = select_modules(tmp_path / "cache", b"node_modules", tmp_path)
    files = {show(entry.name) for entry in found.entries if entry.kind == "f"}
    assert files == {"node_modules/m/i.js", "node_modules/m/.cache/stays"}
    assert {item.path for item in found.excluded} == {
        "node_modules/.cache/",
        "node_modules/.modules.yaml",
        "node_modules/m/node_modules/.cache/",
    }


def test_empty_folders_and_links_are_kept(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    assert {(entry.name, entry.kind) for entry in select(tmp_path).entries} == {(b"empty", "d"), (b"link", "l")}


def test_a_socket_is_refused_unless_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("app.sock")
        with pytest.raises(ConfigError, match=r"'app\.sock' is a socket.*\.aetherignore"):
            select(tmp_path)
        write(tmp_path, ".aetherignore", text="*.sock\n")
        assert names(tmp_path) == {".aetherignore"}


def test_a_pattern_that_is_none_names_its_line(tmp_path: Path) -> None:
    write(tmp_path, ".aetherignore", text="ok\n!\n")
    with pytest.raises(ConfigError, match=r"\.aetherignore, line 2"):
        select(tmp_path)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    write(tmp_path, ".gitignore", text="*.tmp\n")
    for name in (b"\xff.tmp", b"\xff.js"):
        with open(os.fsencode(tmp_path) + b"/" + name, "wb"):
            pass
    assert names(tmp_path) == {".gitignore", "\\xff.js"}


WORDS = st.sampled_from(["a", "b", "c.log", "d"])
PATTERNS = st.lists(
    st.builds(
        lambda lead, parts, tail: lead + "/".join(parts) + tail,
        st.sampled_from(["", "!", "/", "!/", "**/"]),
        st.lists(st.one_of(WORDS, st.sampled_from(["*", "**", "*.log", "[ab]", "?"])), min_size=1, max_size=3),
        st.sampled_from(["", "/", "/**", "/*", "/**/"]),
    ),
    max_size=5,
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkout")
    parts = ("a", "b", "c.log", "d")
    for first in parts[:2]:
        for second in parts[:2]:
            write(root, *(f"{first}/{second}/{third}" for third in parts))
        write(root, f"{first}/c.log", f"{first}/d")
    write(root, "c.log", "d")
    subprocess.run(["git", "init", "-q", root], check=True)
    return root


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(patterns=PATTERNS)
def test_gitignore_means_what_git_says_it_means(checkout: Path, patterns: list[str]) -> None:
    (checkout / ".gitignore").write_text("\n".join(patterns) + "\n")
    listed = subprocess.run(
        ["git", "-C", checkout, "ls-files", "--others", "--exclude-standard", "-z"], check=True, capture_output=True
    )
    expected = {os.fsdecode(name) for name in listed.stdout.split(b"\0") if name}
    assert names(checkout) == expected


def test_the_last_rule_that_matches_decides() -> None:
    rules = Rules(["*.log", "!a.log", "# note", "", "b/"], "x")
    assert [rules.judge(path) for path in ("x.log", "a.log", "b/", "b", "c")] == [True, False, True, None, None]
