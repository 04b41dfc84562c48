"""Judging a bill of materials that somebody sends: CycloneDX JSON under the strict schema, or aether-sbom-v1.

The schema is the one that cyclonedx-python-lib's JsonStrictValidator uses, out of that library. It is applied by
jsonschema-rs, because the validator behind JsonStrictValidator takes tens of milliseconds of interpreter time for
each URL: half a minute for an ordinary document, from anybody who may upload one. Tests hold the two verdicts
together. Documents are made elsewhere (`sbom_document`).
"""

import json
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from aether.artifact import strictjson
from aether.artifact.sbom_document import LEGACY
from aether.model.errors import BadRequest, DigestMismatch

if TYPE_CHECKING:
    from jsonschema_rs import Draft7Validator

SPEC_VERSIONS = ("1.4", "1.5", "1.6")
"""Versions of CycloneDX that are taken; Aether itself writes 1.6."""
MAX_BYTES = 32 << 20
"""Longest document that is read: some 40,000 components."""
_BASE = "http://cyclonedx.org/schema/"
_PARTS = ("spdx", "cryptography-defs", "jsf-0.82")
_TEXT = {"type": "string", "minLength": 1}
_HEX = {"type": "string", "pattern": "^[0-9a-f]{64}$"}

LEGACY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["schema", "app", "digest", "content_digest", "runtime", "packages"],
    "properties": {
        "schema": {"const": LEGACY},
        "app": _TEXT,
        "digest": _HEX,
        "content_digest": _HEX,
        "runtime": _TEXT,
        "packages": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["ref", "name", "version", "path", "depends_on"],
                "properties": {
                    "ref": _TEXT,
                    "name": _TEXT,
                    "version": {"type": "string"},
                    "purl": _TEXT,
                    "scope": {"enum": ["required", "optional", "excluded"]},
                    "license": _TEXT,
                    "integrity": _TEXT,
                    "tree_sha256": _HEX,
                    "files": {"type": "integer", "minimum": 0},
                    "path": _TEXT,
                    "finding": _TEXT,
                    "depends_on": {"type": "array", "items": _TEXT},
                },
            },
        },
    },
}
"""The shape of aether-sbom-v1; docs/supply-chain.md says what the fields mean."""


def spdx_ids() -> frozenset[str]:
    """The license ids that the schema knows."""
    return frozenset(_schema("spdx")["enum"])


def _schema(name: str) -> Any:
    from importlib import resources

    return json.loads(resources.files("cyclonedx.schema._res").joinpath(f"{name}.SNAPSHOT.schema.json").read_bytes())


@cache
def _validator(kind: str) -> "Draft7Validator":
    """The compiled schema of a CycloneDX version, or of the legacy format."""
    from jsonschema_rs import Draft7, Draft7Validator, Registry

    if kind == LEGACY:
        return Draft7Validator(LEGACY_SCHEMA)
    parts = [(f"{_BASE}{name}.SNAPSHOT.schema.json", _schema(name)) for name in _PARTS]
    # from 1.4 on there is one schema, and it is the strict one
    return Draft7Validator(_schema(f"bom-{kind}"), registry=Registry(parts, draft=Draft7), validate_formats=True)


def _kind(value: dict[str, Any]) -> str:
    if value.get("schema") == LEGACY:
        return LEGACY
    if value.get("bomFormat") != "CycloneDX":
        raise BadRequest(f"the SBOM is neither CycloneDX (no bomFormat) nor {LEGACY}")
    version = value.get("specVersion")
    if version not in SPEC_VERSIONS:
        raise BadRequest(f"the SBOM is not of a CycloneDX version that is taken ({', '.join(SPEC_VERSIONS)})")
    return cast(str, version)


def _validate(kind: str, value: dict[str, Any]) -> None:
    from jsonschema_rs import ValidationError

    try:
        _validator(kind).validate(value)
    except ValidationError as error:
        where = "/".join(str(part) for part in error.instance_path) or "its top"
        name = LEGACY if kind == LEGACY else f"CycloneDX {kind}"
        raise BadRequest(f"the SBOM is not valid {name}: at {where[:200]}: {error.message[:300]}") from None
    except ValueError as error:
        # numbers beyond 64 bits and nesting beyond what the validator follows
        raise BadRequest(f"the SBOM cannot be validated: {str(error)[:200]}") from None


def named_digest(value: dict[str, Any]) -> str | None:
    """The artifact that a valid document says it is about, None when it names none."""
    if value.get("schema") == LEGACY:
        return cast(str, value["digest"])
    component = value.get("metadata", {}).get("component", {})
    hashes = [item["content"] for item in component.get("hashes", ()) if item["alg"] == "SHA-256"]
    return cast(str, hashes[0]).lower() if len(hashes) == 1 else None


def read(data: bytes) -> tuple[str, dict[str, Any]]:
    """The kind ("cyclonedx-1.6", "aether-sbom-v1") and the value of a valid document. Raises BadRequest."""
    what = "the SBOM"
    if len(data) > MAX_BYTES:
        raise BadRequest(f"{what} is larger than {MAX_BYTES} bytes")
    value = strictjson.an_object(strictjson.read(data, what), what)
    kind = _kind(value)
    _validate(kind, value)
    return (kind if kind == LEGACY else f"cyclonedx-{kind}"), value


def check_document(data: bytes, digest: str | None = None) -> str:
    """The kind of a valid document ("cyclonedx-1.6", "aether-sbom-v1"), about the artifact `digest` when given.

    Raises BadRequest for what is not valid or names no artifact, DigestMismatch when it names another one. Takes
    milliseconds for a thousand components; call it from a thread for the largest.
    """
    kind, value = read(data)
    if digest is not None:
        named = named_digest(value)
        if named is None:
            raise BadRequest(
                "the SBOM does not say which artifact it is about: metadata.component.hashes must have its SHA-256"
            )
        if named != digest:
            raise DigestMismatch(f"the SBOM is about {named}, not about {digest}")
    return kind
