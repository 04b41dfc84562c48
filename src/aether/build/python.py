"""Python projects: dependencies installed by pip into a cached folder and packed as `.aether/python`.

The server puts that folder on PYTHONPATH and its `bin` on PATH. Wheels are chosen for the interpreter that installs
them, so they fit Linux and that minor version of Python.
"""

import base64
import csv
import hashlib
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from aether.artifact.tree import DIRECTORY, Entry, scan
from aether.build import cache
from aether.build.command import run
from aether.build.config import read_text, read_toml, table_of
from aether.build.ignore import Selection, select
from aether.build.project import OnLine, Options
from aether.build.tools import Tool, find_tool
from aether.model.errors import ConfigError

_LAYOUT = 2
PREFIX = b".aether/python"
_INCLUDE = re.compile(r"\s*(?:-r|--requirement|-c|--constraint)[\s=]+(\S+)")
_LOCAL = re.compile(r"\s*(?:-e\b|--editable\b|\.{0,2}/|\.\s*$|file:)|.*@\s*file:")
_SHEBANG = re.compile(rb"\A#!(?:[^\n]*python[^\n]*|/bin/sh\n'''exec'[^\n]*python[^\n]*\n' ''')\n")

REPORT = "pip-report.json"
"""Lies beside the packages and tells where pip got each one from."""
_REPORTS_SINCE = (22, 2)

_COMPILE = """
import compileall, py_compile, sys
compileall.compile_dir(sys.argv[1], quiet=2, workers=0, stripdir=sys.argv[1], prependdir='/app/.aether/python',
                       invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
"""


@dataclass(frozen=True, slots=True)
class PythonProject:
    """What an installation needs to know of a project."""

    root: Path
    requirements: Path | None
    """A requirements file of the project."""
    listed: tuple[str, ...]
    """Requirements from pyproject.toml, when there is no file."""
    files: tuple[Path, ...]
    """The requirements file and those it includes."""
    local: bool
    """True when a requirement lies in the project, so that what is installed depends on more than these files."""

    @property
    def depends(self) -> bool:
        return self.requirements is not None or bool(self.listed)


def read_project(root: Path) -> PythonProject:
    """Read requirements.txt or pyproject.toml. Raises ConfigError."""
    requirements = root / "requirements.txt"
    if requirements.is_file():
        files: list[Path] = []
        local = _follow(root, requirements, files)
        return PythonProject(root, requirements, (), tuple(files), local)
    table = read_toml(root / "pyproject.toml") or {}
    project = table_of(table, "project", "pyproject.toml")
    if not project and "poetry" in table_of(table, "tool", "pyproject.toml"):
        raise ConfigError(
            "pyproject.toml lists its dependencies for Poetry only: run 'poetry export --output requirements.txt' "
            "and keep that file with the project"
        )
    value: object = project.get("dependencies", [])
    listed = cast(list[object], value) if isinstance(value, list) else [None]
    texts = tuple(one for one in listed if isinstance(one, str))
    if len(texts) != len(listed):
        raise ConfigError("pyproject.toml [project]: 'dependencies' must be a list of strings")
    return PythonProject(root, None, texts, (), any(_LOCAL.match(text) for text in texts))


def _follow(root: Path, path: Path, files: list[Path]) -> bool:
    """Collect `path` and what it includes into `files`; True when a requirement is local."""
    text = read_text(path)
    if text is None:
        raise ConfigError(f"a requirements file includes '{os.path.relpath(path, root)}', which is not there")
    files.append(path)
    local = False
    for line in text.splitlines():
        include = _INCLUDE.match(line)
        if include and "://" not in include.group(1):
            other = Path(os.path.normpath(path.parent / include.group(1)))
            if other not in files:
                local = _follow(root, other, files) or local
        elif _LOCAL.match(line):
            local = True
    return local


def steps_of(project: PythonProject) -> list[str]:
    """The commands that would run, for people."""
    if not project.depends:
        return []
    what = "-r requirements.txt" if project.requirements else " ".join(project.listed)
    return [f"python3 -m pip install --target .aether/python {what}"]


