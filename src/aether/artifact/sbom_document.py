"""Writing a bill of materials: CycloneDX 1.6 JSON, or the older aether-sbom-v1, from the packages of an artifact.

Documents are plain dictionaries written by hand: the object model of cyclonedx-python-lib costs most of a second to
import, which every deploy would pay; tests hold what is written against its strict validator. A document is a
function of its inputs: no clock, no random number. `timestamp` is left out unless the caller gives one
(SOURCE_DATE_EPOCH), and the serial number is derived from the artifact.

Finding out what is installed is left to `aether.build.inventory`, judging documents to `sbom`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, cast
from urllib.parse import quote

from aether.artifact import treehash
from aether.model.names import check_digest

Component = dict[str, Any]
SPEC_VERSION = "1.6"
LEGACY = "aether-sbom-v1"
NAMESPACE = "aether:"
VERIFIED, DIFFERS, UNPROVEN, UNPROMISED, UNLISTED = "verified", "differs", "unproven", "unpromised", "unlisted"
"""What is known of a package's installed bytes: equal to what the lockfile's integrity promises; not equal; promised,
and what was promised is not at hand to compare; the lockfile promises nothing; the lockfile does not list it."""


@dataclass(frozen=True, slots=True)
class Package:
    """An installed package. `path` is where it lies in the artifact, `ref` its identity within the document."""

    ref: str
    name: str
    version: str
    path: str
    rule: str = treehash.FOLDER
    purl: str | None = None
    """None for what no registry knows: a name alone would accuse a stranger's package of the same name."""
    scope: str = "required"
    tree: treehash.Tree | None = None
    licenses: tuple[str, ...] = ()
    url: str | None = None
    """Where its distribution comes from."""
    integrity: tuple[tuple[str, str], ...] = ()
    """What the lockfile promises of the distribution: algorithm (SHA-512) and hex."""
    vcs: str | None = None
    status: str = UNPROMISED
    finding: str | None = None
    """How the installed bytes differ, in a few words."""
    notes: Mapping[str, str] = field(default_factory=dict[str, str])
    depends_on: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Subject:
    """The artifact that a document is about."""

    app: str
    digest: str
    content_digest: str
    runtime: str
    version: str | None = None
    aether_version: str = ""
    timestamp: str | None = None
    properties: Mapping[str, str] = field(default_factory=dict[str, str])
    complete: bool = True
    """False when nothing says what the artifact was made from (a binary, a static folder)."""


def purl(kind: str, name: str, version: str, qualifiers: Mapping[str, str] | None = None) -> str:
    """A package URL, e.g. pkg:npm/%40scope/name@1.0.0?vcs_url=..."""
    path = "/".join(quote(part, safe="") for part in name.split("/"))
    text = f"pkg:{kind}/{path}"
    if version:
        text += f"@{quote(version, safe=':')}"
    given = [f"{key}={quote(value, safe=':/')}" for key, value in sorted((qualifiers or {}).items()) if value]
    return text + ("?" + "&".join(given) if given else "")


def component(package: Package, spdx: frozenset[str]) -> Component:
    """A package as CycloneDX has it; `spdx` holds the license ids that the schema knows."""
    group, _, name = package.name.rpartition("/")
    found: Component = {"type": "library", "bom-ref": package.ref, "name": name, "scope": package.scope}
    if group:
        found["group"] = group
    if package.version:
        found["version"] = package.version
    if package.purl:
        found["purl"] = package.purl
    if package.tree:
        found["hashes"] = [{"alg": "SHA-256", "content": package.tree.sha256}]
    if licenses := _licenses(package.licenses, spdx):
        found["licenses"] = licenses
    references: list[dict[str, Any]] = []
    if package.url:
        reference: dict[str, Any] = {"type": "distribution", "url": package.url}
        if package.integrity:
            reference["hashes"] = [{"alg": alg, "content": content} for alg, content in package.integrity]
        references.append(reference)
    if package.vcs:
        references.append({"type": "vcs", "url": package.vcs})
    if references:
        found["externalReferences"] = references
    properties = {"path": package.path, "rule": package.rule, "integrity": package.status, **package.notes}
    if package.tree:
        properties["files"] = str(package.tree.files)
    if package.finding:
        properties["finding"] = package.finding
    found["properties"] = _properties(properties)
    return found


