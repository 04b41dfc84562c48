"""What the command line and the current folder say about an app: its name, and variables for its environment."""

from __future__ import annotations

import json
import os

from aether.model.errors import ConfigError, UsageError
from aether.model.names import app_name_from, check_app_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from aether.cli.arguments import Arguments


def app_of(arguments: Arguments, folder: str = ".") -> str:
    """`--app`, else the name in the folder's aether.toml, package.json or pyproject.toml.

    Raises BadRequest for an impossible name, UsageError when nothing names an app, ConfigError for a broken file.
    """
    if arguments.app:
        return check_app_name(arguments.app)
    if name := named_in(folder):
        return name
    raise UsageError("which app? Give --app NAME, or call it in a folder with an aether.toml or package.json")


def named_in(folder: str) -> str:
    """The app that the files of `folder` name; empty when none does. Raises ConfigError."""
    settings = _toml(os.path.join(folder, "aether.toml"))
    if name := settings.get("app"):
        return check_app_name(str(name))
    package = _json(os.path.join(folder, "package.json"))
    if name := app_name_from(str(package.get("name") or "")):
        return name
    described = _toml(os.path.join(folder, "pyproject.toml")).get("project")
    if isinstance(described, dict):
        table: dict[str, Any] = {**described}
        if name := app_name_from(str(table.get("name") or "")):
            return name
    # a project that has none of these names is still called after its folder by `deploy`
    markers = ("aether.toml", "package.json", "pyproject.toml", "requirements.txt", "Procfile", "index.html")
    if any(os.path.exists(os.path.join(folder, marker)) for marker in markers):
        return app_name_from(os.path.basename(os.path.abspath(folder)))
    return ""


def _toml(path: str) -> dict[str, Any]:
    content = _read(path)
    if content is None:
        return {}
    import tomllib

    try:
        return tomllib.loads(content.decode())
    except ValueError as error:
        raise ConfigError(f"{os.path.basename(path)}: {error}") from error


def _json(path: str) -> dict[str, Any]:
    content = _read(path)
    if content is None:
        return {}
    try:
        found: Any = json.loads(content)
    except ValueError as error:
        raise ConfigError(f"{os.path.basename(path)}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{os.path.basename(path)} must be a JSON object")
    table: dict[str, Any] = {**found}
    return table


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def variables(given: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """`K=V` texts as a mapping; a bare `K` takes its value from `environ`, so that a secret need not be typed.

    Raises UsageError.
    """
    found: dict[str, str] = {}
    for text in given:
        name, has_value, value = text.partition("=")
        check_variable(name)
        if not has_value:
            if name not in environ:
                raise UsageError(f"{name} has no value: write {name}=VALUE, or set it in this environment")
            value = environ[name]
        if "\0" in value:
            raise UsageError(f"the value of {name} holds a zero byte")
        found[name] = value
    return found


def check_variable(name: str) -> str:
    """Return `name` if it may name an environment variable; raises UsageError."""
    if not name.isascii() or not name.replace("_", "a").isalnum() or name[0].isdigit():
        raise UsageError(f"'{name}' cannot name a variable: use letters, digits and '_', not starting with a digit")
    return name