def install(project: PythonProject, options: Options, on_line: OnLine | None) -> tuple[Selection, bool]:
    """Install dependencies; returns what to pack and whether nothing had to run.

    Raises BuildFailed with pip's own last lines, ConfigError when there is no Python or no pip, LocalIOError.
    """
    found = select_own(project.root)
    if not project.depends:
        return found, True
    python = find_tool("python3")
    if python is None:
        raise ConfigError("python3 is not on PATH: install Python to install the project's dependencies")
    key = cache.key_of(
        {
            "layout": _LAYOUT,
            "python": [python.argv[0], python.version],
            "host": [platform.system(), platform.machine(), list(platform.libc_ver())],
            "files": [[str(path.relative_to(project.root) if path.is_relative_to(project.root) else path),
                       cache.digest_file(path)] for path in project.files],
            "listed": project.listed,
        }
    )  # fmt: skip

    def make(folder: Path) -> None:
        _install_into(folder, project, python, options, on_line)

    def waiting() -> None:
        if on_line is not None:
            on_line("waiting for another deploy that installs the same dependencies")

    folder, hit = cache.obtain(key, make, fresh=project.local or not options.cache, waiting=waiting)
    found.entries.append(Entry(PREFIX, b"", DIRECTORY))
    found.entries += scan(folder / "python", PREFIX + b"/")
    return found, hit


def select_own(root: Path) -> Selection:
    """The project's own files, without what belongs to this machine."""
    return select(root, extra=_machine_folders(root))


def _machine_folders(root: Path) -> list[tuple[bytes, str]]:
    """Folders that belong to this machine: virtual environments and bytecode."""
    found: list[tuple[bytes, str]] = []
    for base, folders, _ in os.walk(os.fsencode(root)):
        prefix = b"" if base == os.fsencode(root) else os.path.relpath(base, os.fsencode(root)) + b"/"
        for name in list(folders):
            if os.path.isfile(os.path.join(base, name, b"pyvenv.cfg")):
                found.append((prefix + name, "a virtual environment of this machine"))
            elif name == b"__pycache__":
                found.append((prefix + name, "bytecode of this machine"))
            elif not name.startswith(b".git") and name != b"node_modules":
                continue
            folders.remove(name)
    return found


def _install_into(
    folder: Path, project: PythonProject, python: Tool, options: Options, on_line: OnLine | None
) -> None:
    target = folder / "python"
    argv = [*python.argv, "-m", "pip", "install", "--target", str(target), "--no-compile", "--no-input"]
    argv += ["--disable-pip-version-check", "--no-warn-script-location", "--no-user", "--progress-bar", "off"]
    argv += ["-r", str(project.requirements)] if project.requirements else list(project.listed)
    env = {"PYTHONHASHSEED": "0", "PIP_ROOT_USER_ACTION": "ignore", "PYTHONNOUSERSITE": "1"}
    env |= {"PYTHONPATH": "", "PIP_REQUIRE_VIRTUALENV": "0"}
    if _reports(python):
        argv += ["--report", str(folder / REPORT)]
    if on_line is not None:
        on_line("$ pip install")
    run(argv, project.root, what="pip install", timeout_s=options.timeout_s, on_line=on_line, env=env)
    target.mkdir(exist_ok=True)
    _record_anew(target, _free_scripts(target / "bin"))
    # bytecode that is checked neither by time nor by content loads from a read-only release at full speed;
    # files that do not compile (templates, other versions of Python) are left to the program that imports them
    compile_all = [*python.argv, "-c", _COMPILE, str(target)]
    run(compile_all, folder, what="compiling Python", timeout_s=options.timeout_s, env=env)


def _reports(python: Tool) -> bool:
    """Whether pip can write down where it got everything from."""
    pip = find_tool("pip", (*python.argv, "-m", "pip"))
    numbers = re.match(r"(\d+)\.(\d+)", pip.version) if pip else None
    return numbers is not None and (int(numbers.group(1)), int(numbers.group(2))) >= _REPORTS_SINCE


def _free_scripts(folder: Path) -> list[Path]:
    """Let installed programs run with whatever python3 the server has: their first line names this machine's.

    Returns those that were changed.
    """
    changed: list[Path] = []
    if not folder.is_dir():
        return changed
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        if _SHEBANG.match(content):
            path.write_bytes(_SHEBANG.sub(b"#!/usr/bin/env python3\n", content, count=1))
            changed.append(path)
    return changed


def _record_anew(target: Path, changed: list[Path]) -> None:
    """Write the hashes of changed programs into the RECORDs that list them, so that they hold for what is packed."""
    names = {path.name: path for path in changed}
    if not names:
        return
    for record in target.glob("*.dist-info/RECORD"):
        with record.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        again = False
        for row in rows:
            folder, _, name = row[0].rpartition("/") if row else ("", "", "")
            if len(row) == 3 and folder in ("bin", "../../bin") and name in names:
                content = names[name].read_bytes()
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                row[1:] = [f"sha256={digest}", str(len(content))]
                again = True
        if again:
            with record.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
