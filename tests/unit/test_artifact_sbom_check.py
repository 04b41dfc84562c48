"""Judging bills of materials: the same verdict as JsonStrictValidator's, and a document about another artifact."""

import copy
import json
import time
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from aether.artifact import sbom
from aether.model.errors import BadRequest, DigestMismatch

DIGEST = "a" * 64
THEIRS = JsonStrictValidator(SchemaVersion.V1_6)

VALID: dict[str, Any] = {
    "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
    "bomFormat": "CycloneDX",
    "specVersion": "1.6",
    "serialNumber": "urn:uuid:3e671687-395b-41f5-a30f-a58921a69b79",
    "version": 1,
    "metadata": {
        "timestamp": "2026-01-31T12:00:00Z",
        "component": {
            "type": "application",
            "name": "shop",
            "bom-ref": "app",
            "hashes": [{"alg": "SHA-256", "content": DIGEST}],
        },
    },
    "components": [
        {
            "type": "library",
            "bom-ref": "pkg:npm/left-pad@1.3.0",
            "name": "left-pad",
            "version": "1.3.0",
            "purl": "pkg:npm/left-pad@1.3.0",
            "licenses": [{"license": {"id": "WTFPL"}}],
            "externalReferences": [
                {"type": "distribution", "url": "https://registry.example/left-pad/-/left-pad-1.3.0.tgz"}
            ],
        }
    ],
    "dependencies": [{"ref": "app", "dependsOn": ["pkg:npm/left-pad@1.3.0"]}],
}
LEGACY: dict[str, Any] = {
    "schema": "aether-sbom-v1",
    "app": "shop",
    "digest": DIGEST,
    "content_digest": "b" * 64,
    "runtime": "node20",
    "packages": [{"ref": "pkg:npm/a@1", "name": "a", "version": "1", "path": "node_modules/a", "depends_on": []}],
}


def _bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def _changed(path: str, value: Any) -> dict[str, Any]:
    whole = copy.deepcopy(VALID)
    at: Any = whole
    *parts, last = path.split("/")
    for part in parts:
        at = at[int(part)] if part.isdigit() else at[part]
    if value is ...:
        del at[last]
    else:
        at[int(last) if last.isdigit() else last] = value
    return whole


CHANGES = [
    ("metadata/component/hashes/0/content", DIGEST),
    ("version", 0),
    ("version", "1"),
    ("serialNumber", "urn:uuid:nonsense"),
    ("more", 1),
    ("components/0/more", 1),
    ("components/0/type", "thing"),
    ("components/0/name", ...),
    ("components/0/licenses/0/license/id", "Nobody-s-License"),
    ("components/0/licenses/0", {"expression": "MIT OR Apache-2.0"}),
    ("components/0/licenses", [{"expression": "MIT"}, {"expression": "ISC"}]),
    ("components/0/scope", "sometimes"),
    ("components/0/hashes", [{"alg": "SHA-256", "content": "xyz"}]),
    ("components/0/hashes", [{"alg": "SHA-256", "content": "A" * 64}]),
    ("components/0/externalReferences/0/type", "nowhere"),
    ("components/0/externalReferences/0/hashes", [{"alg": "SHA-1", "content": "0" * 40}]),
    ("dependencies/0/dependsOn", ["a", "a"]),
    ("dependencies/0/ref", ...),
    ("metadata/timestamp", 5),
    ("components", {}),
]


@pytest.mark.parametrize(("path", "value"), CHANGES)
def test_the_verdict_is_that_of_the_strict_validator(path: str, value: Any) -> None:
    data = _bytes(_changed(path, value))
    if THEIRS.validate_str(data.decode()) is None:
        assert sbom.check_document(data) == "cyclonedx-1.6"
    else:
        with pytest.raises(BadRequest, match=r"not valid CycloneDX 1\.6"):
            sbom.check_document(data)


def test_a_valid_document_names_its_artifact() -> None:
    assert THEIRS.validate_str(json.dumps(VALID)) is None
    assert sbom.check_document(_bytes(VALID), DIGEST) == "cyclonedx-1.6"
    with pytest.raises(DigestMismatch, match=DIGEST):
        sbom.check_document(_bytes(VALID), "0" * 64)
    for path in ("metadata/component/hashes", "metadata/component", "metadata"):
        with pytest.raises(BadRequest, match="which artifact"):
            sbom.check_document(_bytes(_changed(path, ...)), DIGEST)
    two = [{"alg": "SHA-256", "content": DIGEST}, {"alg": "SHA-256", "content": "b" * 64}]
    with pytest.raises(BadRequest, match="which artifact"):
        sbom.check_document(_bytes(_changed("metadata/component/hashes", two)), DIGEST)


@pytest.mark.parametrize("version", ["1.4", "1.5"])
def test_older_versions_are_taken(version: str) -> None:
    value = _changed("specVersion", version) | {"$schema": f"http://cyclonedx.org/schema/bom-{version}.schema.json"}
    assert sbom.check_document(_bytes(value), DIGEST) == f"cyclonedx-{version}"


def test_the_legacy_format() -> None:
    assert sbom.check_document(_bytes(LEGACY), DIGEST) == "aether-sbom-v1"
    with pytest.raises(DigestMismatch):
        sbom.check_document(_bytes(LEGACY), "0" * 64)
    for bad in ({"packages": {}}, {"digest": "x"}, {"more": 1}, {"packages": [{"ref": "a"}]}):
        with pytest.raises(BadRequest, match="not valid aether-sbom-v1"):
            sbom.check_document(_bytes(LEGACY | bad))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"bomFormat":"SPDX"}',
        b'{"bomFormat":"CycloneDX","specVersion":"9.9","version":1}',
        b'{"bomFormat":"CycloneDX","specVersion":["1.6"],"version":1}',
        b'{"bomFormat":"CycloneDX","bomFormat":"CycloneDX","specVersion":"1.6","version":1}',
        b'{"bomFormat":"CycloneDX","specVersion":"1.6","version":NaN}',
        b'{"bomFormat":"CycloneDX","specVersion":"1.6","version":1,"$schema":"\\ud800"}',
        b'{"a":' * 100_000,
    ],
)
def test_what_is_no_bill_of_materials_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest):
        sbom.check_document(data)


def test_a_document_has_a_longest_size() -> None:
    with pytest.raises(BadRequest, match="larger"):
        sbom.check_document(b" " * (sbom.MAX_BYTES + 1))


def test_a_thousand_components_take_no_more_than_a_moment() -> None:
    part = VALID["components"][0]
    url = "https://registry.example/left-pad/-/left-pad-1.3.0.tgz?"
    many = [
        {**part, "bom-ref": f"r{n}", "externalReferences": [{"type": "distribution", "url": f"{url}{n}"}]}
        for n in range(1000)
    ]
    data = _bytes(_changed("components", many))
    sbom.check_document(data)
    started = time.process_time()
    sbom.check_document(data, DIGEST)
    assert time.process_time() - started < 2
