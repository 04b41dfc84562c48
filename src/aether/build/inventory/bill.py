"""The bill of materials of a packed artifact: who made the parts, and whether they are the promised ones.

    bill = bill_of(prepared, packed)            after packing, while what was packed can still be read
    document = bill.document(subject)           CycloneDX; bill.legacy(subject) for aether-sbom-v1

Looking at everything that is installed takes seconds for a large tree and is done once: the result is kept under a
key of all it depends on: the manifest's lines of the installed files (so their paths, modes and hashes), the lockfile
and the package.json files. An edit of the project's own code changes none of them.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, cast

from aether import __version__
from aether.artifact import treehash
from aether.artifact.manifest import Listed, read_entries
from aether.artifact.pack import Packed
from aether.artifact.sbom_document import (
    DIFFERS,
    NAMESPACE,
    UNLISTED,
    UNPROVEN,
    VERIFIED,
    Component,
    Package,
    Subject,
    component,
    document,
    legacy,
    properties_of,
)
from aether.build.cache import digest_file, key_of
from aether.build.config import read_text
from aether.build.inventory.contents import path_of
from aether.build.project import Prepared
from aether.build.python import PREFIX
from aether.build.tools import cache_home, find_tool

_LAYOUT = 1
_KEPT = 32
_ROOT = "app"
_WRITTEN = 100

Facts = dict[str, Any]
"""What is kept between deploys: components, dependencies, locals (folders of the project), findings, lock."""


@dataclass(frozen=True, slots=True)
class Bill:
    """What an artifact is made of."""

    components: list[Component]
    dependencies: Mapping[str, Sequence[str]]
    findings: tuple[str, ...]
    """What a person should know, one sentence each."""
    lock: str | None
    counts: Mapping[str, int]
    """Packages by what is known of their bytes."""
    complete: bool
    took_ms: float
    known: bool
    """True when nothing had to be looked at anew."""

    def document(self, subject: Subject) -> dict[str, Any]:
        """CycloneDX 1.6."""
        return document(subject, self.components, self.dependencies, _ROOT)

    def legacy(self, subject: Subject) -> dict[str, Any]:
        """aether-sbom-v1."""
        return legacy(subject, self.components, self.dependencies)

    @property
    def properties(self) -> dict[str, str]:
        """For the document's metadata; of very many findings the first ones and their number."""
        found = {f"packages:{status}": str(count) for status, count in self.counts.items()}
        if self.lock:
            found["lockfile"] = self.lock
        for number, finding in enumerate(self.findings[:_WRITTEN], 1):
            found[f"finding:{number:03d}"] = finding
        if len(self.findings) > _WRITTEN:
            found["findings"] = str(len(self.findings))
        return found

    def told(self) -> str:
        """The packages and what is known of them, in a few words."""
        total = sum(self.counts.values())
        if not total:
            return "no packages"
        parts = [f"{count} {_WORDS[status]}" for status, count in self.counts.items() if count and status in _WORDS]
        return f"{total} packages" + (f", {', '.join(parts)}" if parts else "")


_WORDS = {
    VERIFIED: "as promised",
    DIFFERS: "that differ from what was promised",
    UNPROVEN: "not at hand to compare",
    UNLISTED: "not in the lockfile",
}


def bill_of(prepared: Prepared, packed: Packed, *, cache: bool = True) -> Bill:
    """The bill of materials of `packed`, made from `prepared`. Raises LocalIOError."""
    started = time.perf_counter()
    lines = packed.manifest.read_bytes().split(b"\n")
    kind = prepared.plan.project.kind
    key = _key(prepared, lines)
    facts = _load(key) if cache else None
    known = facts is not None
    if facts is None:
        facts = _look(prepared, lines)
        _keep(key, facts)
    components = cast(list[Component], facts["components"])
    _hash_locals(components, cast(list[str], facts["locals"]), lines)
    if kind == "binary":
        components = [*components, *_programs(prepared, lines)]
    return Bill(
        components=components,
        dependencies=facts["dependencies"],
        findings=tuple(facts["findings"]),
        lock=facts["lock"],
        counts=facts["counts"],
        complete=kind in ("node", "python") and bool(facts["complete"]),
        took_ms=(time.perf_counter() - started) * 1000,
        known=known,
    )


# --- what is kept between deploys -------------------------------------------------------------------


