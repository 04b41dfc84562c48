"""Installed Python packages: what each .dist-info folder says, held against the files that were packed.

A RECORD is written when a wheel is unpacked and lists the SHA-256 of every file; where the wheel itself came from and
the hash it had is in pip's own report, which the installation keeps beside the packages. Bytecode is compiled after
installing and is in no RECORD.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from email.parser import BytesHeaderParser
from typing import cast

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from aether.artifact import treehash
from aether.artifact.sbom_document import DIFFERS, UNPROMISED, VERIFIED, Package, purl
from aether.artifact.tree import FILE
from aether.build.inventory.contents import Contents, as_mapping, shown, text_of
from aether.build.inventory.evidence import Difference
from aether.build.inventory.promises import Hashes, clean_url, git_url

_INFO = re.compile(rb"(.*\.dist-info)/METADATA")
_LONGEST_LICENSE = 80


@dataclass(frozen=True, slots=True)
class Origin:
    """Where pip got a distribution from."""

    url: str | None = None
    integrity: Hashes = ()
    vcs: str | None = None
    local: bool = False
    requested: bool = False
    extras: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Dist:
    name: str
    key: str
    version: str
    folder: bytes
    record: list[treehash.Recorded]
    licenses: tuple[str, ...]
    requires: list[Requirement]
    requested: bool
    origin: Origin
    extras: set[str] = field(default_factory=set[str])


@dataclass(frozen=True, slots=True)
class PythonGraph:
    """Packages, what the project itself asks for (refs), and files that belong to no package."""

    packages: list[Package]
    asked: list[str]
    strays: list[str]


def find(contents: Contents, prefix: bytes, report: Mapping[str, Origin], python_version: str) -> PythonGraph:
    """The packages below `prefix` ('' or with '/' at its end)."""
    dists = {dist.key: dist for dist in _dists(contents, prefix, report)}
    edges = _edges(dists, python_version)
    refs = {key: _ref(dist) for key, dist in dists.items()}
    bytecode = treehash.Bytecode(contents.members.values())
    claimed: set[bytes] = set()
    packages: list[Package] = []
    for key, dist in sorted(dists.items(), key=lambda item: refs[item[0]]):
        owned = treehash.by_record(dist.record, contents.members, bytecode)
        claimed |= {member.path for member in owned}
        difference = _difference(contents, dist, prefix)
        status = UNPROMISED if not dist.record else DIFFERS if difference else VERIFIED
        origin = dist.origin
        packages.append(
            Package(
                ref=refs[key],
                name=shown(dist.name),
                version=shown(dist.version),
                path=shown(text_of(dist.folder)),
                rule=treehash.RECORD,
                purl=_purl(dist),
                tree=treehash.tree_of(owned, prefix),
                licenses=dist.licenses,
                url=origin.url,
                integrity=origin.integrity,
                vcs=origin.vcs,
                status=status,
                finding=difference.told() if difference else None,
                notes={"origin": "project"} if origin.local else {},
                depends_on=tuple(sorted({refs[to] for to in edges[key]})),
            )
        )
    asked = sorted(refs[key] for key, dist in dists.items() if dist.requested)
    left = sorted(
        shown(text_of(path))
        for path, member in contents.members.items()
        if path.startswith(prefix) and member.kind == FILE and path not in claimed and not path.endswith(b".pyc")
    )
    return PythonGraph(packages, asked, left)


def read_report(text: str) -> dict[str, Origin]:
    """What `pip install --report` wrote, by package. What cannot be read says nothing."""
    try:
        items = as_mapping(json.loads(text)).get("install")
    except ValueError:
        return {}
    found: dict[str, Origin] = {}
    for item in cast(list[object], items) if isinstance(items, list) else []:
        entry = as_mapping(item)
        name = as_mapping(entry.get("metadata")).get("name")
        if isinstance(name, str):
            found[canonicalize_name(name)] = _origin(entry)
    return found


def _origin(entry: Mapping[str, object]) -> Origin:
    info = as_mapping(entry.get("download_info"))
    url = str(info.get("url", ""))
    archive, vcs = as_mapping(info.get("archive_info")), as_mapping(info.get("vcs_info"))
    digests = as_mapping(archive.get("hashes"))
    sha256 = digests.get("sha256") or str(archive.get("hash", "")).removeprefix("sha256=")
    extras = entry.get("requested_extras")
    repository = git_url(f"{vcs.get('vcs', 'git')}+{url}#{vcs.get('commit_id', '')}") if vcs else ""
    return Origin(
        url=None if vcs else _place(url),
        integrity=(("SHA-256", str(sha256)),) if isinstance(sha256, str) and len(sha256) == 64 else (),
        vcs=repository or None,
        local=url.startswith("file:"),
        requested=entry.get("requested") is True,
        extras=frozenset(map(str, cast(list[object], extras))) if isinstance(extras, list) else frozenset(),
    )


def _place(url: str) -> str | None:
    """Where a distribution comes from; of a file of this machine only its name."""
    if url.startswith("file:") and not url.endswith("/"):
        return f"file:{url.rpartition('/')[2]}"
    return clean_url(url) or None


def _dists(contents: Contents, prefix: bytes, report: Mapping[str, Origin]) -> Iterator[_Dist]:
    for path in sorted(contents.members):
        found = _INFO.fullmatch(path)
        if not path.startswith(prefix) or not found or b"/" in found.group(1)[len(prefix) :]:
            continue
        folder = found.group(1)
        about = BytesHeaderParser().parsebytes(contents.read(path))
        name = str(about.get("Name") or folder[len(prefix) :].partition(b"-")[0].decode("utf-8", "replace"))
        key = canonicalize_name(name)
        record = folder + b"/RECORD"
        lines = treehash.read_record(contents.read(record), folder) if record in contents.members else []
        origin = report.get(key, Origin())
        yield _Dist(
            name=name,
            key=key,
            version=str(about.get("Version") or ""),
            folder=folder,
            record=lines,
            licenses=_licenses(about),
            requires=list(_requirements(about)),
            requested=origin.requested or folder + b"/REQUESTED" in contents.members,
            origin=origin,
            extras=set(origin.extras),
        )


def _licenses(about: Message) -> tuple[str, ...]:
    expression = about.get("License-Expression")
    if expression:
        return (shown(str(expression)),)
    text = str(about.get("License") or "").strip()
    if text and "\n" not in text and len(text) <= _LONGEST_LICENSE and text != "UNKNOWN":
        return (shown(text),)
    classifiers = [str(line) for line in about.get_all("Classifier") or []]
    names = [line.rpartition("::")[2].strip() for line in classifiers if line.startswith("License ::")]
    return tuple(dict.fromkeys(shown(name) for name in names if name not in ("OSI Approved", "")))


def _requirements(about: Message) -> Iterator[Requirement]:
    for line in about.get_all("Requires-Dist") or []:
        try:
            yield Requirement(str(line))
        except InvalidRequirement:
            # old packages hold what no tool of today reads; pip leaves it out too
            continue


def _edges(dists: Mapping[str, _Dist], python_version: str) -> dict[str, set[str]]:
    """What each package needs of the others, with the extras that somebody asked for."""
    environment = {key: str(value) for key, value in default_environment().items()}
    if python_version:
        environment["python_full_version"] = python_version
        environment["python_version"] = ".".join(python_version.split(".")[:2])
    edges: dict[str, set[str]] = {key: set() for key in dists}
    pending = list(dists)
    while pending:
        key = pending.pop()
        for requirement in dists[key].requires:
            to = canonicalize_name(requirement.name)
            if to not in dists or to == key or not _applies(requirement, dists[key].extras, environment):
                continue
            edges[key].add(to)
            if new := requirement.extras - dists[to].extras:
                dists[to].extras |= new
                pending.append(to)
    return edges


def _applies(requirement: Requirement, extras: set[str], environment: Mapping[str, str]) -> bool:
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras))


def _difference(contents: Contents, dist: _Dist, prefix: bytes) -> Difference:
    changed: list[bytes] = []
    missing: list[bytes] = []
    for line in dist.record:
        member = contents.members.get(line.path)
        if member is None:
            if line.sha256 and not contents.left_out(line.path) and not line.path.endswith(b".pyc"):
                missing.append(line.path[len(prefix) :])
        elif line.sha256 and member.sha256 != _hex(line.sha256):
            changed.append(line.path[len(prefix) :])
    return Difference(tuple(sorted(changed)), (), tuple(sorted(missing)))


def _hex(coded: str) -> str:
    try:
        return base64.urlsafe_b64decode(coded + "=" * (-len(coded) % 4)).hex()
    except (binascii.Error, ValueError):
        return ""


def _purl(dist: _Dist) -> str | None:
    origin = dist.origin
    if origin.local and not origin.integrity:
        # a folder of the project: an index's package of the same name is another one
        return None
    return purl("pypi", dist.key, shown(dist.version), {"vcs_url": origin.vcs} if origin.vcs else None)


def _ref(dist: _Dist) -> str:
    return _purl(dist) or f"{dist.key}#{shown(text_of(dist.folder))}"