def _properties(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": NAMESPACE + name, "value": value} for name, value in sorted(values.items())]


def properties_of(item: Mapping[str, Any]) -> dict[str, str]:
    """Aether's own properties of a component or of a document's metadata, without their prefix."""
    return {
        one["name"].removeprefix(NAMESPACE): one.get("value", "")
        for one in item.get("properties", ())
        if str(one.get("name", "")).startswith(NAMESPACE)
    }


def _licenses(texts: Sequence[str], spdx: frozenset[str]) -> list[dict[str, Any]]:
    """License choices: an expression stands alone, ids of SPDX and names of others stand side by side."""
    if len(texts) == 1 and texts[0] not in spdx and _is_expression(texts[0], spdx):
        return [{"expression": texts[0]}]
    return [{"license": {"id": text} if text in spdx else {"name": text}} for text in texts]


def _is_expression(text: str, spdx: frozenset[str]) -> bool:
    words = text.replace("(", " ").replace(")", " ").split()
    operators = {"AND", "OR", "WITH"}
    return len(words) > 2 and all(
        word in operators or word.removesuffix("+") in spdx or words[at - 1] == "WITH"
        for at, word in enumerate(words)
    )


def serial_number(subject: Subject) -> str:
    """A URN that is the same for the same artifact of the same app."""
    text = "\0".join(("aether sbom", subject.app, subject.content_digest, subject.digest))
    value = int.from_bytes(sha256(text.encode()).digest()[:16], "big")
    # a UUID of version 8, which leaves its bits to whoever makes it (RFC 9562)
    value = value & ~(0xF << 76) | 0x8 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    hexed = f"{value:032x}"
    return f"urn:uuid:{hexed[:8]}-{hexed[8:12]}-{hexed[12:16]}-{hexed[16:20]}-{hexed[20:]}"


def document(
    subject: Subject, components: Sequence[Component], dependencies: Mapping[str, Sequence[str]], root: str
) -> dict[str, Any]:
    """A CycloneDX document: `dependencies` maps every ref to what it depends on, `root` is the app's own ref."""
    about: dict[str, Any] = {
        "type": "application",
        "bom-ref": root,
        "name": subject.app,
        "hashes": [{"alg": "SHA-256", "content": check_digest(subject.digest)}],
    }
    if subject.version:
        about["version"] = subject.version
    metadata: dict[str, Any] = {
        "component": about,
        "lifecycles": [{"phase": "build"}],
        "properties": _properties(
            {
                "content_digest": check_digest(subject.content_digest),
                "runtime": subject.runtime,
                "tree": treehash.RULE,
                **subject.properties,
            }
        ),
        "tools": {"components": [{"type": "application", "name": "aether", "version": subject.aether_version}]},
    }
    if subject.timestamp:
        metadata["timestamp"] = subject.timestamp
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": serial_number(subject),
        "version": 1,
        "metadata": metadata,
        "components": list(components),
        "dependencies": [
            {"ref": ref, "dependsOn": list(on)} if on else {"ref": ref} for ref, on in sorted(dependencies.items())
        ],
        "compositions": [{"aggregate": "complete" if subject.complete else "unknown", "assemblies": [root]}],
    }


def legacy(
    subject: Subject, components: Iterable[Component], dependencies: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The same as aether-sbom-v1: a flat list of packages."""
    return {
        "schema": LEGACY,
        "app": subject.app,
        "digest": check_digest(subject.digest),
        "content_digest": check_digest(subject.content_digest),
        "runtime": subject.runtime,
        "packages": [_legacy_package(one, dependencies.get(one["bom-ref"], ())) for one in components],
    }


def _legacy_package(one: Component, depends_on: Sequence[str]) -> dict[str, Any]:
    properties = properties_of(one)
    group = f"{one['group']}/" if "group" in one else ""
    found: dict[str, Any] = {
        "ref": one["bom-ref"],
        "name": group + one["name"],
        "version": one.get("version", ""),
        "scope": one.get("scope", "required"),
        "path": properties["path"],
        "depends_on": list(depends_on),
    }
    if "purl" in one:
        found["purl"] = one["purl"]
    if "hashes" in one and "files" in properties:
        found["tree_sha256"] = one["hashes"][0]["content"]
        found["files"] = int(properties["files"])
    if licenses := [_license_text(item) for item in one.get("licenses", ())]:
        found["license"] = " AND ".join(licenses)
    for reference in cast(list[dict[str, Any]], one.get("externalReferences", [])):
        if hashes := reference.get("hashes"):
            found["integrity"] = f"{hashes[0]['alg'].lower().replace('-', '')}:{hashes[0]['content']}"
    if "finding" in properties:
        found["finding"] = properties["finding"]
    return found


def _license_text(item: Mapping[str, Any]) -> str:
    if "expression" in item:
        return str(item["expression"])
    return str(item["license"].get("id") or item["license"]["name"])
