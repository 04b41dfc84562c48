"""Installed Node.js packages as a bill of materials lists them: identity, origin, hash, and whether the bytes are the
promised ones.
"""

import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from aether.artifact import treehash
from aether.artifact.manifest import Listed
from aether.artifact.sbom_document import DIFFERS, UNLISTED, UNPROMISED, UNPROVEN, VERIFIED, Package, purl
from aether.artifact.tree import FILE
from aether.build.inventory.contents import Contents, path_of, shown, text_of
from aether.build.inventory.evidence import Difference, Distribution, compare
from aether.build.inventory.keeps import Keep
from aether.build.inventory.node import Graph, Installed
from aether.build.inventory.promises import Lock, Promise, clean_url, registry_url

ROOT = "app"
"""What the artifact itself is called within its document."""
_MODULES = b"node_modules/"
_NOTES = re.compile(rb"node_modules/(?:\.[^/]+|\.bin/.*|\.pnpm/lock\.yaml|\.pnpm/node_modules/\.bin/.*)", re.DOTALL)
"""What package managers write for themselves; Node loads none of it."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What a project says of where its packages come from."""

    lock: Lock | None
    keep: Keep | None
    registries: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Judged:
    status: str
    finding: str | None = None


def packages(contents: Contents, graph: Graph, sources: Sources) -> Iterator[Package]:
    """Every package but the project itself."""
    folders = [folder for folder in graph.packages if folder]
    lock = sources.lock
    promises = {
        folder: lock.find(folder, one.installed_as, one.version) if lock and one.installed_as else None
        for folder, one in graph.packages.items()
    }
    owned = treehash.by_folder(contents.members.values(), [path_of(folder) for folder in graph.packages])
    hosts = {folder: _host(folder, graph, promises) for folder in folders}
    judge = _Judge(contents, graph, sources, promises, hosts)
    purls = {folder: _purl(graph.packages[folder], promises[folder], sources.registries) for folder in folders}
    refs = _refs(graph, purls)
    refs[""] = ROOT
    for folder in sorted(folders, key=lambda folder: refs[folder]):
        one, promise = graph.packages[folder], promises[folder]
        judged = judge.judge(folder, owned[path_of(folder)])
        url = _url(one, promise, sources.registries)
        notes = {"bundled": "yes"} if hosts[folder] != folder else {}
        if one.installed_as and one.installed_as != one.name:
            notes["alias"] = shown(one.installed_as)
        if one.local or (promise is not None and promise.local):
            notes["origin"] = "project"
        if promise is not None and promise.patched:
            notes["patched"] = "yes"
        if promise is not None and promise.checksum:
            notes["yarn_checksum"] = promise.checksum
        if one.scripts:
            notes["install_scripts"] = "yes"
        root = path_of(folder) + b"/"
        yield Package(
            ref=refs[folder],
            name=shown(one.name),
            version=shown(one.version) or (promise.version if promise else ""),
            path=shown(folder),
            purl=purls[folder],
            scope="optional" if folder in graph.optional else "required",
            tree=treehash.tree_of(owned[path_of(folder)], root),
            licenses=_licenses(one, promise),
            url=url,
            integrity=promise.integrity if promise else (),
            vcs=promise.vcs.removeprefix("git+") or None if promise else None,
            status=judged.status,
            finding=judged.finding,
            notes=notes,
            depends_on=tuple(sorted({refs[to] for to in graph.edges[folder]})),
        )


def strays(contents: Contents, graph: Graph) -> list[str]:
    """Files in the project's node_modules that belong to no package and to no package manager."""
    owned = treehash.by_folder(contents.members.values(), [path_of(folder) for folder in graph.packages])
    roots = [path_of(folder) for folder, one in graph.packages.items() if one.local]
    found: list[str] = []
    for root in roots:
        prefix = root + b"/" + _MODULES if root else _MODULES
        for member in owned[root]:
            name = member.path[len(prefix) - len(_MODULES) :]
            if member.kind == FILE and name.startswith(_MODULES) and not _NOTES.fullmatch(name):
                found.append(shown(text_of(member.path)))
    return sorted(found)


def absent(contents: Contents, graph: Graph, lock: Lock | None) -> list[str]:
    """Folders that the lockfile says must hold a package and that hold none, other than by the user's own rules."""
    if lock is None:
        return []
    return sorted(
        shown(folder)
        for folder in lock.required()
        if folder not in graph.packages and not contents.left_out(path_of(folder + "/package.json"))
    )


def _host(folder: str, graph: Graph, promises: Mapping[str, Promise | None]) -> str:
    """The package whose distribution holds the package in `folder`: itself, or the one that bundles it."""
    while _is_bundled(folder, graph, promises) and (above := _above(folder, graph)) is not None:
        folder = above
    return folder


def _is_bundled(folder: str, graph: Graph, promises: Mapping[str, Promise | None]) -> bool:
    above = _above(folder, graph)
    if above is None:
        return False
    promise, bundles = promises[folder], graph.packages[above].bundles
    if promise is not None:
        return promise.bundled or graph.packages[folder].installed_as in bundles
    # lockfiles that do not list what is bundled do not list what that needs either
    return bool(bundles) or _is_bundled(above, graph, promises)


