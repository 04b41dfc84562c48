"""Reading a Node.js project: workspaces, local dependencies, install scripts, whether it builds. Runs nothing."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from aether.build.config import Table, read_json, read_text, table_of
from aether.build.managers import Manager, choose_manager
from aether.build.project import Options
from aether.model.errors import ConfigError

LIFECYCLE = ("preinstall", "install", "postinstall", "prepublish", "preprepare", "prepare", "postprepare")
"""The scripts of a package that an installation of it runs, in their order."""

_DEPENDENCIES = ("dependencies", "devDependencies", "optionalDependencies", "peerDependencies")
_LOCAL = ("file:", "link:", "portal:", "./", "../", "~/")


@dataclass(frozen=True, slots=True)
class NodeProject:
    """What an installation needs to know of a project."""

    root: Path
    package: Table
    manager: Manager | None
    """None when there is nothing to install and nothing to run."""
    workspaces: tuple[str, ...]
    """Folders of workspaces and of local dependencies, relative with '/'."""
    tarballs: tuple[str, ...]
    """Local dependencies that are files."""
    copied: tuple[str, ...]
    """Folders of local dependencies of which yarn and pnpm install a copy, where npm makes a link."""
    lifecycle: tuple[tuple[str, str], ...]
    """The project's own install scripts to run: (folder, script)."""
    builds: bool
    has_dev: bool

    @property
    def stages(self) -> bool:
        return self.builds or bool(self.lifecycle)

    @property
    def depends(self) -> bool:
        """True when there is something to install."""
        return bool(self.workspaces) or any(self.package.get(field) for field in _DEPENDENCIES)

    @property
    def module_folders(self) -> tuple[str, ...]:
        """Folders that an installation may provide."""
        return ("node_modules", *(f"{folder}/node_modules" for folder in self.workspaces))


def read_project(root: Path, options: Options) -> NodeProject:
    """Read package.json and its kin. Raises ConfigError."""
    package = read_json(root / "package.json") or {}
    manifests = {".": package}
    tarballs: set[str] = set()
    copied: set[str] = set()
    pending = ["."]
    for folder in _workspaces(root, package):
        manifests[folder] = read_json(root / folder / "package.json") or {}
        pending.append(folder)
    while pending:
        folder = pending.pop()
        for local, linked in _local_dependencies(root, folder, manifests[folder]):
            if (root / local).is_file():
                tarballs.add(local)
                continue
            if not linked:
                copied.add(local)
            if local not in manifests:
                manifests[local] = read_json(root / local / "package.json") or {}
                pending.append(local)
    scripts = {folder: table_of(found, "scripts", f"{folder}/package.json") for folder, found in manifests.items()}
    lifecycle = tuple(
        (folder, name)
        for folder in sorted(scripts)
        for name in LIFECYCLE
        if name in scripts[folder] and not options.ignore_scripts
    )
    builds = bool(scripts["."].get("build"))
    depends = any(found.get(field) for found in manifests.values() for field in _DEPENDENCIES)
    manager = choose_manager(root, package) if depends or lifecycle or builds else None
    return NodeProject(
        root=root,
        package=package,
        manager=manager if depends or lifecycle or builds else None,
        workspaces=tuple(sorted(set(manifests) - {"."})),
        tarballs=tuple(sorted(tarballs)),
        copied=tuple(sorted(copied)),
        lifecycle=lifecycle,
        builds=builds,
        has_dev=any(found.get("devDependencies") for found in manifests.values()),
    )


def notes_of(node: NodeProject) -> list[str]:
    """What the user should know before it happens."""
    if node.manager is None or node.manager.lock is not None or not node.depends:
        return []
    return [
        "there is no lockfile, so 'npm install' picks versions and they are kept until package.json changes: "
        "run 'npm install' once and keep package-lock.json with the project"
    ]


def _workspaces(root: Path, package: Table) -> list[str]:
    """Folders of workspaces that have a package.json, relative with '/'."""
    value: object = package.get("workspaces")
    if isinstance(value, dict):
        value = cast(dict[str, object], value).get("packages")
    patterns = [one for one in cast(list[object], value) if isinstance(one, str)] if isinstance(value, list) else []
    patterns += _pnpm_workspaces(root)
    found: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("!"):
            found -= set(_matching(root, pattern[1:]))
        else:
            found |= set(_matching(root, pattern))
    return sorted(found)


def _matching(root: Path, pattern: str) -> Iterable[str]:
    pattern = pattern.strip().removeprefix("./").strip("/")
    if not pattern or pattern == "." or ".." in pattern.split("/"):
        return
    for path in root.glob(f"{pattern}/package.json"):
        folder = path.parent.relative_to(root).as_posix()
        if "node_modules" not in folder.split("/") and folder != ".":
            yield folder


def _pnpm_workspaces(root: Path) -> list[str]:
    """The `packages` list of pnpm-workspace.yaml, which is a plain list of strings."""
    found: list[str] = []
    inside = False
    for line in (read_text(root / "pnpm-workspace.yaml") or "").splitlines():
        text = line.split(" #")[0].strip()
        if text and not line[:1].isspace() and not text.startswith("-"):
            inside = text.startswith("packages:")
        elif inside and text.startswith("-"):
            found.append(text[1:].strip().strip("\"'"))
    return found


def _local_dependencies(root: Path, folder: str, package: Table) -> Iterable[tuple[str, bool]]:
    """Dependencies that lie on this machine, relative to `root`, and whether every manager links to them. Raises
    ConfigError when one lies outside."""
    for field in _DEPENDENCIES:
        for name, spec in cast(dict[str, Any], table_of(package, field, f"{folder}/package.json")).items():
            if not isinstance(spec, str) or not spec.startswith(_LOCAL):
                continue
            where = spec.partition(":")[2] if ":" in spec else spec
            place = os.path.normpath(os.path.join(folder, where.split("::")[0]))
            if where.startswith(("/", "~")) or place.startswith(".."):
                raise ConfigError(
                    f"package.json: the dependency '{name}' is at '{where}', outside of the project, and would be "
                    "missing on the server: move it into the project (a workspace), or install what 'npm pack' makes"
                )
            if place == ".":
                continue
            if not (root / place).exists():
                raise ConfigError(f"package.json: the dependency '{name}' is at '{where}', and there is nothing")
            yield place, spec.startswith(("link:", "portal:"))
