"""Installed Node.js packages and what each of them would load, found as Node itself finds them.

The installed tree is the truth, whatever package manager made it: a package is a folder in the `node_modules` of the
project, of a workspace, of another package or of pnpm's store; what it depends on is what Node's algorithm finds from
there, links followed. Lockfiles are asked only for what they promise (`promises`).
"""

import json
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from aether.artifact.tree import FILE, LINK
from aether.build.inventory.contents import Contents, as_mapping, path_of, text_of

_MODULES = "node_modules"
_STORE = f"{_MODULES}/.pnpm/"
_HOPS = 8
_INSTALL_SCRIPTS = ("preinstall", "install", "postinstall")


@dataclass(frozen=True, slots=True)
class Installed:
    """A package folder of the artifact; '' is the project itself."""

    folder: str
    installed_as: str
    """The name others require it by."""
    name: str
    version: str
    licenses: tuple[str, ...]
    needs: tuple[str, ...]
    may_use: tuple[str, ...]
    """Optional dependencies."""
    bundles: frozenset[str]
    scripts: bool
    """Whether installing it runs scripts of its own."""
    local: bool
    """Part of the project: itself, a workspace, a folder that is linked to."""


@dataclass(slots=True)
class Graph:
    """Installed packages by folder, and the folders that each one loads."""

    packages: dict[str, Installed]
    edges: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    optional: frozenset[str] = frozenset()
    """Folders that only optional dependencies lead to."""


def find(contents: Contents, workspaces: Sequence[str], listed: Iterable[str] = ()) -> Graph:
    """The packages in an artifact; `listed` are folders that a lockfile says hold one."""
    links = _links(contents)
    described = _folders_with_package_json(contents)
    roots = ["", *(folder for folder in workspaces if folder in described)]
    roots += sorted({to for to in links.values() if to in described and _MODULES not in to.split("/")} - set(roots))
    folders = _installed(described, roots)
    inhabited = _inhabited(contents, set(listed) - folders.keys())
    folders |= {folder: _name_in(folder) for folder in inhabited}
    packages = {folder: _read(contents, folder, name, folder in roots) for folder, name in folders.items()}
    graph = Graph(packages)
    _connect(graph, links)
    graph.optional = _only_optional(graph, roots)
    return graph


def _links(contents: Contents) -> dict[str, str]:
    """Links in the artifact by their path, with where each one leads."""
    found: dict[str, str] = {}
    for path, member in contents.members.items():
        if member.kind == LINK:
            place = text_of(path)
            found[place] = posixpath.normpath(posixpath.join(posixpath.dirname(place), text_of(member.target)))
    return found


def _folders_with_package_json(contents: Contents) -> set[str]:
    return {
        text_of(path)[: -len("/package.json")] if path != b"package.json" else ""
        for path, member in contents.members.items()
        if member.kind == FILE and (path == b"package.json" or path.endswith(b"/package.json"))
    }


def _name_in(folder: str) -> str:
    """The name by which what lies in a folder of node_modules is required; empty elsewhere."""
    parts = folder.split("/")
    if len(parts) > 1 and parts[-2] == _MODULES and not parts[-1].startswith((".", "@")):
        return parts[-1]
    if len(parts) > 2 and parts[-3] == _MODULES and parts[-2].startswith("@"):
        return f"{parts[-2]}/{parts[-1]}"
    return ""


def _installed(described: set[str], roots: Sequence[str]) -> dict[str, str]:
    """Package folders with the name each is required by. Folders of node_modules that belong to nobody (a package's
    own test data) hold no packages."""
    found = {root: _name_in(root) for root in roots}
    for folder in sorted(described - set(roots), key=lambda folder: (folder.count("/"), folder)):
        name = _name_in(folder)
        if not name:
            continue
        above = folder[: -len(f"/{_MODULES}/{name}")] if folder != f"{_MODULES}/{name}" else ""
        if above in found or _in_store(above, roots):
            found[folder] = name
    return found