def _above(folder: str, graph: Graph) -> str | None:
    """The package in whose node_modules `folder` lies; None at the top."""
    name = graph.packages[folder].installed_as
    above = folder.removesuffix(f"/node_modules/{name}")
    return above if name and above != folder and above in graph.packages and not graph.packages[above].local else None


def _distributions(
    sources: Sources, promises: Mapping[str, Promise | None], hosts: set[str]
) -> dict[Promise, Distribution | None]:
    """What each promise is about, as far as it is at hand."""
    wanted = {promise for host in hosts if (promise := promises.get(host)) is not None and promise.promises}
    keep = sources.keep
    if keep is None or not wanted:
        return {}
    ordered = sorted(wanted, key=lambda one: (one.name, one.version, one.checksum))
    # inflating and hashing let other threads run; more of them would only hold more tarballs in memory
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(ordered, pool.map(keep, ordered), strict=True))


class _Judge:
    """Says of each package whether its bytes are the promised ones."""

    def __init__(
        self,
        contents: Contents,
        graph: Graph,
        sources: Sources,
        promises: Mapping[str, Promise | None],
        hosts: Mapping[str, str],
    ) -> None:
        self._contents, self._graph = contents, graph
        self._has_lock = sources.lock is not None
        self._promises, self._hosts = promises, hosts
        self._distributions = _distributions(sources, promises, set(hosts.values()))
        self._folders = sorted(graph.packages)

    def judge(self, folder: str, files: Sequence[Listed]) -> _Judged:
        host = self._hosts[folder]
        promise = self._promises[host]
        if self._graph.packages[folder].local or not self._has_lock or (promise is not None and promise.local):
            return _Judged(UNPROMISED)
        if promise is None:
            return _Judged(UNLISTED, "not in the lockfile")
        if not promise.promises:
            return _Judged(UNPROMISED)
        distribution = self._distributions.get(promise)
        if distribution is None:
            return _Judged(UNPROVEN)
        root, base = path_of(folder) + b"/", path_of(host) + b"/"
        if folder != host:
            start = root[len(base) :]
            within = {
                path[len(start) :]: found for path, found in distribution.files.items() if path.startswith(start)
            }
            distribution = Distribution(within, distribution.algorithm)
        return _told(compare(self._contents, files, root, distribution, self._inner(folder)), promise)

    def _inner(self, folder: str) -> list[bytes]:
        """Folders of the packages within `folder`."""
        start = bisect_left(self._folders, f"{folder}/")
        found: list[bytes] = []
        for other in self._folders[start:]:
            if not other.startswith(f"{folder}/"):
                break
            found.append(path_of(other) + b"/")
        return found


def _told(difference: Difference, promise: Promise) -> _Judged:
    if not difference:
        return _Judged(VERIFIED)
    if promise.patched and not promise.checksum:
        # the lockfile itself says that a patch of the project changes it
        return _Judged(UNPROVEN)
    return _Judged(DIFFERS, difference.told())


def _purl(one: Installed, promise: Promise | None, registries: Mapping[str, str]) -> str | None:
    """None for a package that lies in the project: a registry's package of the same name is another one.

    Only a registry that the project itself names is told of: any other is the package manager's own."""
    if one.local or not one.name or (promise is not None and (promise.local or promise.tarball)):
        return None
    version = one.version or (promise.version if promise else "")
    qualifiers: dict[str, str] = {}
    if promise is not None and promise.vcs:
        qualifiers["vcs_url"] = promise.vcs
    elif promise is not None and promise.resolved:
        url = clean_url(promise.resolved)
        base, slash, _ = url.partition(f"/{one.name}/-/")
        if not slash:
            qualifiers["download_url"] = url
        elif base in {address.rstrip("/") for address in registries.values()}:
            qualifiers["repository_url"] = base
    return purl("npm", shown(one.name), shown(version), qualifiers)


def _refs(graph: Graph, purls: Mapping[str, str | None]) -> dict[str, str]:
    """An identity for each package: its purl, with the folder where there are several copies or no purl."""
    copies = Counter(purls.values())
    return {
        folder: text
        if text and copies[text] == 1
        else f"{text or shown(graph.packages[folder].name)}#{shown(folder)}"
        for folder, text in purls.items()
    }


def _url(one: Installed, promise: Promise | None, registries: Mapping[str, str]) -> str | None:
    if promise is None or promise.local or promise.vcs or promise.bundled:
        return None
    if promise.tarball:
        return f"file:{promise.tarball}"
    if promise.resolved:
        return clean_url(promise.resolved) or None
    if not promise.promises or not one.version:
        return None
    return registry_url(dict(registries), promise.name, one.version)


def _licenses(one: Installed, promise: Promise | None) -> tuple[str, ...]:
    own = tuple(shown(text) for text in one.licenses)
    return own or ((promise.license,) if promise is not None and promise.license else ())
