"""Holding an artifact against its documents: what was checked, with what result, and what could not be.

    archive        can be unpacked whole, and leads nowhere outside
    digest         is the one that was asked for
    manifest       is about this artifact and lists every member as it is
    signature      was made by one of the given keys
    provenance     is about this artifact, names these documents, and was signed by one of the given keys
    sbom           is valid, about this artifact, and every component has the hash that it is listed with

Pure: bytes in, checks out. Where the bytes come from is left to the callers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

from aether.artifact import dsse, manifest, provenance, sbom, signature, treehash
from aether.artifact.inspect import Seen
from aether.artifact.manifest import Listed
from aether.artifact.sbom_document import Component, properties_of
from aether.artifact.tree import FILE, show
from aether.model.errors import AetherError

OK, FAILED, UNCHECKED = "ok", "failed", "not checked"
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `detail` says what was seen, or why nothing was."""

    name: str
    status: str
    detail: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """What there is beside an artifact. None: there is none."""

    digest: str | None = None
    """The digest that the artifact should have."""
    manifest: bytes | None = None
    signature: str | None = None
    provenance: bytes | None = None
    sbom: bytes | None = None
    keys: Sequence[str] = ()
    """Public keys in hex whose signatures count."""
    app: str | None = None


def is_record(path: bytes) -> bool:
    """Whether the content of this member is needed to check a bill of materials (`Seen.kept`)."""
    return path.endswith(b".dist-info/RECORD")


def verify(seen: Seen, evidence: Evidence) -> list[Check]:
    """Every check, in the order in which a reader wants them."""
    return [
        _digest(seen, evidence),
        _archive(seen),
        _guarded("manifest", evidence.manifest, lambda data: _manifest(seen, data)),
        _signature(seen, evidence),
        *_provenance(seen, evidence),
        _guarded("sbom", evidence.sbom, lambda data: _sbom(seen, data)),
    ]


def _guarded(name: str, data: bytes | None, check: Callable[[bytes], tuple[str | None, str]]) -> Check:
    if data is None:
        return Check(name, UNCHECKED, "there is none")
    try:
        problem, detail = check(data)
    except AetherError as error:
        return Check(name, FAILED, error.message)
    return Check(name, FAILED if problem else OK, problem or detail)


def _digest(seen: Seen, evidence: Evidence) -> Check:
    if evidence.digest is None:
        return Check("digest", UNCHECKED, f"{seen.digest}; nothing says which it should be")
    if evidence.digest != seen.digest:
        return Check("digest", FAILED, f"the file has {seen.digest}, not {evidence.digest}")
    return Check("digest", OK, f"{seen.digest}, {seen.size_bytes} bytes")


def _archive(seen: Seen) -> Check:
    if seen.broken is not None:
        return Check("archive", FAILED, seen.broken)
    files = sum(one.kind == FILE for one in seen.members.values())
    return Check("archive", OK, f"{len(seen.members)} members, {files} files, content {seen.content_digest}")


def _manifest(seen: Seen, data: bytes) -> tuple[str | None, str]:
    listed = manifest.check(data, seen.digest)
    if listed.size_bytes != seen.size_bytes:
        return f"it says {listed.size_bytes} bytes, and the artifact has {seen.size_bytes}", ""
    if seen.broken is not None:
        return "the archive cannot be read to its end", ""
    if listed.content_digest != seen.content_digest:
        return f"it says that the content is {listed.content_digest}, and it is {seen.content_digest}", ""
    expected = {entry.path: entry for entry in listed.entries}
    wrong = sorted(
        path for path in expected.keys() | seen.members.keys() if expected.get(path) != seen.members.get(path)
    )
    if wrong:
        return f"{len(wrong)} members are not as it lists them: {_names(wrong)}", ""
    return None, f"{len(expected)} members are as it lists them"


def _names(paths: Sequence[bytes]) -> str:
    return ", ".join(show(path) for path in paths[:_SHOWN]) + (", ..." if len(paths) > _SHOWN else "")


def _signature(seen: Seen, evidence: Evidence) -> Check:
    name = "signature"
    if evidence.signature is None:
        if evidence.keys and evidence.provenance is None:
            return Check(name, FAILED, "there is none, and a key was given")
        return Check(name, UNCHECKED, "there is none")
    try:
        signature.check_signature(evidence.signature)
    except AetherError as error:
        return Check(name, FAILED, error.message)
    if not evidence.keys:
        return Check(name, UNCHECKED, "no key was given to check it with")
    for key in evidence.keys:
        if signature.verify(seen.digest, evidence.signature, key):
            return Check(name, OK, f"by key {signature.key_id(key)}")
    return Check(name, FAILED, "none of the given keys made it for this artifact")


