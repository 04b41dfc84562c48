"""Tools on the developer's PATH and their versions, remembered by path, size and time: asking costs nothing."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from aether.model.errors import ConfigError

_VERSION = re.compile(r"\d+\.\d+(?:\.\d+)?[0-9A-Za-z.+-]*")
_ERROR = re.compile(r"\s*(\w*Error\b|error\b|fatal\b)", re.IGNORECASE)
"""How Node.js and most tools begin the line that tells what is wrong; a stack trace comes after it."""
_PATIENCE_S = 60


@dataclass(frozen=True, slots=True)
class Tool:
    """A program: how it is called and its version, e.g. "20.11.1"."""

    name: str
    argv: tuple[str, ...]
    version: str


def cache_home() -> Path:
    """The user's cache folder of Aether: ${XDG_CACHE_HOME:-~/.cache}/aether."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "aether"


def clean_environment() -> dict[str, str]:
    """This process's environment for tools and install scripts: nothing of Aether's own, no prompts."""
    found = {key: value for key, value in os.environ.items() if not key.upper().startswith("AETHER_")}
    found["COREPACK_ENABLE_DOWNLOAD_PROMPT"] = "0"
    found.setdefault("NO_UPDATE_NOTIFIER", "1")
    return found


def find_tool(name: str, argv: tuple[str, ...] | None = None, cwd: Path | None = None) -> Tool | None:
    """The tool `name` on PATH (or called as `argv`), None if absent. Raises ConfigError if it does not work.

    `cwd` matters to tools that pick their version by project; it becomes part of what is remembered.
    """
    program = shutil.which(argv[0] if argv else name)
    if program is None:
        return None
    command = (program, *argv[1:]) if argv else (program,)
    key = _identity(command, cwd)
    known = _load()
    version = known.get(key)
    if version is None:
        version = _ask(name, command, cwd)
        known[key] = version
        _save(known)
    return Tool(name, command, version)


def _identity(command: tuple[str, ...], cwd: Path | None) -> str:
    parts = [*command, str(cwd or "")]
    for path in command:
        try:
            found = os.stat(path)
        except OSError:
            continue
        parts.append(f"{os.path.realpath(path)}:{found.st_size}:{found.st_mtime_ns}:{found.st_ino}")
    return "|".join(parts)


def _ask(name: str, command: tuple[str, ...], cwd: Path | None) -> str:
    try:
        done = subprocess.run(
            [*command, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE_S,
            cwd=cwd,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"'{' '.join(command)} --version' does not run: {error}") from error
    found = _VERSION.search(done.stdout)
    if done.returncode != 0 or found is None:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        telling = next((line.strip() for line in said if _ERROR.match(line)), said[-1] if said else "nothing")
        remedy = f"; without corepack: npm install -g {name}" if Path(command[0]).name == "corepack" else ""
        raise ConfigError(f"{name} does not work: '{' '.join(command)} --version' said: {telling}{remedy}")
    return found.group()


def _store() -> Path:
    return cache_home() / "tools.json"


def _load() -> dict[str, str]:
    try:
        value: object = json.loads(_store().read_bytes())
    except (OSError, ValueError):
        return {}
    return cast(dict[str, str], value) if isinstance(value, dict) else {}


def _save(known: dict[str, str]) -> None:
    path = _store()
    part = path.with_name(f".tools-{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(dict(list(known.items())[-64:])), encoding="utf-8")
        part.replace(path)
    except OSError:
        # only speed is lost: the version is asked for again next time
        part.unlink(missing_ok=True)