def _key(prepared: Prepared, lines: Sequence[bytes]) -> str:
    project = prepared.plan.project
    if project.kind == "node":
        shaping = [line for line in lines if b"node_modules" in line or b'package.json"' in line]
    else:
        mark = b'"path":"' + PREFIX
        shaping = [line for line in lines if mark in line]
    lock = _lock_of(prepared)
    return key_of(
        {
            "layout": _LAYOUT,
            "aether": __version__,
            "kind": project.kind,
            "runtime": project.runtime,
            "lines": hashlib.sha256(b"\n".join(shaping)).hexdigest(),
            "lock": [lock, digest_file(project.root / lock)] if lock else None,
            "registries": [digest_file(project.root / name) for name in (".npmrc", ".yarnrc.yml")],
            "excluded": sorted(item.path for item in prepared.excluded if "node_modules/" in item.path),
        }
    )


def _lock_of(prepared: Prepared) -> str | None:
    from aether.build.node_project import NodeProject

    described = prepared.described
    manager = described.manager if isinstance(described, NodeProject) else None
    return manager.lock if manager is not None else None


def _home() -> Path:
    return cache_home() / "sbom"


def _load(key: str) -> Facts | None:
    path = _home() / f"{key}.json"
    try:
        facts: object = json.loads(path.read_bytes())
        os.utime(path)
    except (OSError, ValueError):
        return None
    return cast(Facts, facts) if isinstance(facts, dict) else None


def _keep(key: str, facts: Facts) -> None:
    """Keep `facts` for the next deploy; without a place for them only time is lost."""
    home = _home()
    part = home / f".{key}-{os.getpid()}.part"
    try:
        home.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(facts), encoding="utf-8")
        part.replace(home / f"{key}.json")
        aged = sorted(home.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in aged[_KEPT:]:
            path.unlink(missing_ok=True)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)


# --- looking ----------------------------------------------------------------------------------------


def _look(prepared: Prepared, lines: Sequence[bytes]) -> Facts:
    kind = prepared.plan.project.kind
    if kind == "node":
        return _look_at_node(prepared, lines)
    if kind == "python":
        return _look_at_python(prepared, lines)
    return _facts([], {_ROOT: []}, [], None, [], complete=False)


def _facts(
    packages: Iterable[Package],
    dependencies: dict[str, list[str]],
    findings: list[str],
    lock: str | None,
    local: list[str],
    *,
    complete: bool,
) -> Facts:
    from aether.artifact.sbom import spdx_ids

    listed = list(packages)
    spdx = spdx_ids() if listed else frozenset[str]()
    counts: dict[str, int] = {}
    for package in listed:
        counts[package.status] = counts.get(package.status, 0) + 1
        dependencies[package.ref] = list(package.depends_on)
    return {
        "components": [component(package, spdx) for package in listed],
        "dependencies": dependencies,
        "findings": [*_differences(listed, lock), *findings],
        "lock": lock,
        "locals": local,
        "counts": counts,
        "complete": complete,
    }


def _differences(packages: Sequence[Package], lock: str | None) -> list[str]:
    found: list[str] = []
    for package in packages:
        if package.status == DIFFERS:
            why = "; it runs scripts when it is installed" if "install_scripts" in package.notes else ""
            promise = f"what {lock} promises" if lock else "what its RECORD says"
            found.append(
                f"the installed bytes of {package.name} {package.version} ({package.path}) differ from {promise}: "
                f"{package.finding}{why}"
            )
        elif package.status == UNLISTED:
            found.append(f"{package.name} {package.version} ({package.path}) is installed and not in {lock}")
    return found


def _look_at_node(prepared: Prepared, lines: Sequence[bytes]) -> Facts:
    from aether.build.inventory import node
    from aether.build.inventory.contents import Contents
    from aether.build.inventory.keeps import keep_of
    from aether.build.inventory.node_packages import Sources, absent, packages, strays
    from aether.build.inventory.promises import registries_of
    from aether.build.node_project import NodeProject

    project, described = prepared.plan.project, prepared.described
    manager = described.manager if isinstance(described, NodeProject) else None
    workspaces = described.workspaces if isinstance(described, NodeProject) else ()
    contents = Contents(read_entries(lines), prepared.entries, prepared.excluded)
    lock = _read_lock(project.root, manager.name, manager.lock) if manager and manager.lock else None
    graph = node.find(contents, workspaces, lock.required() if lock else ())
    registries = registries_of(
        read_text(project.root / ".npmrc") or "", read_text(project.root / ".yarnrc.yml") or ""
    )
    keep = keep_of(manager, project.root, _installed_in(prepared)) if manager and lock else None
    found = list(packages(contents, graph, Sources(lock, keep, registries)))
    refs = {package.path: package.ref for package in found}
    roots = [refs[folder] for folder in graph.edges.get("", ()) if folder in refs]
    findings: list[str] = []
    if lock is not None:
        findings += [
            f"{folder} is in {lock.file} and not in the artifact" for folder in absent(contents, graph, lock)
        ]
    findings += [f"{path} belongs to no package" for path in strays(contents, graph)]
    local = [folder for folder, one in graph.packages.items() if folder and one.local]
    complete = lock is not None or len(graph.packages) == 1
    return _facts(found, {_ROOT: roots}, findings, lock.file if lock else None, local, complete=complete)


