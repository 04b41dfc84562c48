"""Where an artifact comes from: an in-toto Statement v1 with the predicate https://slsa.dev/provenance/v1.

Made by the CLI (`Build` → `statement`), carried in a DSSE envelope (`dsse`), read and judged by the server and by
`aether verify`. Collecting what a build used is left to `aether.build`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aether.artifact import strictjson
from aether.model.errors import BadRequest, DigestMismatch
from aether.model.names import check_digest

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILDER_ID = "https://aether.dev/cli/v1"
"""The builder is the CLI on a developer's or CI machine: whoever holds the signing key vouches for it."""
BUILD_TYPE = "https://aether.dev/build/deploy/v1"
"""Names how to read externalParameters; docs/supply-chain.md describes them."""
MEDIA_SBOM = "application/vnd.cyclonedx+json"
MEDIA_JSON = "application/json"


def subject_name(app: str) -> str:
    """What a statement calls the artifact of an app."""
    return f"{app}/app.tar.gz"


@dataclass(frozen=True, slots=True)
class Resource:
    """Something a build used or made besides the artifact; digests by algorithm, in hex."""

    name: str
    digest: Mapping[str, str]
    uri: str | None = None
    media_type: str | None = None
    annotations: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def described(self) -> dict[str, Any]:
        found: dict[str, Any] = {"name": self.name, "digest": dict(self.digest)}
        if self.uri:
            found["uri"] = self.uri
        if self.media_type:
            found["mediaType"] = self.media_type
        if self.annotations:
            found["annotations"] = dict(self.annotations)
        return found


@dataclass(frozen=True, slots=True)
class Build:
    """One build, as its provenance tells of it. Times are RFC 3339 in UTC ("2026-01-31T12:00:00Z")."""

    app: str
    digest: str
    content_digest: str
    parameters: Mapping[str, Any]
    internal: Mapping[str, Any]
    used: Sequence[Resource]
    made: Sequence[Resource]
    invocation_id: str
    started_on: str
    finished_on: str
    versions: Mapping[str, str]


def statement(build: Build) -> dict[str, Any]:
    """The statement about a build."""
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {
                "name": subject_name(build.app),
                "digest": {"sha256": check_digest(build.digest)},
                "annotations": {"contentDigest": f"sha256:{check_digest(build.content_digest)}"},
            }
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": dict(build.parameters),
                "internalParameters": dict(build.internal),
                "resolvedDependencies": [item.described() for item in build.used],
            },
            "runDetails": {
                "builder": {"id": BUILDER_ID, "version": dict(build.versions)},
                "metadata": {
                    "invocationId": build.invocation_id,
                    "startedOn": build.started_on,
                    "finishedOn": build.finished_on,
                },
                "byproducts": [item.described() for item in build.made],
            },
        },
    }


def encode(value: Mapping[str, Any]) -> bytes:
    """A statement as the payload of an envelope."""
    return strictjson.write(value).rstrip(b"\n")


def decode(payload: bytes) -> dict[str, Any]:
    """The statement in `payload`. Raises BadRequest unless it is a Statement v1 with SLSA provenance v1."""
    what = "the provenance"
    value = strictjson.an_object(strictjson.read(payload, what), what)
    if value.get("_type") != STATEMENT_TYPE:
        raise BadRequest(f"{what} is not an in-toto statement ('_type' is not {STATEMENT_TYPE})")
    if value.get("predicateType") != PREDICATE_TYPE:
        raise BadRequest(f"{what} has no predicate of the type {PREDICATE_TYPE}")
    subjects(value)
    predicate = strictjson.an_object(value.get("predicate"), f"the predicate of {what}")
    definition = strictjson.an_object(predicate.get("buildDefinition"), f"'buildDefinition' of {what}")
    strictjson.a_text(definition.get("buildType"), f"'buildType' of {what}")
    strictjson.an_object(definition.get("externalParameters"), f"'externalParameters' of {what}")
    for name in ("resolvedDependencies",):
        strictjson.a_list(definition.get(name, []), f"'{name}' of {what}")
    details = strictjson.an_object(predicate.get("runDetails"), f"'runDetails' of {what}")
    builder = strictjson.an_object(details.get("builder"), f"'builder' of {what}")
    strictjson.a_text(builder.get("id"), f"'builder.id' of {what}")
    return value


def subjects(value: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and SHA-256 of each subject; those without a SHA-256 are left out. Raises BadRequest."""
    what = "a subject of the provenance"
    items = strictjson.a_list(value.get("subject"), "'subject' of the provenance")
    found: list[tuple[str, str]] = []
    for item in items:
        one = strictjson.an_object(item, what)
        name = one.get("name", "")
        digests = strictjson.an_object(one.get("digest"), f"'digest' of {what}")
        digest = digests.get("sha256")
        if not isinstance(name, str) or not digests:
            raise BadRequest(f"{what} has no digest, or a name that is not a text")
        if isinstance(digest, str):
            found.append((name, digest))
    if not items:
        raise BadRequest("the provenance has no subject")
    return found


def check(value: Mapping[str, Any], digest: str, app: str | None = None) -> None:
    """Raises DigestMismatch unless the statement is about the artifact `digest` (and, when given, of `app`)."""
    found = subjects(value)
    names = [name for name, one in found if one == digest]
    if not names:
        said = ", ".join(one[:64] for _, one in found) or "no SHA-256"
        raise DigestMismatch(f"the provenance is about {said}, not about {digest}")
    if app is not None and subject_name(app) not in names:
        raise DigestMismatch(f"the provenance is about '{names[0][:120]}', not about '{subject_name(app)}'")