def _provenance(seen: Seen, evidence: Evidence) -> Iterator[Check]:
    name, signed = "provenance", "provenance signature"
    if evidence.provenance is None:
        yield Check(name, UNCHECKED, "there is none")
        return
    try:
        envelope = dsse.decode(evidence.provenance)
        statement = provenance.decode(envelope.payload)
        provenance.check(statement, seen.digest, evidence.app)
        problem = _byproducts(statement, evidence)
    except AetherError as error:
        yield Check(name, FAILED, error.message)
        return
    if problem is not None:
        yield Check(name, FAILED, problem)
    else:
        yield Check(name, OK, _told(statement))
    if not evidence.keys:
        yield Check(signed, UNCHECKED, "no key was given to check it with")
        return
    by = envelope.verify(evidence.keys)
    if by:
        yield Check(signed, OK, f"by key {', '.join(signature.key_id(key) for key in by)}")
    else:
        yield Check(signed, FAILED, "none of the given keys signed it")


def _tables(value: object) -> list[dict[str, Any]]:
    """The objects in a list of a statement; what is no list holds none."""
    items = cast(list[object], value) if isinstance(value, list) else []
    return [cast(dict[str, Any], item) for item in items if isinstance(item, dict)]


def _table(value: object) -> dict[str, Any]:
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _byproducts(statement: Mapping[str, Any], evidence: Evidence) -> str | None:
    """Why the documents at hand are not those that the build made."""
    there = {"manifest": evidence.manifest, "sbom": evidence.sbom}
    for item in _tables(statement["predicate"]["runDetails"].get("byproducts")):
        data = there.get(str(item.get("name")))
        digest = _table(item.get("digest")).get("sha256")
        if data is not None and digest is not None and digest != sha256(data).hexdigest():
            return f"the {item['name']} at hand is not the one that the build made"
    return None


def _told(statement: Mapping[str, Any]) -> str:
    predicate = _table(statement["predicate"])
    details, definition = _table(predicate["runDetails"]), _table(predicate["buildDefinition"])
    parts = [f"built by {details['builder']['id']}"]
    for item in _tables(definition.get("resolvedDependencies")):
        commit = _table(item.get("digest")).get("gitCommit")
        if isinstance(commit, str):
            dirty = " with changes" if _table(item.get("annotations")).get("dirty") else ""
            parts.append(f"from commit {commit[:12]}{dirty}")
    finished = _table(details.get("metadata")).get("finishedOn")
    if isinstance(finished, str):
        parts.append(f"on {finished}")
    return show(", ".join(parts).encode("utf-8", "backslashreplace"))


def _sbom(seen: Seen, data: bytes) -> tuple[str | None, str]:
    kind = sbom.check_document(data, seen.digest)
    _, value = sbom.read(data)
    if kind == sbom.LEGACY:
        parts: list[Component] = [
            {
                "name": one["name"],
                "hashes": [{"alg": "SHA-256", "content": one["tree_sha256"]}] if "tree_sha256" in one else [],
                "properties": [
                    {"name": "aether:path", "value": one["path"]},
                    {"name": "aether:rule", "value": _legacy_rule(one["path"])},
                ],
            }
            for one in value["packages"]
        ]
    else:
        parts = list(value.get("components", []))
    checked, wrong = _hashes(seen, parts)
    if seen.broken is not None:
        return "the archive cannot be read to its end", ""
    if wrong:
        names = ", ".join(wrong[:_SHOWN]) + (", ..." if len(wrong) > _SHOWN else "")
        return f"{len(wrong)} components are not in the artifact as it lists them: {names}", ""
    rest = f", {len(parts) - checked} without a hash that can be" if checked < len(parts) else ""
    return None, f"valid {kind}, {len(parts)} components, the hashes of {checked} checked{rest}"


def _legacy_rule(path: str) -> str:
    return treehash.RECORD if path.endswith(".dist-info") else treehash.FOLDER


def _hashes(seen: Seen, components: Sequence[Component]) -> tuple[int, list[str]]:
    """How many components have a hash that could be computed again, and the names of those that have another."""
    known = [(one, properties_of(one)) for one in components]
    folders = [about["path"].encode() for _, about in known if about.get("rule") == treehash.FOLDER]
    owned = treehash.by_folder(seen.members.values(), folders)
    bytecode = treehash.Bytecode(seen.members.values())
    checked, wrong = 0, list[str]()
    for one, about in known:
        hashes = [item["content"] for item in one.get("hashes", ()) if item["alg"] == "SHA-256"]
        if "path" not in about or not hashes:
            continue
        checked += 1
        if hashes[0] != _hash_of(seen, about, owned, bytecode):
            wrong.append(show(f"{one['name']} ({about['path']})".encode()))
    return checked, wrong


def _hash_of(
    seen: Seen, about: Mapping[str, str], owned: Mapping[bytes, list[Listed]], bytecode: treehash.Bytecode
) -> str | None:
    path = about["path"].encode()
    if about.get("rule") == treehash.FOLDER:
        return treehash.tree_of(owned[path], path + b"/").sha256
    if about.get("rule") == treehash.RECORD:
        record = treehash.read_record(seen.kept.get(path + b"/RECORD", b""), path)
        site = path.rpartition(b"/")[0]
        members = treehash.by_record(record, seen.members, bytecode)
        return treehash.tree_of(members, site + b"/" if site else b"").sha256
    member = seen.members.get(path)
    return member.sha256 if member is not None else None
