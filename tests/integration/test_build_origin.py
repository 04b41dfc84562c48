"""What git says of a project, asked in the background and waited for no longer than allowed."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from aether.build.origin import GitQuestion, _public  # pyright: ignore[reportPrivateUsage]

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="component: git")


def git(root: Path, *words: str) -> str:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, "-C", root, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repo"
    (root / "app").mkdir(parents=True)
    git(root, "init", "-q", "-b", "trunk")
    (root / "app" / "x").write_text("1")
    (root / "other").write_text("1")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


def test_the_commit_of_a_clean_folder(repository: Path) -> None:
    git(repository, "remote", "add", "origin", "https://user:secret@git.example/x/y.git")
    found = GitQuestion(repository / "app").answer(30)
    assert found is not None
    assert (found.commit, found.branch, found.dirty) == (git(repository, "rev-parse", "HEAD"), "trunk", False)
    assert found.url == "https://git.example/x/y.git"
    resource = found.resource().described()
    assert resource["uri"] == "git+https://git.example/x/y.git@refs/heads/trunk"
    assert resource["digest"] == {"gitCommit": found.commit}


def test_changes_in_the_folder_and_elsewhere(repository: Path) -> None:
    (repository / "other").write_text("2")
    clean = GitQuestion(repository / "app").answer(30)
    (repository / "app" / "new").write_text("2")
    dirty = GitQuestion(repository / "app").answer(30)
    assert clean is not None
    assert dirty is not None
    assert (clean.dirty, dirty.dirty) == (False, True)


def test_no_repository_no_commit_and_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert GitQuestion(tmp_path).answer(30) is None
    git(tmp_path, "init", "-q")
    assert GitQuestion(tmp_path).answer(30) is None
    (tmp_path / ".git" / "HEAD").write_text("damaged")
    assert GitQuestion(tmp_path).answer(30) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert GitQuestion(tmp_path).answer(30) is None


def test_a_git_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}{os.pathsep}{os.environ['PATH']}")
    question = GitQuestion(tmp_path)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        question.answer(0.3)
    assert time.monotonic() - started < 20
    question._thread.join(20)  # pyright: ignore
    assert not question._thread.is_alive()  # pyright: ignore


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("git@github.com:x/y.git", "ssh://github.com/x/y.git"),
        ("ssh://git@host:2222/x.git", "ssh://host:2222/x.git"),
        ("https://token@host/x.git?a=b", "https://host/x.git"),
        ("/srv/git/x.git", None),
        ("../x.git", None),
        ("file:///srv/x.git", None),
    ],
)
def test_remotes_without_credentials(url: str, shown: str | None) -> None:
    assert _public(url) == shown
