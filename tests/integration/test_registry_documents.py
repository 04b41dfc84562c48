"""Manifest, SBOM and provenance of artifacts over HTTP: taken, refused, replaced, altered behind the server."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from securesystemslib.dsse import Envelope as TheirEnvelope
from securesystemslib.signer import SSlibKey

from aether.registry import judging
from aether.stores.database.tables import artifacts
from support import supply
from support.served import Served, digest_of, random_bytes, served
from support.supply import Signer

pytestmark = pytest.mark.usefixtures("database_url")

ADMIN = {"Authorization": "Bearer tok-admin"}
DATA = random_bytes(2000)
DIGEST = digest_of(DATA)
MADE = {"manifest": supply.manifest, "sbom": supply.sbom}


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as one:
        await one.add_app("shop")
        await one.add_app("other")
        await one.upload("shop", DATA)
        yield one


async def send(api: Served, kind: str, body: bytes, query: str = "", digest: str = DIGEST) -> tuple[int, Any]:
    return await api.call("POST", f"/artifacts/{digest}/{kind}{query}", data=io.BytesIO(body))


async def get(api: Served, kind: str, query: str = "") -> tuple[int, bytes]:
    async with api.client.get(f"{api.base}/artifacts/{DIGEST}/{kind}{query}") as answer:
        return answer.status, await answer.read()


@pytest.mark.parametrize("kind", MADE)
async def test_a_document_is_given_back_as_it_was_sent(api: Served, kind: str) -> None:
    assert (await get(api, kind))[0] == 404
    body = MADE[kind](DIGEST)
    status, stored = await send(api, kind, body)
    sha256 = hashlib.sha256(body).hexdigest()
    assert (status, stored) == (201, {
        "app": "shop", "digest": DIGEST, "kind": kind, "sha256": sha256, "size_bytes": len(body), "verified": None,
    })  # fmt: skip
    assert await get(api, kind) == (200, body)
    assert f"artifacts/shop/{DIGEST}/{kind}.json" in api.files()
    assert (await api.call("GET", f"/artifacts/{DIGEST}/meta"))[1][f"{kind}_digest"] == sha256
    other = body + b"\n"
    assert (await send(api, kind, other))[0] == 201
    assert await get(api, kind) == (200, other), "the last one counts"


async def test_a_bill_in_the_older_format_is_taken(api: Served) -> None:
    assert (await send(api, "sbom", supply.legacy_sbom(DIGEST)))[0] == 201


@pytest.mark.parametrize(
    ("kind", "body", "code"),
    [
        ("manifest", b"", "bad_request"),
        ("manifest", b"{", "bad_request"),
        ("manifest", b"[]", "bad_request"),
        ("manifest", b'{"version":1}', "bad_request"),
        ("manifest", supply.manifest("e" * 64), "digest_mismatch"),
        ("sbom", b"\xff", "bad_request"),
        ("sbom", b'{"bomFormat":"CycloneDX","specVersion":"1.6"}', "bad_request"),
        ("sbom", supply.sbom(DIGEST, surprise=1), "bad_request"),
        ("sbom", supply.sbom("e" * 64), "digest_mismatch"),
        ("sbom", b"[" * 100_000, "bad_request"),
        ("sbom", supply.sbom(DIGEST)[:-1] + b',"version":2}', "bad_request"),
        ("provenance", supply.envelope("shop", "e" * 64, Signer()), "digest_mismatch"),
        ("provenance", supply.envelope("other", DIGEST, Signer()), "digest_mismatch"),
        ("provenance", json.dumps(supply.statement("shop", DIGEST)).encode(), "bad_request"),
        ("provenance", supply.envelope("shop", DIGEST, *(Signer() for _ in range(15))), "bad_request"),
    ],
)
async def test_what_is_no_such_document_is_refused(api: Served, kind: str, body: bytes, code: str) -> None:
    status, error = await send(api, kind, body)
    assert (status, error["code"]) == (400, code), error
    assert (await get(api, kind))[0] == 404


async def test_the_artifact_must_be_there_and_the_caller_s(api: Served) -> None:
    for digest, status in (("e" * 64, 404), ("E" * 64, 400), ("x", 400)):
        assert (await send(api, "sbom", supply.sbom(DIGEST), digest=digest))[0] == status
    assert (await send(api, "sbom", supply.sbom(DIGEST), "?app=other"))[0] == 404
    await api.upload("other", DATA)
    status, error = await send(api, "sbom", supply.sbom(DIGEST))
    assert (status, error["code"]) == (400, "bad_request")
    assert "?app=" in error["message"]
    assert (await send(api, "sbom", supply.sbom(DIGEST), "?app=other"))[0] == 201
    assert (await get(api, "sbom", "?app=other"))[0] == 200
    assert (await get(api, "sbom", "?app=shop"))[0] == 404


async def test_a_large_document_is_judged_elsewhere(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "LARGE_BYTES", 100)
    assert (await send(api, "sbom", supply.sbom(DIGEST)))[0] == 201
    status, error = await send(api, "sbom", supply.sbom("e" * 64))
    assert (status, error["code"]) == (400, "digest_mismatch")
    assert (await send(api, "manifest", supply.manifest(DIGEST)))[0] == 201
    status, error = await send(api, "manifest", b"{" + b" " * 200)
    assert (status, error["code"]) == (400, "bad_request")


async def test_a_document_beyond_its_limit_is_refused(api: Served) -> None:
    status, error = await send(api, "provenance", b" " * (4 * 1024**2 + 1))
    assert (status, error["code"]) == (413, "payload_too_large")
    status, error = await send(api, "sbom", b" " * (32 * 1024**2 + 1))
    assert (status, error["code"]) == (413, "payload_too_large")


async def test_an_altered_document_is_not_shown(api: Served) -> None:
    await send(api, "sbom", supply.sbom(DIGEST))
    path = api.folder / "objects" / f"artifacts/shop/{DIGEST}/sbom.json"
    path.chmod(0o600)
    path.write_bytes(supply.sbom(DIGEST) + b" ")
    async with api.client.get(f"{api.base}/artifacts/{DIGEST}/sbom") as answer:
        assert (answer.status, (await answer.json())["code"]) == (400, "digest_mismatch")
    path.unlink()
    assert (await get(api, "sbom"))[0] == 404
    assert (await send(api, "sbom", supply.sbom(DIGEST)))[0] == 201
    assert (await get(api, "sbom"))[0] == 200


@pytest.mark.parametrize("killed", ["before-put", "after-put"])
async def test_a_document_that_was_being_replaced_when_the_server_was_killed(api: Served, killed: str) -> None:
    """Neither the one that counted nor the one that replaced it is lost, whichever got how far."""
    old, new = supply.sbom(DIGEST), supply.sbom(DIGEST, version=2)
    await send(api, "sbom", old)
    real = api.objects.put

    async def broken(key: str, *rest: Any) -> None:
        if killed == "after-put":
            await real(key, *rest)
        raise RuntimeError("killed")

    api.objects.put = broken
    assert (await send(api, "sbom", new))[0] == 500
    api.objects.put = real
    async with api.database.read() as tx:
        assert (await tx.scalar(sa.select(artifacts.c.replacing))).startswith("sbom:")
    status, body = await get(api, "sbom")
    assert (status, body) == (200, new if killed == "after-put" else old)
    assert (await send(api, "manifest", supply.manifest(DIGEST)))[0] == 201, "another kind settles it"
    async with api.database.read() as tx:
        assert await tx.scalar(sa.select(artifacts.c.replacing)) is None
    assert await get(api, "sbom") == (200, body)


# --- provenance


async def add_key(api: Served, key: Signer, app: str = "shop") -> str:
    status, made = await api.call(
        "POST", f"/apps/{app}/public-keys", json={"public_key_hex": key.public_key}, headers=ADMIN
    )
    assert status == 201, made
    return str(made["id"])


def keys_of(*public: str) -> list[SSlibKey]:
    found = []
    for text in public:
        keyid = hashlib.sha256(bytes.fromhex(text)).hexdigest()[:16]
        found.append(SSlibKey(keyid, "ed25519", "ed25519", {"public": text}))
    return found


async def test_provenance_that_a_key_of_the_app_signed_is_signed_by_the_server_too(api: Served) -> None:
    key = Signer()
    await add_key(api, key)
    sent = supply.envelope("shop", DIGEST, key)
    status, stored = await send(api, "provenance", sent)
    assert (status, stored["verified"]) == (201, True)
    assert await get(api, "provenance") == (200, sent)
    (own,) = (await api.call("GET", "/provenance/keys"))[1]["items"]
    assert own["active"] is True
    raw = (await api.call("GET", f"/provenance/{DIGEST}/attestation"))[1]
    theirs = TheirEnvelope.from_dict(raw)
    assert len(theirs.verify(keys_of(key.public_key, own["public_key_hex"]), 2)) == 2
    status, detail = await api.call("GET", f"/provenance/{DIGEST}")
    assert status == 200
    assert detail["statement"]["subject"][0]["digest"]["sha256"] == DIGEST
    assert [(s["by"], s["verified"], s["active"], s["public_key_hex"]) for s in detail["signatures"]] == [
        ("builder", True, True, key.public_key),
        ("server", True, True, own["public_key_hex"]),
    ]
    (listed,) = (await api.call("GET", "/provenance"))[1]["items"]
    assert (listed["app"], listed["digest"], listed["verified"], listed["builder"]) == (
        "shop", DIGEST, True, detail["builder"],
    )  # fmt: skip


async def test_provenance_of_a_stranger_is_kept_and_not_vouched_for(api: Served) -> None:
    stranger = Signer()
    status, stored = await send(api, "provenance", supply.envelope("shop", DIGEST, stranger))
    assert (status, stored["verified"]) == (201, False)
    detail = (await api.call("GET", f"/provenance/{DIGEST}"))[1]
    assert [(s["by"], s["verified"], s["key_id"]) for s in detail["signatures"]] == [("builder", False, None)]
    raw = (await api.call("GET", f"/provenance/{DIGEST}/attestation"))[1]
    assert [one["keyid"] for one in raw["signatures"]] == [stranger.key_id]
    assert (await api.call("GET", "/provenance"))[1]["items"][0]["verified"] is False


async def test_a_deactivated_key_is_told_and_vouches_no_more(api: Served) -> None:
    key = Signer()
    key_id = await add_key(api, key)
    await send(api, "provenance", supply.envelope("shop", DIGEST, key))
    await api.call("DELETE", f"/apps/shop/public-keys/{key_id}")
    detail = (await api.call("GET", f"/provenance/{DIGEST}"))[1]
    assert detail["verified"] is False
    builder = detail["signatures"][0]
    assert (builder["verified"], builder["active"]) == (True, False)


async def test_two_server_keys_sign_during_a_rotation(api: Served) -> None:
    key = Signer()
    await add_key(api, key)
    (old,) = (await api.call("GET", "/provenance/keys"))[1]["items"]
    status, new = await api.call("POST", "/provenance/keys", headers=ADMIN)
    assert (status, new["active"]) == (201, True)
    status, error = await api.call("POST", "/provenance/keys", headers=ADMIN)
    assert (status, error["code"]) == (409, "conflict")
    await send(api, "provenance", supply.envelope("shop", DIGEST, key))
    raw = (await api.call("GET", f"/provenance/{DIGEST}/attestation"))[1]
    theirs = TheirEnvelope.from_dict(raw)
    assert len(theirs.verify(keys_of(key.public_key, old["public_key_hex"], new["public_key_hex"]), 3)) == 3
    status, retired = await api.call("DELETE", f"/provenance/keys/{old['keyid']}", headers=ADMIN)
    assert (status, retired["active"]) == (200, False)
    status, error = await api.call("DELETE", f"/provenance/keys/{new['keyid']}", headers=ADMIN)
    assert (status, error["code"]) == (409, "conflict")
    detail = (await api.call("GET", f"/provenance/{DIGEST}"))[1]
    assert [(s["verified"], s["active"]) for s in detail["signatures"]] == [(True, True), (True, False), (True, True)]
    await send(api, "provenance", supply.envelope("shop", DIGEST, key))
    raw = (await api.call("GET", f"/provenance/{DIGEST}/attestation"))[1]
    assert [one["keyid"] for one in raw["signatures"]] == [key.key_id, new["keyid"]]


async def test_a_signature_that_claims_to_be_the_server_s_does_not_pass_for_it(api: Served) -> None:
    key = Signer()
    await add_key(api, key)
    (own,) = (await api.call("GET", "/provenance/keys"))[1]["items"]
    body = json.loads(supply.envelope("shop", DIGEST, key))
    body["signatures"].append({"keyid": own["keyid"], "sig": base64.b64encode(bytes(64)).decode()})
    assert (await send(api, "provenance", json.dumps(body).encode()))[0] == 201
    raw = (await api.call("GET", f"/provenance/{DIGEST}/attestation"))[1]
    assert [one["keyid"] for one in raw["signatures"]] == [key.key_id, own["keyid"]]
    assert len(TheirEnvelope.from_dict(raw).verify(keys_of(key.public_key, own["public_key_hex"]), 2)) == 2


async def test_the_list_of_provenance_is_paged(api: Served) -> None:
    for n in range(3):
        data = random_bytes(100 + n)
        await api.upload("other", data)
        digest = digest_of(data)
        assert (await send(api, "provenance", supply.envelope("other", digest, Signer()), digest=digest))[0] == 201
    await send(api, "provenance", supply.envelope("shop", DIGEST, Signer()))
    status, first = await api.call("GET", "/provenance?limit=3")
    assert status == 200
    assert first["items"][0]["app"] == "shop"
    rest = (await api.call("GET", f"/provenance?limit=3&cursor={first['next_cursor']}"))[1]
    assert (len(rest["items"]), rest["next_cursor"]) == (1, None)
    assert len((await api.call("GET", "/provenance?app=other"))[1]["items"]) == 3
    assert (await api.call("GET", "/provenance?app=nobody"))[0] == 404
