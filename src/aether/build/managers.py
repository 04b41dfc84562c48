"""npm, yarn and pnpm: which one a project uses, where it is found, and its commands."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aether.build.config import Table, read_text, text_of
from aether.build.project import Target
from aether.build.tools import Tool, find_tool
from aether.model.errors import ConfigError

_NPM_LOCKS = ("npm-shrinkwrap.json", "package-lock.json")


@dataclass(frozen=True, slots=True)
class Manager:
    """A package manager and how it installs. `lock` is the lockfile's name, None when the project has none."""

    name: str  # npm | yarn | pnpm
    tool: Tool
    lock: str | None
    berry: bool = False
    env: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def major(self) -> int:
        return int(self.tool.version.partition(".")[0])

    def install(self, *, dev: bool, scripts: bool, target: Target | None) -> list[str]:
        """The command that installs what the lockfile says. `target` is given when it is not this machine."""
        argv = list(self.tool.argv)
        if self.name == "npm":
            argv += ["ci" if self.lock else "install", "--no-audit", "--no-fund"]
            argv += ["--include=dev"] if dev else ["--omit=dev"]
            if target is not None:
                argv += [f"--os={target.os}", f"--cpu={target.cpu}", f"--libc={target.libc}"]
        elif self.name == "pnpm":
            argv += ["install", "--frozen-lockfile", "--config.confirm-modules-purge=false"]
            argv += ["--prod=false"] if dev else ["--prod"]
        elif self.berry:
            if not dev:
                # focus has no --immutable: an install that builds nothing goes before it and checks the lockfile
                argv += ["workspaces", "focus", "--all", "--production"]
                return argv
            argv += ["install", "--immutable"]
            return [*argv, "--mode=skip-build"] if not scripts else argv
        else:
            argv += ["install", "--frozen-lockfile", "--non-interactive", "--no-progress"]
            argv += ["--production=false"] if dev else ["--production=true"]
        return argv if scripts else [*argv, "--ignore-scripts"]

    def prune(self) -> list[str]:
        """The command that removes development dependencies, running no script."""
        argv = list(self.tool.argv)
        if self.name == "npm":
            return [*argv, "prune", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund"]
        if self.name == "pnpm":
            return [*argv, "prune", "--prod", "--ignore-scripts", "--config.confirm-modules-purge=false"]
        if self.berry:
            return [*argv, "workspaces", "focus", "--all", "--production"]
        return [
            *argv,
            "install",
            "--production=true",
            "--frozen-lockfile",
            "--ignore-scripts",
            "--prefer-offline",
            "--non-interactive",
            "--no-progress",
        ]

    def run_script(self, script: str) -> list[str]:
        """The command that runs a script of package.json."""
        return [*self.tool.argv, "run", script]


def choose_manager(root: Path, package: Table) -> Manager:
    """The project's package manager, by its lockfile, else by package.json's packageManager, else npm.

    Raises ConfigError when it is not installed, saying how to get it.
    """
    wanted = (text_of(package, "packageManager", "package.json") or "").partition("@")
    for lock, name in (*((lock, "npm") for lock in _NPM_LOCKS), ("yarn.lock", "yarn"), ("pnpm-lock.yaml", "pnpm")):
        if (root / lock).is_file() and wanted[0] in ("", name):
            return _found(root, name, lock, wanted[2])
    for lock, name in (*((lock, "npm") for lock in _NPM_LOCKS), ("yarn.lock", "yarn"), ("pnpm-lock.yaml", "pnpm")):
        if (root / lock).is_file():
            return _found(root, name, lock, "")
    if wanted[0] in ("yarn", "pnpm"):
        raise ConfigError(
            f"package.json names {wanted[0]} as its package manager and there is no lockfile: "
            f"run '{wanted[0]} install' and keep the lockfile with the project"
        )
    return _found(root, "npm", None, "")


def _found(root: Path, name: str, lock: str | None, wanted: str) -> Manager:
    if name == "npm":
        tool = find_tool("npm")
        if tool is None:
            raise ConfigError("npm is not on PATH: install Node.js (it brings npm)")
        return Manager(name, tool, lock)
    if name == "pnpm":
        # pnpm asks before it replaces a folder unless it runs unattended; its shims would carry absolute paths
        quiet = {"CI": "true", "npm_config_extend_node_path": "false", "npm_config_package_import_method": "copy"}
        return Manager(name, _tool(root, name), lock, env=quiet)
    berry = _is_berry(root, wanted)
    pinned = _yarn_path(root) if berry else None
    if pinned is not None:
        tool = find_tool("yarn", ("node", str(pinned)), root)
        if tool is None:
            raise ConfigError("node is not on PATH: install Node.js")
    else:
        tool = _tool(root, name)
    if berry and tool.version.startswith("1."):
        raise ConfigError(
            f"the project's yarn.lock is of yarn {wanted or '2 or later'}, and yarn {tool.version} was found: "
            "run 'corepack enable', or 'yarn set version stable' in the project"
        )
    modern = not tool.version.startswith("1.")
    env = {"YARN_NODE_LINKER": "node-modules", "YARN_ENABLE_TELEMETRY": "0", "YARN_ENABLE_PROGRESS_BARS": "0"}
    # without lockfile changes: the equivalent of --immutable for commands that do not know it
    return Manager(name, tool, lock, berry=modern, env={**env, "YARN_ENABLE_GLOBAL_CACHE": "true"} if modern else {})


def _tool(root: Path, name: str) -> Tool:
    found = find_tool(name, None, root) or find_tool(name, ("corepack", name), root)
    if found is None:
        raise ConfigError(f"the project uses {name}, which is not on PATH: run 'npm install --global {name}'")
    return found


def _is_berry(root: Path, wanted: str) -> bool:
    if wanted:
        return not wanted.startswith("1.")
    return (root / ".yarnrc.yml").is_file() or "__metadata:" in (read_text(root / "yarn.lock") or "")[:4096]


def _yarn_path(root: Path) -> Path | None:
    for line in (read_text(root / ".yarnrc.yml") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "yarnPath":
            path = root / value.strip().strip("\"'")
            return path if path.is_file() else None
    return None
