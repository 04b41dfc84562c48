"""Documents that lie beside artifacts: manifest, SBOM and provenance, taken and given as the bytes that they are."""

from __future__ import annotations

import msgspec
from litestar import Response, get, post
from litestar.params import FromPath, RawBody

from aether.api import auditing
from aether.api.artifact_views import registry_of
from aether.api.routers.artifacts import AppName
from aether.api.services import Caller, Deps, Services
from aether.identity.ownership import visible
from aether.identity.roles import Principal
from aether.registry.documents import LIMITS, Document
from aether.registry.records import MANIFEST, PROVENANCE, SBOM

JSON = "application/json"


class DocumentView(msgspec.Struct):
    """A document that is stored; `sha256` is that of its bytes. `verified` is said of provenance: an active key of
    the app has signed it."""

    app: str
    digest: str
    kind: str
    sha256: str
    size_bytes: int
    verified: bool | None


@post("/artifacts/{digest:str}/manifest", tags=["artifacts"], request_max_body_size=LIMITS[MANIFEST])
async def put_manifest(
    digest: FromPath[str], body: RawBody, services: Deps, caller: Caller, app: AppName = None
) -> DocumentView:
    """Store the manifest that packing wrote, or replace it. `app` is needed where several apps have the artifact."""
    return await _put(MANIFEST, digest, body, services, caller, app)


@get("/artifacts/{digest:str}/manifest", tags=["artifacts"], media_type=JSON)
async def get_manifest(digest: FromPath[str], services: Deps, caller: Caller, app: AppName = None) -> Response[bytes]:
    """The manifest as it was sent."""
    return await _get(MANIFEST, digest, services, caller, app)


@post("/artifacts/{digest:str}/sbom", tags=["artifacts"], request_max_body_size=LIMITS[SBOM])
async def put_sbom(
    digest: FromPath[str], body: RawBody, services: Deps, caller: Caller, app: AppName = None
) -> DocumentView:
    """Store a bill of materials (CycloneDX JSON or aether-sbom-v1) that names the artifact, or replace it."""
    return await _put(SBOM, digest, body, services, caller, app)


@get("/artifacts/{digest:str}/sbom", tags=["artifacts"], media_type=JSON)
async def get_sbom(digest: FromPath[str], services: Deps, caller: Caller, app: AppName = None) -> Response[bytes]:
    """The bill of materials as it was sent."""
    return await _get(SBOM, digest, services, caller, app)


@post("/artifacts/{digest:str}/provenance", tags=["artifacts"], request_max_body_size=LIMITS[PROVENANCE])
async def put_provenance(
    digest: FromPath[str], body: RawBody, services: Deps, caller: Caller, app: AppName = None
) -> DocumentView:
    """Store a DSSE envelope with SLSA provenance about the artifact, or replace it. What an active key of the app has
    signed is signed by the server too."""
    auditing.about(digest)
    provenances = registry_of(services).provenances
    stored, verified = await provenances.put(digest, app, body, caller.name, visible(caller))
    return _view(stored, verified)


@get("/artifacts/{digest:str}/provenance", tags=["artifacts"], media_type=JSON)
async def get_provenance(
    digest: FromPath[str], services: Deps, caller: Caller, app: AppName = None
) -> Response[bytes]:
    """The builder's envelope as it was sent."""
    return await _get(PROVENANCE, digest, services, caller, app)


async def _put(
    kind: str, digest: str, body: bytes, services: Services, caller: Principal, app: str | None
) -> DocumentView:
    auditing.about(digest)
    documents = registry_of(services).documents
    return _view(await documents.put(kind, digest, app, body, caller.name, visible(caller)), None)


async def _get(kind: str, digest: str, services: Services, caller: Principal, app: str | None) -> Response[bytes]:
    found, body = await registry_of(services).documents.get(kind, digest, app, visible(caller))
    headers = {"ETag": f'"{found.document_digest(kind)}"', "X-Content-Type-Options": "nosniff"}
    return Response(body, media_type=JSON, headers=headers)


def _view(stored: Document, verified: bool | None) -> DocumentView:
    return DocumentView(stored.app, stored.digest, stored.kind, stored.sha256, stored.size_bytes, verified)


HANDLERS = [put_manifest, get_manifest, put_sbom, get_sbom, put_provenance, get_provenance]
