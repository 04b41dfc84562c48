"""What a project with kind = "function" says of it: the fields of the API, from `[function]` and the folder."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aether.build.config import Table, text_of
from aether.model.errors import BadRequest, ConfigError
from aether.model.function import define

_WHERE = "aether.toml [function]"
_MAINS: Mapping[str, tuple[str, ...]] = {
    "node": ("server.js", "server.mjs", "server.cjs", "index.js", "index.mjs", "index.cjs"),
    "python": ("main.py", "app.py", "server.py"),
}


def language_of(root: Path, table: Table, wanted: str | None, package: Table | None) -> str:
    """The name of the function's runtime: `[function] runtime`, else that of `wanted` (node22), else what lies in the
    folder. Raises ConfigError."""
    if (named := text_of(table, "runtime", _WHERE)) is not None:
        return named
    for language in _MAINS:
        if wanted is not None and wanted.startswith(language):
            return language
    if package is not None:
        return "node"
    if (root / "requirements.txt").is_file() or (root / "pyproject.toml").is_file():
        return "python"
    for language, mains in _MAINS.items():
        if any((root / name).is_file() for name in mains):
            return language
    raise ConfigError(f'{_WHERE}: which language? Write runtime = "node" or runtime = "python"')


def fields_of(root: Path, name: str, language: str, table: Table, package: Table | None) -> dict[str, Any]:
    """Fields in the words of the API: those that are written, the runtime and the entrypoint. Raises ConfigError."""
    for key in ("name", "env_vars"):
        if key in table:
            instead = "app" if key == "name" else "the table [env]"
            raise ConfigError(f"{_WHERE}: '{key}' is said with {instead}")
    entrypoint = text_of(table, "entrypoint", _WHERE) or _entrypoint(root, language, package)
    fields = {**table, "runtime": language, "entrypoint": entrypoint}
    try:
        made = asdict(define({"name": name, **fields}))
    except BadRequest as error:
        raise ConfigError(f"{_WHERE}: {error.message}") from error
    return {key: made[key] for key in fields}


def _entrypoint(root: Path, language: str, package: Table | None) -> str:
    scripts = (package or {}).get("scripts")
    built = isinstance(scripts, dict) and "build" in scripts
    main = text_of(package, "main", "package.json") if package and language == "node" else None
    # what a build makes is not there yet
    if main is not None and (built or (root / main).is_file()):
        return main.removeprefix("./")
    for name in _MAINS.get(language, ()):
        if (root / name).is_file():
            return name
    raise ConfigError(f'{_WHERE}: which file is run? Write entrypoint = "FILE"')
