"""Shapes of artifacts in answers, and the registry as routes reach it."""

from __future__ import annotations

import msgspec

from aether.api.services import Services
from aether.model.errors import ServiceUnavailable
from aether.model.times import to_iso
from aether.registry.completing import Completed
from aether.registry.records import Artifact
from aether.registry.service import Registry


class CompleteView(msgspec.Struct):
    """`verified`: a key of the app that is active has signed it."""

    artifact_url: str
    digest: str
    duplicate: bool
    app_linked: bool
    verified: bool
    size_bytes: int


class ArtifactView(msgspec.Struct):
    """`verified`: a key of the app that is active has signed it. A `pinned` one is kept whatever its age."""

    id: str
    app: str
    digest: str
    content_digest: str | None
    runtime: str | None
    size_bytes: int
    verified: bool
    created_at: str
    storage_key: str
    signature: str | None
    pinned: bool
    manifest_digest: str | None
    sbom_digest: str | None
    provenance_digest: str | None


def registry_of(services: Services) -> Registry:
    if services.registry is None:
        raise ServiceUnavailable("this server keeps no artifacts")
    return services.registry


def complete_view(done: Completed) -> CompleteView:
    stored = done.artifact
    return CompleteView(
        artifact_url=f"/artifacts/{stored.digest}/download",
        digest=stored.digest,
        duplicate=done.duplicate,
        app_linked=True,
        verified=stored.verified,
        size_bytes=stored.size_bytes,
    )


def artifact_view(row: Artifact) -> ArtifactView:
    return ArtifactView(
        id=row.id,
        app=row.app,
        digest=row.digest,
        content_digest=row.content_digest,
        runtime=row.runtime,
        size_bytes=row.size_bytes,
        verified=row.verified,
        created_at=to_iso(row.created_at),
        storage_key=row.storage_key,
        signature=row.signature,
        pinned=row.pinned,
        manifest_digest=row.manifest_digest,
        sbom_digest=row.sbom_digest,
        provenance_digest=row.provenance_digest,
    )
