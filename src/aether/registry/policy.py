"""What an artifact must have before it is released: a signature, an SBOM, provenance.

Judged in the transaction that records a deployment, whatever it comes from: a deploy, a rollback, or a change of
variables. A release that runs already goes on running, restarts and is scaled without being judged again.

A signature counts when a key that is active at that moment made it; for provenance it counts that such a key was
found in it when it was stored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.model.errors import ProvenanceRequired, SbomRequired, SignatureRequired
from aether.registry.public_keys import active_keys, signer
from aether.settings import Settings
from aether.stores.database.tables import artifacts, attestations

_AS_ARTIFACT = "upload the code as an artifact and name its digest, as `aether deploy` does"


@dataclass(frozen=True, slots=True)
class ReleasePolicy:
    """Implements the ports of the apps and of the functions."""

    signature: bool = False
    sbom: bool = False
    provenance: bool = False

    @staticmethod
    def of(settings: Settings) -> ReleasePolicy:
        return ReleasePolicy(settings.require_signature, settings.enforce_sbom, settings.require_provenance)

    async def check(self, tx: AsyncConnection, artifact_id: str) -> None:
        """Before the artifact is locked: whoever deactivates a key locks the key first. Raises SignatureRequired,
        SbomRequired, ProvenanceRequired."""
        if not (self.signature or self.sbom or self.provenance):
            return
        row = (await tx.execute(sa.select(artifacts).where(artifacts.c.id == artifact_id))).one()
        details = {"digest": row.digest}
        keys = await active_keys(tx, row.app_id, lock=True)
        if self.signature and signer(keys, row.digest, row.signature) is None:
            raise SignatureRequired(_unsigned(row.signature is not None), details)
        if self.sbom and row.sbom_digest is None:
            raise SbomRequired(
                "this server releases artifacts with an SBOM only: deploy without --no-sbom, or send one to "
                f"/artifacts/{row.digest[:12]}.../sbom",
                details,
            )
        if self.provenance:
            query = sa.select(attestations.c.verified_by).where(
                attestations.c.artifact_id == artifact_id, attestations.c.sha256 == row.provenance_digest
            )
            found = await tx.scalar(query)
            if found is None or {key.id for key in keys}.isdisjoint(json.loads(found)):
                raise ProvenanceRequired(_unproven(found is not None), details)

    def check_unknown(self) -> None:
        """For code that is no artifact, of which nothing is known. Raises as `check` does."""
        if self.signature:
            raise SignatureRequired(f"this server runs signed artifacts only: {_AS_ARTIFACT}")
        if self.sbom:
            raise SbomRequired(f"this server runs artifacts with an SBOM only: {_AS_ARTIFACT}")
        if self.provenance:
            raise ProvenanceRequired(f"this server runs artifacts with provenance only: {_AS_ARTIFACT}")


def _unsigned(has_signature: bool) -> str:
    if has_signature:
        return (
            "this server releases signed artifacts only, and no active public key of the app made this artifact's "
            "signature: add the key (an admin may), or sign with one that is active and deploy again"
        )
    return "this server releases signed artifacts only: set AETHER_SIGNING_KEY and deploy again"


def _unproven(has_provenance: bool) -> str:
    if has_provenance:
        return (
            "this server releases artifacts with provenance only, and no public key of the app that is active now "
            "had signed this artifact's when it was stored: sign it with one that is active and deploy again"
        )
    return "this server releases artifacts with provenance only: set AETHER_SIGNING_KEY and deploy again"