def _read_lock(root: Path, manager: str, file: str) -> Any:
    """The lockfile; None when it says nothing that can be read."""
    from aether.build.inventory.npm_lock import NpmLock
    from aether.build.inventory.pnpm_lock import PnpmLock
    from aether.build.inventory.yarn_lock import YarnLock
    from aether.model.errors import ConfigError

    text = read_text(root / file)
    readers = {"npm": NpmLock, "yarn": YarnLock, "pnpm": PnpmLock}
    try:
        return readers[manager](file, text) if text else None
    except (ValueError, ConfigError):
        return None


def _installed_in(prepared: Prepared) -> Path | None:
    """The folder whose node_modules was packed."""
    start = b"node_modules/"
    for entry in prepared.entries:
        if entry.source and entry.name.startswith(start) and entry.source.endswith(entry.name):
            return Path(os.fsdecode(entry.source[: -len(entry.name)]))
    return None


def _look_at_python(prepared: Prepared, lines: Sequence[bytes]) -> Facts:
    from aether.build.inventory import python_packages
    from aether.build.inventory.contents import Contents
    from aether.build.python import REPORT

    prefix = PREFIX + b"/"
    mark = b'"path":"' + prefix
    entries = [entry for entry in prepared.entries if entry.name.startswith(prefix)]
    contents = Contents(read_entries(line for line in lines if mark in line), entries, prepared.excluded)
    report = ""
    source = next((entry for entry in entries if entry.source.endswith(entry.name[len(b".aether/") :])), None)
    if source is not None:
        folder = Path(os.fsdecode(source.source[: -len(source.name[len(b".aether/") :])]))
        report = read_text(folder / REPORT) or ""
    python = find_tool("python3")
    graph = python_packages.find(
        contents, prefix, python_packages.read_report(report), python.version if python else ""
    )
    findings = [f"{path} belongs to no package" for path in graph.strays]
    return _facts(graph.packages, {_ROOT: graph.asked}, findings, None, [], complete=True)


# --- what changes with the project's own files ------------------------------------------------------


def _hash_locals(components: list[Component], folders: Sequence[str], lines: Sequence[bytes]) -> None:
    """Hash the parts that are the project's own (workspaces), which any edit may change."""
    if not folders:
        return
    marks = [f'"path":{encode_basestring_ascii(folder)[:-1]}/'.encode() for folder in folders]
    members = read_entries(line for line in lines if any(mark in line for mark in marks))
    paths = {properties_of(one)["path"]: one for one in components}
    owned = treehash.by_folder(members, [path_of(path) for path in paths])
    for folder in folders:
        one = paths.get(folder)
        if one is None:
            continue
        tree = treehash.tree_of(owned[path_of(folder)], path_of(folder) + b"/")
        one["hashes"] = [{"alg": "SHA-256", "content": tree.sha256}]
        for item in one["properties"]:
            if item["name"] == f"{NAMESPACE}files":
                item["value"] = str(tree.files)


def _programs(prepared: Prepared, lines: Sequence[bytes]) -> list[Component]:
    """The program that a binary project starts."""
    first = prepared.plan.project.start.split()[0].removeprefix("./") if prepared.plan.project.start else ""
    mark = f'"path":{encode_basestring_ascii(first)},'.encode()
    found: list[Listed] = list(read_entries(line for line in lines if mark in line))
    return [
        {
            "type": "file",
            "bom-ref": f"file:{first}",
            "name": first,
            "hashes": [{"alg": "SHA-256", "content": member.sha256}],
            "properties": [{"name": f"{NAMESPACE}path", "value": first}],
        }
        for member in found
        if member.sha256
    ]