def _in_store(folder: str, roots: Sequence[str]) -> bool:
    """Whether `folder` is one of pnpm's, which hold a package beside links to what it needs."""
    base, store, name = folder.rpartition(_STORE)
    return bool(store) and bool(name) and "/" not in name and base.rstrip("/") in roots


def _inhabited(contents: Contents, folders: set[str]) -> set[str]:
    """Those of `folders` that hold files."""
    if not folders:
        return set()
    above: set[bytes] = set()
    for path, member in contents.members.items():
        if member.kind == FILE:
            folder = path.rpartition(b"/")[0]
            while folder and folder not in above:
                above.add(folder)
                folder = folder.rpartition(b"/")[0]
    return {folder for folder in folders if path_of(folder) in above}


def _read(contents: Contents, folder: str, installed_as: str, local: bool) -> Installed:
    path = path_of(f"{folder}/package.json" if folder else "package.json")
    found: Mapping[str, object] = {}
    if path in contents.members:
        try:
            found = as_mapping(json.loads(contents.read(path)))
        except (ValueError, RecursionError):
            # a package.json that nobody can read says nothing; Node would load index.js all the same
            found = {}
    optional = set(as_mapping(found.get("optionalDependencies")))
    needs = (set(as_mapping(found.get("dependencies"))) | set(as_mapping(found.get("peerDependencies")))) - optional
    scripts = as_mapping(found.get("scripts"))
    return Installed(
        folder=folder,
        installed_as=installed_as,
        name=_string(found.get("name")) or installed_as,
        version=_string(found.get("version")),
        licenses=_licenses(found),
        needs=tuple(sorted(needs)),
        may_use=tuple(sorted(optional)),
        bundles=_bundles(found),
        scripts=any(name in scripts for name in _INSTALL_SCRIPTS),
        local=local,
    )


def _string(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


def _bundles(found: Mapping[str, object]) -> frozenset[str]:
    value = found.get("bundleDependencies", found.get("bundledDependencies"))
    if value is True:
        return frozenset(as_mapping(found.get("dependencies")))
    return frozenset(map(str, cast(list[object], value))) if isinstance(value, list) else frozenset()


def _licenses(found: Mapping[str, object]) -> tuple[str, ...]:
    """`license`, or the older `licenses`, as texts."""
    value = found.get("license") or found.get("licenses")
    items = cast(list[object], value) if isinstance(value, list) else [value]
    texts = [_string(item) or _string(as_mapping(item).get("type")) for item in items]
    return tuple(dict.fromkeys(text for text in texts if text))


def _connect(graph: Graph, links: Mapping[str, str]) -> None:
    for folder, package in graph.packages.items():
        found = (_resolve(name, folder, graph, links) for name in (*package.needs, *package.may_use))
        graph.edges[folder] = tuple(sorted({one for one in found if one is not None and one != folder}))


def _resolve(name: str, folder: str, graph: Graph, links: Mapping[str, str]) -> str | None:
    """The folder that `require(name)` finds in a file of `folder`."""
    while True:
        if posixpath.basename(folder) != _MODULES:
            place = f"{folder}/{_MODULES}/{name}" if folder else f"{_MODULES}/{name}"
            for _ in range(_HOPS):
                if place not in links:
                    break
                place = links[place]
            if place in graph.packages:
                return place
        if not folder:
            return None
        folder = posixpath.dirname(folder)


def _only_optional(graph: Graph, roots: Sequence[str]) -> frozenset[str]:
    everything, needed = set(roots), set(roots)
    for reached, only_needed in ((everything, False), (needed, True)):
        pending = list(roots)
        while pending:
            folder = pending.pop()
            package = graph.packages[folder]
            for to in graph.edges[folder]:
                name = graph.packages[to].installed_as
                if only_needed and name in package.may_use:
                    continue
                if to not in reached:
                    reached.add(to)
                    pending.append(to)
    return frozenset(everything - needed)
