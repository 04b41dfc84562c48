"""Node.js projects: dependencies from a cache outside the project, scripts and builds in a copy of it.

The project's own folder is only read. Dependencies are installed into the cache with the project's own lifecycle
scripts taken out; those, and the build, run in a staging copy with a copy of the dependencies beside it, since they
may write anywhere. Which package manager does it is decided in `managers`.
"""

import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import cast

from aether.artifact.tree import Entry
from aether.build import cache
from aether.build.command import run
from aether.build.config import Table, read_json, table_of
from aether.build.ignore import Selection, select, select_modules
from aether.build.managers import Manager
from aether.build.node_project import LIFECYCLE, NodeProject
from aether.build.project import OnLine, Options, Target
from aether.build.staging import copy_tree, stage
from aether.build.tools import find_tool

_LAYOUT = 1
"""Goes up when cached folders are laid out differently."""

_SHAPING = (
    "name",
    "version",
    "type",
    "bin",
    "dependencies",
    "devDependencies",
    "optionalDependencies",
    "peerDependencies",
    "peerDependenciesMeta",
    "dependenciesMeta",
    "bundleDependencies",
    "bundledDependencies",
    "overrides",
    "resolutions",
    "pnpm",
    "workspaces",
    "packageManager",
    "engines",
    "os",
    "cpu",
    "installConfig",
)
_SETTINGS = (".npmrc", ".yarnrc", ".yarnrc.yml", ".pnpmfile.cjs", "pnpm-workspace.yaml")
_NOT_COPIED = frozenset({b"node_modules", b".git"})
"""Of a local dependency."""
_PATCHES = ("patches", ".yarn/patches", ".yarn/plugins", ".yarn/releases")


def steps_of(node: NodeProject, options: Options) -> list[str]:
    """The commands that would run, for people."""
    if node.manager is None:
        return []
    steps: list[str] = []
    if node.depends:
        dev = node.stages and node.has_dev
        argv = node.manager.install(dev=dev, scripts=not options.ignore_scripts, target=None)
        steps.append(_spell(node.manager, argv))
    steps += [
        _spell(node.manager, node.manager.run_script(name)) + ("" if folder == "." else f" (in {folder})")
        for folder, name in node.lifecycle
    ]
    if node.builds:
        steps.append(_spell(node.manager, node.manager.run_script("build")))
    if node.stages and node.has_dev:
        steps.append(_spell(node.manager, node.manager.prune()))
    return steps


def _spell(manager: Manager, argv: Sequence[str]) -> str:
    return " ".join([manager.name, *argv[len(manager.tool.argv) :]])


def install(
    node: NodeProject, options: Options, target: Target, scratch: Path, on_line: OnLine | None
) -> tuple[Selection, bool]:
    """Install, run scripts, build; returns what to pack and whether no tool had to run.

    `scratch` is a folder for the staging copy, used only when something must run in one. Raises BuildFailed, with
    the tool's own last lines, ConfigError and LocalIOError.
    """
    replaced = [folder.encode() for folder in node.module_folders] if node.manager and node.depends else []
    if node.manager is None:
        return select(node.root, replaced=replaced), True
    manager = node.manager
    dev = node.stages and node.has_dev
    folder, hit = None, True
    if node.depends:
        folder, hit = _dependencies(node, manager, options, target, dev, on_line)
    if not node.stages:
        found = select(node.root, replaced=replaced)
        assert folder is not None
        for modules in _module_folders(folder, node):
            below = select_modules(folder / modules, modules.encode(), node.root)
            found.entries.append(Entry(modules.encode(), b"", "d"))
            found.entries += below.entries
            found.excluded += below.excluded
        return found, hit
    _build(node, manager, options, folder, dev, scratch, on_line)
    return select(scratch), False


def _module_folders(folder: Path, node: NodeProject) -> list[str]:
    return [name for name in node.module_folders if (folder / name).is_dir()]


def _dependencies(
    node: NodeProject, manager: Manager, options: Options, target: Target, dev: bool, on_line: OnLine | None
) -> tuple[Path, bool]:
    key = cache.key_of(_facts(node, manager, options, target, dev))
    elsewhere = target if (target.os, target.cpu) != (_host_os(), _host_cpu()) else None

    def make(folder: Path) -> None:
        _lay_out(node, manager, folder)
        argv = manager.install(dev=dev, scripts=not options.ignore_scripts, target=elsewhere)
        env = dict(manager.env)
        if manager.berry and options.ignore_scripts:
            env["YARN_ENABLE_SCRIPTS"] = "false"
        if manager.berry and not dev:
            _check_berry_lock(node, manager, folder, options, on_line)
        what = _spell(manager, argv[: len(manager.tool.argv) + 1])
        _run_visible(argv, folder, what=what, options=options, on_line=on_line, env=env)
        if not (folder / "node_modules").is_dir():
            (folder / "node_modules").mkdir()

    def waiting() -> None:
        if on_line is not None:
            on_line("waiting for another deploy that installs the same dependencies")

    return cache.obtain(key, make, fresh=not options.cache, waiting=waiting)


def _check_berry_lock(
    node: NodeProject, manager: Manager, folder: Path, options: Options, on_line: OnLine | None
) -> None:
    argv = [*manager.tool.argv, "install", "--immutable", "--mode=skip-build"]
    _run_visible(argv, folder, what="yarn install", options=options, on_line=on_line, env=dict(manager.env))


