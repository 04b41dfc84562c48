"""What a build is made from, for its provenance: the commit of the project's repository, lockfiles, tools.

Git may take long on a large repository, so it is asked while dependencies are installed and files are packed, and
waited for no longer than the caller says.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit, urlunsplit

from aether.artifact.provenance import Resource
from aether.build.cache import digest_file
from aether.build.project import Prepared
from aether.build.tools import clean_environment, find_tool

_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Commit:
    """Where the project's sources come from. `dirty`: its folder holds changes that are not in the commit."""

    commit: str
    branch: str | None
    url: str | None
    dirty: bool

    def resource(self) -> Resource:
        """The commit as a dependency of a build."""
        name = self.url or "source"
        uri = f"git+{self.url}" + (f"@refs/heads/{self.branch}" if self.branch else "") if self.url else None
        algorithm = "gitCommit"
        return Resource(name, {algorithm: self.commit}, uri=uri, annotations={"dirty": self.dirty})


class GitQuestion:
    """Asks git about the folder `root` in the background; without a repository or git, nothing is asked."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._commit: Commit | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._ended = False
        self._thread: Thread | None = None
        if _in_repository(root) and shutil.which("git"):
            self._thread = Thread(target=self._ask, name="aether-git", daemon=True)
            self._thread.start()

    def answer(self, timeout_s: float) -> Commit | None:
        """The commit; None outside of a repository, or before its first commit. Raises TimeoutError."""
        if self._thread is not None:
            self._thread.join(max(0.0, timeout_s))
            if self._thread.is_alive():
                self.end()
                raise TimeoutError
        return self._commit

    def end(self) -> None:
        """Wait no longer; git is ended."""
        self._ended = True
        for child in self._children:
            child.kill()

    def _ask(self) -> None:
        status = self._run("status", "--porcelain=v2", "--branch", "--untracked-files=normal", "--", ".")
        url = self._run("config", "--get", "remote.origin.url")
        if status is None:
            return
        head = {
            words[1]: words[2]
            for line in status.splitlines()
            if line.startswith("# ") and len(words := line.split()) > 2
        }
        commit = head.get("branch.oid", "")
        if len(commit) not in (40, 64) or not _HEX.issuperset(commit):
            return
        branch = head.get("branch.head", "")
        self._commit = Commit(
            commit=commit,
            branch=None if branch in ("", "(detached)") else branch,
            url=_public(url.strip()) if url else None,
            dirty=any(not line.startswith("#") for line in status.splitlines()),
        )

    def _run(self, *words: str) -> str | None:
        """What git prints; None when it fails. It writes nothing and starts no helper of the repository's own."""
        environment = {**clean_environment(), "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
        try:
            child = subprocess.Popen(
                ["git", "-c", "core.fsmonitor=false", "-C", str(self._root), *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError:
            return None
        self._children.append(child)
        if self._ended:
            child.kill()
        output, _ = child.communicate()
        return output.decode("utf-8", "replace") if child.returncode == 0 else None


def _in_repository(root: Path) -> bool:
    return any((folder / ".git").exists() for folder in (root, *root.parents))


def _public(url: str) -> str | None:
    """A remote's address as https or ssh, without user and password; None for a folder of this machine."""
    if "://" not in url and ":" in url and not url.startswith((".", "/")):
        host, _, path = url.partition(":")
        url = f"ssh://{host}/{path}"
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        if parts.port:
            host += f":{parts.port}"
    except ValueError:
        return None
    if parts.scheme not in ("https", "http", "ssh", "git") or not host:
        return None
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def inputs(prepared: Prepared) -> Iterator[Resource]:
    """The files that say which dependencies are installed."""
    from aether.build.node_project import NodeProject
    from aether.build.python import PythonProject

    root, described = prepared.plan.project.root, prepared.described
    names: list[str] = []
    if isinstance(described, NodeProject):
        lock = described.manager.lock if described.manager else None
        names = [*([lock] if lock else []), "package.json"]
    elif isinstance(described, PythonProject):
        files = [os.path.relpath(path, root) for path in described.files] or ["pyproject.toml"]
        names = [name for name in files if not name.startswith("..")]
    for name in names:
        digest = digest_file(root / name)
        if digest is not None:
            yield Resource(name, {"sha256": digest})


def versions(prepared: Prepared) -> dict[str, str]:
    """The tools that took part."""
    from aether.build.node_project import NodeProject

    kind, described = prepared.plan.project.kind, prepared.described
    found: dict[str, str] = {}
    tool = find_tool({"node": "node", "python": "python3"}[kind]) if kind in ("node", "python") else None
    if tool is not None:
        found[tool.name] = tool.version
    if isinstance(described, NodeProject) and described.manager is not None:
        found[described.manager.name] = described.manager.tool.version
    return found
