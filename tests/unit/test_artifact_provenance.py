"""Provenance statements: in-toto's own library accepts them, and one about another artifact is told apart."""

import json
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement

from aether.artifact import provenance
from aether.artifact.provenance import Build, Resource
from aether.model.errors import BadRequest, DigestMismatch, InvalidDigest

DIGEST, CONTENT = "a" * 64, "b" * 64
BUILD = Build(
    app="shop",
    digest=DIGEST,
    content_digest=CONTENT,
    parameters={"app": "shop", "runtime": "node20", "start": ["npm", "start"]},
    internal={"compressionLevel": 2},
    used=[
        Resource("package-lock.json", {"sha256": "c" * 64}),
        Resource(
            "source", {"gitCommit": "d" * 40}, uri="git+https://example.com/x@main", annotations={"dirty": True}
        ),
    ],
    made=[Resource("sbom", {"sha256": "e" * 64}, media_type=provenance.MEDIA_SBOM)],
    invocation_id="01890000-0000-7000-8000-000000000000",
    started_on="2026-01-31T12:00:00Z",
    finished_on="2026-01-31T12:00:09Z",
    versions={"aether": "0.1.0", "node": "20.11.1"},
)


def test_in_toto_reads_the_statement() -> None:
    value = json.loads(provenance.encode(provenance.statement(BUILD)))
    statement = ParseDict(value, statement_pb2.Statement())
    Statement.copy_from_pb(statement).validate()
    assert statement.subject[0].name == "shop/app.tar.gz"
    assert statement.subject[0].digest["sha256"] == DIGEST
    predicate = ParseDict(value["predicate"], provenance_pb2.Provenance())
    assert predicate.build_definition.build_type == provenance.BUILD_TYPE
    assert predicate.run_details.builder.id == provenance.BUILDER_ID
    assert predicate.run_details.metadata.started_on.seconds == 1769860800
    assert [item.name for item in predicate.build_definition.resolved_dependencies] == ["package-lock.json", "source"]
    assert predicate.run_details.byproducts[0].media_type == provenance.MEDIA_SBOM


def test_what_is_written_is_read_again_and_equal_builds_are_equal_bytes() -> None:
    payload = provenance.encode(provenance.statement(BUILD))
    assert provenance.decode(payload) == provenance.statement(BUILD)
    assert provenance.encode(provenance.statement(replace(BUILD))) == payload


def test_it_is_about_one_artifact_of_one_app() -> None:
    value = provenance.statement(BUILD)
    provenance.check(value, DIGEST)
    provenance.check(value, DIGEST, "shop")
    with pytest.raises(DigestMismatch, match=CONTENT):
        provenance.check(value, CONTENT)
    with pytest.raises(DigestMismatch, match="other/app"):
        provenance.check(value, DIGEST, "other")
    with pytest.raises(InvalidDigest):
        provenance.statement(replace(BUILD, digest="A" * 64))


def _changed(path: str, value: Any) -> bytes:
    whole = provenance.statement(BUILD)
    at: Any = whole
    *parts, last = path.split("/")
    for part in parts:
        at = at[int(part)] if part.isdigit() else at[part]
    at[last] = value
    return json.dumps(whole).encode()


@pytest.mark.parametrize(
    "payload",
    [
        b"[]",
        b"{}",
        b'{"_type":1,"_type":2}',
        _changed("_type", "https://in-toto.io/Statement/v0.1"),
        _changed("predicateType", "https://slsa.dev/provenance/v0.2"),
        _changed("predicate", []),
        _changed("predicate/buildDefinition", None),
        _changed("predicate/buildDefinition/buildType", ""),
        _changed("predicate/buildDefinition/externalParameters", 1),
        _changed("predicate/buildDefinition/resolvedDependencies", {}),
        _changed("predicate/runDetails/builder/id", 7),
        _changed("subject", []),
        _changed("subject", [{"name": "x"}]),
        _changed("subject", [{"name": 1, "digest": {"sha256": DIGEST}}]),
        _changed("subject/0/digest", {}),
    ],
)
def test_what_is_no_provenance_is_refused(payload: bytes) -> None:
    with pytest.raises(BadRequest):
        provenance.decode(payload)


def test_a_subject_without_sha256_is_about_nothing_we_know() -> None:
    value = provenance.decode(_changed("subject", [{"name": "shop/app.tar.gz", "digest": {"sha512": "a" * 128}}]))
    with pytest.raises(DigestMismatch, match="no SHA-256"):
        provenance.check(value, DIGEST)
