"""What is required of an artifact is required where it is released: by a deploy, a rollback, other variables."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import supply
from support.server import Server, hello, pack, server
from support.supply import Signer


def store(up: Server, app: str, text: str, signer: Signer | None = None, *, later: bool = False) -> str:
    """Upload without deploying; returns the digest. `later`: the signature is said when it is stored already."""
    blob = pack(hello(text))
    digest = hashlib.sha256(blob).hexdigest()
    body = {"app": app, "digest": digest, "size_bytes": len(blob), "runtime": "node20"}
    signed = up.api("POST", "/artifacts/presign", body)[1]
    if signed["method"] == "PUT":
        assert up.api("PUT", signed["url"], blob)[0] == 200
        said = {} if signer is None or later else {"signature": signer.sign(digest)}
        status, done = up.api("POST", "/artifacts/complete", {**body, **said, "upload_id": signed["upload_id"]})
        assert status == 200, done
    if signer is not None and (later or signed["method"] == "NONE"):
        assert up.api("POST", "/artifacts/complete", {**body, "signature": signer.sign(digest)})[0] == 200
    return digest


def deploy(up: Server, app: str, digest: str) -> tuple[int, Any]:
    status, made = up.api("POST", "/deployments", {"app": app, "digest": digest, "command": "node server.js"})
    if status == 201:
        settled = up.settled(made["id"])
        assert settled["status"] == "active", settled
    return status, made


def add_key(up: Server, app: str, signer: Signer) -> str:
    status, made = up.api("POST", f"/apps/{app}/public-keys", {"public_key_hex": signer.public_key})
    assert status == 201, made
    return str(made["id"])


def document(up: Server, digest: str, kind: str, body: bytes) -> None:
    status, said = up.api("POST", f"/artifacts/{digest}/{kind}", body)
    assert status == 201, said


def code(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], answer[1].get("code", "")


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Server]:
    """A server that requires nothing yet; `restart` makes it require something."""
    with server(tmp_path / "up", AETHER_STOP_GRACE_SECS="1") as it:
        it.api("POST", "/apps", {"name": "shop"})
        yield it


def restart(up: Server, **settings: str) -> None:
    up.stop()
    up.environment.update(settings)
    up.start()


def test_signatures_are_required_where_something_is_released(fresh: Server) -> None:
    up, key, other = fresh, Signer(), Signer()
    unsigned = store(up, "shop", "one")
    assert deploy(up, "shop", unsigned)[0] == 201
    signed = store(up, "shop", "two", key)
    stranger = store(up, "shop", "three", other)
    restart(up, AETHER_REQUIRE_SIGNATURE="1")
    assert up.said("shop") == "one", "what runs goes on running"
    for digest in (signed, stranger):
        assert code(deploy(up, "shop", digest)) == (403, "signature_required")
    key_id = add_key(up, "shop", key)
    assert deploy(up, "shop", signed)[0] == 201
    assert up.said("shop") == "two"
    refused = deploy(up, "shop", stranger)
    assert code(refused) == (403, "signature_required")
    assert "no active public key" in refused[1]["message"]
    assert code(up.api("POST", "/apps/shop/rollback", {"version": 1})) == (403, "signature_required")
    assert up.api("PUT", "/apps/shop/config", {"set": {"SAY": "told"}})[0] == 200

    assert up.api("DELETE", f"/apps/shop/public-keys/{key_id}")[0] == 200
    before = up.api("GET", "/apps/shop/config")[1]
    answer = up.api("PUT", "/apps/shop/config", {"set": {"SAY": "not told"}})
    assert code(answer) == (403, "signature_required")
    assert up.api("GET", "/apps/shop/config")[1] == before, "all or nothing"
    assert up.api("POST", "/apps/shop/scale", {"web": 2})[0] == 200, "more of what runs is no release"
    assert code(up.api("POST", "/apps/shop/rollback", {"version": 2})) == (403, "signature_required")

    add_key(up, "shop", other)
    late = store(up, "shop", "two", other)
    assert late == signed
    assert up.api("GET", f"/artifacts/{late}/meta")[1]["verified"] is True, "signed anew, by a key that counts"
    assert up.api("POST", "/apps/shop/rollback", {"version": 2})[0] == 201


def test_a_repeat_is_no_release(fresh: Server) -> None:
    up, key = fresh, Signer()
    digest = store(up, "shop", "one", key)
    made = deploy(up, "shop", digest)[1]
    restart(up, AETHER_REQUIRE_SIGNATURE="1")
    status, again = deploy(up, "shop", digest)
    assert (status, again["id"]) == (200, made["id"])


def test_sbom_and_provenance_are_required_where_something_is_released(fresh: Server) -> None:
    up, key, other = fresh, Signer(), Signer()
    digest = store(up, "shop", "one")
    restart(up, AETHER_ENFORCE_SBOM="true", AETHER_REQUIRE_PROVENANCE="TRUE")
    assert code(deploy(up, "shop", digest)) == (403, "sbom_required")
    document(up, digest, "sbom", supply.sbom(digest))
    assert code(deploy(up, "shop", digest)) == (403, "provenance_required")
    key_id = add_key(up, "shop", key)
    document(up, digest, "provenance", supply.envelope("shop", digest, other))
    assert code(deploy(up, "shop", digest)) == (403, "provenance_required"), "a stranger's"
    document(up, digest, "provenance", supply.envelope("shop", digest, key))
    assert deploy(up, "shop", digest)[0] == 201
    up.api("DELETE", f"/apps/shop/public-keys/{key_id}")
    assert code(up.api("POST", "/apps/shop/rollback", {"version": 1})) == (403, "provenance_required")
    document(up, digest, "provenance", supply.envelope("shop", digest, key, other))
    add_key(up, "shop", other)
    assert code(up.api("POST", "/apps/shop/rollback", {"version": 1})) == (403, "provenance_required")
    document(up, digest, "provenance", supply.envelope("shop", digest, key, other))
    assert up.api("POST", "/apps/shop/rollback", {"version": 1})[0] == 201


def test_an_unsigned_upload_is_refused_before_it_is_verified(fresh: Server) -> None:
    up = fresh
    restart(up, AETHER_REQUIRE_SIGNATURE="1")
    blob = pack(hello("x"))
    digest = hashlib.sha256(blob).hexdigest()
    body = {"app": "shop", "digest": digest, "size_bytes": len(blob)}
    signed = up.api("POST", "/artifacts/presign", body)[1]
    up.api("PUT", signed["url"], blob)
    refused = up.api("POST", "/artifacts/complete", {**body, "upload_id": signed["upload_id"]})
    assert code(refused) == (403, "signature_required")
    headers = {"X-Aether-Artifact-Digest": digest}
    assert code(up.api("POST", "/artifacts?app=shop", blob, headers)) == (403, "signature_required")
    assert up.api("GET", "/artifacts")[1]["items"] == []


def test_an_artifact_altered_behind_the_server_is_not_run(fresh: Server) -> None:
    up = fresh
    good = deploy(up, "shop", store(up, "shop", "good"))[1]
    digest = store(up, "shop", "bad")
    path = up.data / "objects" / "artifacts" / "shop" / digest / "app.tar.gz"
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    status, made = up.api("POST", "/deployments", {"app": "shop", "digest": digest, "command": "node server.js"})
    assert status == 201
    settled = up.settled(made["id"])
    assert (settled["status"], settled["error"]["code"]) == ("failed", "digest_mismatch")
    assert up.said("shop") == "good"
    assert up.app("shop")["release"]["deployment_id"] == good["id"]