def _run_visible(
    argv: Sequence[str], cwd: Path, *, what: str, options: Options, on_line: OnLine | None, env: Mapping[str, str]
) -> None:
    if on_line is not None:
        on_line(f"$ {what}")
    run(argv, cwd, what=what, timeout_s=options.timeout_s, on_line=on_line, env=env)


def _facts(node: NodeProject, manager: Manager, options: Options, target: Target, dev: bool) -> dict[str, object]:
    node_tool = find_tool("node")
    root = node.root
    return {
        "layout": _LAYOUT,
        "manager": [manager.name, manager.tool.version, sorted(manager.env.items())],
        "node": node_tool.version if node_tool else None,
        "host": [_host_os(), _host_cpu(), list(platform.libc_ver())],
        "target": [target.os, target.cpu, target.libc],
        "dev": dev,
        "scripts": not options.ignore_scripts,
        "packages": {
            folder: {name: found[name] for name in _SHAPING if name in found}
            for folder in (".", *node.workspaces)
            if (found := read_json(root / folder / "package.json")) is not None
        },
        "lock": cache.digest_file(root / manager.lock) if manager.lock else None,
        "settings": {name: cache.digest_file(root / name) for name in _SETTINGS},
        "patches": {name: cache.digest_tree(root / name) for name in _PATCHES},
        "tarballs": {name: cache.digest_file(root / name) for name in node.tarballs},
        "copied": {name: cache.digest_tree(root / name, leave=_NOT_COPIED) for name in _copied(node, manager)},
    }


def _lay_out(node: NodeProject, manager: Manager, folder: Path) -> None:
    """What an installation reads, and nothing else of the project; its own lifecycle scripts are taken out."""
    root = node.root
    for name in _copied(node, manager):
        copy_tree(root / name, folder / name, leave=_NOT_COPIED)
    for place in (".", *node.workspaces):
        found = read_json(root / place / "package.json")
        if found is None or place in _copied(node, manager):
            continue
        scripts = {key: value for key, value in table_of(found, "scripts", place).items() if key not in LIFECYCLE}
        (folder / place).mkdir(parents=True, exist_ok=True)
        text = json.dumps({**found, "scripts": scripts}, indent=2)
        (folder / place / "package.json").write_text(text, encoding="utf-8")
        for program in _bins(found):
            # a package manager marks programs of workspaces executable, so they must be there
            source, copy = root / place / program, folder / place / program
            if source.is_file() and ".." not in PurePosixPath(program).parts:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)
    for name in (*([manager.lock] if manager.lock else []), *_SETTINGS, *node.tarballs):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, folder / name)
    for name in _PATCHES:
        if (root / name).is_dir():
            copy_tree(root / name, folder / name)


def _copied(node: NodeProject, manager: Manager) -> tuple[str, ...]:
    """Folders that are dependencies like any other to the manager; yarn 2 and later lock their bytes."""
    return () if manager.name == "npm" else node.copied


def _bins(package: Table) -> list[str]:
    found: object = package.get("bin")
    if isinstance(found, str):
        return [found]
    if isinstance(found, dict):
        return [value for value in cast(dict[str, object], found).values() if isinstance(value, str)]
    return []


def _build(
    node: NodeProject,
    manager: Manager,
    options: Options,
    dependencies: Path | None,
    dev: bool,
    scratch: Path,
    on_line: OnLine | None,
) -> None:
    replaced = (
        frozenset(os.fsencode(folder) for folder in node.module_folders) if dependencies else frozenset[bytes]()
    )
    stage(node.root, scratch, leave=replaced)
    if dependencies is not None:
        for modules in _module_folders(dependencies, node):
            copy_tree(dependencies / modules, scratch / modules)
    env = {**manager.env, "HUSKY": "0"}
    if manager.name == "pnpm":
        # scripts of the project meet the environment they know; only pnpm itself runs unattended
        env.pop("CI", None)
    for folder, name in node.lifecycle:
        if folder in _copied(node, manager):
            continue  # the manager runs them, in the copy
        _run_visible(
            manager.run_script(name), scratch / folder, what=f"the script '{name}'", options=options,
            on_line=on_line, env=env,
        )  # fmt: skip
    if node.builds:
        argv = manager.run_script("build")
        _run_visible(argv, scratch, what=_spell(manager, argv), options=options, on_line=on_line, env=env)
    if dev and dependencies is not None:
        argv = manager.prune()
        what = _spell(manager, argv[: len(manager.tool.argv) + 1]) + " (without development dependencies)"
        prune_env = {**manager.env, **({"YARN_ENABLE_SCRIPTS": "false"} if manager.berry else {})}
        _run_visible(argv, scratch, what=what, options=options, on_line=on_line, env=prune_env)


def _host_os() -> str:
    return {"Linux": "linux", "Darwin": "darwin", "Windows": "win32"}.get(
        platform.system(), platform.system().lower()
    )


def _host_cpu() -> str:
    machine = platform.machine().lower()
    return {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64"}.get(machine, machine)


def default_target() -> Target:
    """Linux on this machine's CPU."""
    return Target(cpu=_host_cpu())
