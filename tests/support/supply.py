"""Documents about artifacts that are good enough for a server, and keys to sign with."""

from __future__ import annotations

import json
import os
from typing import Any

from aether.artifact import dsse, provenance, signature
from aether.artifact.dsse import Envelope


class Signer:
    """An Ed25519 key of a test's own."""

    def __init__(self, seed: bytes | None = None) -> None:
        self.seed = seed or os.urandom(32)
        self.public_key = signature.public_key(self.seed)
        self.key_id = signature.key_id(self.public_key)

    def sign(self, digest: str) -> str:
        return signature.sign(digest, self.seed)

    def authorize(self, app: str, other: Signer) -> dict[str, str]:
        """The `authorization` that lets another key in."""
        return {"key_id": self.key_id, "signature_hex": signature.authorize(app, other.public_key, self.seed)}


def manifest(digest: str, **changes: Any) -> bytes:
    values = {
        "version": 1, "entries": [], "files": 0, "tar_bytes": 1024, "size_bytes": 100, "content_digest": "c" * 64,
        "digest": digest, **changes,
    }  # fmt: skip
    return json.dumps(values).encode()


def sbom(digest: str, **changes: Any) -> bytes:
    """CycloneDX 1.6 that names the artifact."""
    component = {
        "type": "application", "name": "shop", "bom-ref": "shop", "hashes": [{"alg": "SHA-256", "content": digest}],
    }  # fmt: skip
    values = {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "metadata": {"component": component},
        "components": [], **changes,
    }  # fmt: skip
    return json.dumps(values).encode()


def legacy_sbom(digest: str) -> bytes:
    values = {
        "schema": "aether-sbom-v1", "app": "shop", "digest": digest, "content_digest": "c" * 64, "runtime": "node20",
        "packages": [],
    }  # fmt: skip
    return json.dumps(values).encode()


def statement(app: str, digest: str) -> dict[str, Any]:
    return provenance.statement(
        provenance.Build(
            app=app, digest=digest, content_digest="c" * 64, parameters={"app": app}, internal={}, used=[], made=[],
            invocation_id="1", started_on="2026-01-31T12:00:00Z", finished_on="2026-01-31T12:00:01Z",
            versions={"aether": "1"},
        )
    )  # fmt: skip


def envelope(app: str, digest: str, *signers: Signer) -> bytes:
    made = Envelope(provenance.encode(statement(app, digest)))
    for signer in signers:
        made = made.signed(signer.seed)
    if not signers:
        made = Envelope(made.payload, signatures=(dsse.Signature("unknown", os.urandom(64)),))
    return made.encode()
