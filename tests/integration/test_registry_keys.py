"""Public keys of apps, and signatures of artifacts judged by them, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from aether.apps.artifact_rows import find_artifact, need_artifact
from aether.apps.records import find_app
from aether.model.errors import SignatureRequired
from aether.registry.policy import ReleasePolicy
from aether.stores.database.tables import public_keys
from support.served import Served, digest_of, random_bytes, served
from support.supply import Signer

pytestmark = pytest.mark.usefixtures("database_url")

ADMIN = {"Authorization": "Bearer tok-admin"}
KEYS = "/apps/shop/public-keys"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as one:
        await one.add_app("shop")
        await one.add_app("other")
        yield one


async def add(api: Served, key: Signer, app: str = "shop", *, admin: bool = True, **more: Any) -> tuple[int, Any]:
    body = {"public_key_hex": key.public_key, **more}
    headers = ADMIN if admin else {}
    return await api.call("POST", f"/apps/{app}/public-keys", json=body, headers=headers)


async def meta(api: Served, digest: str) -> dict[str, Any]:
    status, found = await api.call("GET", f"/artifacts/{digest}/meta")
    assert status == 200, found
    return found


async def test_an_admin_adds_keys_and_a_key_lets_others_in(api: Served) -> None:
    first, second, third = Signer(), Signer(), Signer()
    status, error = await add(api, first, admin=False)
    assert (status, error["code"]) == (403, "forbidden")
    status, made = await add(api, first)
    assert status == 201
    assert (made["public_key_hex"], made["key_id"], made["active"]) == (first.public_key, first.key_id, True)
    assert (await add(api, first))[1]["id"] == made["id"], "adding a key again is no change"
    status, made = await add(api, second, admin=False, authorization=first.authorize("shop", second))
    assert status == 201, made
    signature = second.authorize("shop", third)["signature_hex"]
    word = {"public_key_hex": second.public_key, "signature_hex": signature}
    assert (await add(api, third, admin=False, authorization=word))[0] == 201
    status, listed = await api.call("GET", KEYS)
    assert [key["public_key_hex"] for key in listed["items"]] == [
        third.public_key, second.public_key, first.public_key,
    ]  # fmt: skip


async def test_a_word_for_another_app_or_key_or_from_another_key_lets_nobody_in(api: Served) -> None:
    known, stranger, new, newer = Signer(), Signer(), Signer(), Signer()
    assert (await add(api, known))[0] == 201
    assert (await add(api, stranger, app="other"))[0] == 201
    good = known.authorize("shop", new)
    for authorization in (
        known.authorize("other", new),
        known.authorize("shop", newer),
        stranger.authorize("shop", new),
        {**good, "key_id": stranger.key_id},
        {**good, "signature_hex": "0" * 128},
    ):
        status, error = await add(api, new, admin=False, authorization=authorization)
        assert (status, error["code"]) == (403, "forbidden"), authorization
    for authorization in ({**good, "signature_hex": "zz"}, {**good, "public_key_hex": known.public_key}):
        assert (await add(api, new, admin=False, authorization=authorization))[0] == 400
    assert (await add(api, new, admin=False, authorization=good))[0] == 201


@pytest.mark.parametrize("key", ["", "ab", "G" * 64, "A" * 64, "0" * 64, "01" + "0" * 62, "e" * 65])
async def test_what_is_no_key_is_refused(api: Served, key: str) -> None:
    status, error = await api.call("POST", KEYS, json={"public_key_hex": key}, headers=ADMIN)
    assert (status, error["code"]) == (400, "bad_request")


async def test_a_deactivated_key_vouches_for_nobody_and_comes_back_by_an_admin_only(api: Served) -> None:
    first, second = Signer(), Signer()
    await add(api, first)
    word = first.authorize("shop", second)
    made = (await add(api, second, admin=False, authorization=word))[1]
    status, gone = await api.call("DELETE", f"{KEYS}/{made['id']}")
    assert (status, gone["active"]) == (200, False)
    assert gone["deactivated_at"] is not None
    assert (await api.call("DELETE", f"{KEYS}/{made['id']}"))[0] == 200
    status, error = await add(api, second, admin=False, authorization=word)
    assert (status, error["code"]) == (403, "forbidden"), "what was said once cannot be said again"
    third = Signer()
    status, error = await add(api, third, admin=False, authorization=second.authorize("shop", third))
    assert (status, error["code"]) == (403, "forbidden")
    status, back = await add(api, second)
    assert (status, back["id"], back["active"]) == (201, made["id"], True)
    assert (await api.call("DELETE", "/apps/other/public-keys/" + made["id"]))[0] == 404


async def test_a_signature_by_an_active_key_is_told_at_once(api: Served) -> None:
    key = Signer()
    made = (await add(api, key))[1]
    data = random_bytes(1000)
    digest = digest_of(data)
    signed = await api.presign("shop", data)
    await api.put(signed, data)
    for wrong in ("0" * 127, "g" * 128, key.sign(digest).upper()):
        status, error = await api.complete("shop", data, signed["upload_id"], signature=wrong)
        assert (status, error["code"]) == (400, "bad_request")
    status, done = await api.complete("shop", data, signed["upload_id"], signature=key.sign(digest))
    assert (status, done["verified"]) == (200, True)
    assert (await meta(api, digest))["signature"] == key.sign(digest)
    assert [row["digest"] for row in (await api.call("GET", "/artifacts?verified=true"))[1]["items"]] == [digest]
    assert (await api.call("GET", "/artifacts?verified=false"))[1]["items"] == []
    await api.call("DELETE", f"{KEYS}/{made['id']}")
    assert (await meta(api, digest))["verified"] is False, "a deactivated key counts no more"
    await add(api, key)
    assert (await meta(api, digest))["verified"] is True, "what it signed counts again"


async def test_a_signature_of_a_stranger_or_of_something_else_is_kept_and_not_believed(api: Served) -> None:
    key, stranger = Signer(), Signer()
    await add(api, key)
    for signature in (stranger.sign, lambda digest: key.sign("a" * 64)):
        data = random_bytes(500)
        digest = digest_of(data)
        signed = await api.presign("shop", data)
        await api.put(signed, data)
        status, done = await api.complete("shop", data, signed["upload_id"], signature=signature(digest))
        assert (status, done["verified"]) == (200, False)
    await add(api, stranger)
    assert sorted(row["verified"] for row in (await api.call("GET", "/artifacts"))[1]["items"]) == [False, True]


async def test_a_stored_artifact_is_signed_later_without_an_upload(api: Served) -> None:
    key = Signer()
    await add(api, key)
    data = random_bytes(700)
    digest = digest_of(data)
    await api.upload("shop", data)
    assert (await api.presign("shop", data))["duplicate"] is True
    body = {"app": "shop", "digest": digest, "size_bytes": len(data), "signature": key.sign(digest)}
    status, done = await api.call("POST", "/artifacts/complete", json=body)
    assert (status, done["verified"], done["duplicate"]) == (200, True, True)
    unsigned = {**body, "signature": Signer().sign(digest)}
    status, done = await api.call("POST", "/artifacts/complete", json=unsigned)
    assert (status, done["verified"]) == (200, True), "a good signature is not replaced by another"
    status, error = await api.call("POST", "/artifacts/complete", json={**body, "digest": "e" * 64})
    assert (status, error["code"]) == (404, "not_found")


async def test_deploying_beside_deactivations_and_uploads_is_never_in_the_way(api: Served) -> None:
    """Every change locks in one order: none is taken back for another's sake, and what is recorded was judged by keys
    that counted at that moment."""
    policy = ReleasePolicy(signature=True)
    key = Signer()
    data = random_bytes(600)
    digest = digest_of(data)
    recorded = refused = 0

    async def deploy() -> bool:
        async with api.database.write() as tx:
            app = await find_app(tx, "shop")
            artifact = await find_artifact(tx, app, digest)
            try:
                await policy.check(tx, artifact.id)
            except SignatureRequired:
                return False
            await need_artifact(tx, artifact.id, digest)
            query = sa.select(public_keys.c.active).where(public_keys.c.app_id == app.id)
            assert True in set((await tx.execute(query)).scalars())
            return True

    made = (await add(api, key))[1]
    signed = await api.presign("shop", data)
    await api.put(signed, data)
    assert (await api.complete("shop", data, signed["upload_id"], signature=key.sign(digest)))[1]["verified"] is True
    for turn in range(15):
        other = random_bytes(300 + turn)
        upload = await api.presign("shop", other)
        await api.put(upload, other)
        answers = await asyncio.gather(
            deploy(),
            api.call("DELETE", f"{KEYS}/{made['id']}"),
            api.complete("shop", other, upload["upload_id"], signature=key.sign(digest_of(other))),
            deploy(),
        )
        assert (answers[1][0], answers[2][0]) == (200, 200), answers
        recorded += answers[0] + answers[3]
        refused += 2 - answers[0] - answers[3]
        assert not await deploy()
        assert (await api.call("GET", "/artifacts?verified=true"))[1]["items"] == []
        assert (await add(api, key))[0] == 201
        assert await deploy()
    assert recorded + refused == 30


async def test_where_signatures_are_required_an_unsigned_upload_can_be_completed_with_one(tmp_path: Path) -> None:
    async with served(tmp_path, AETHER_REQUIRE_SIGNATURE="1") as api:
        await api.add_app("shop")
        key = Signer()
        await add(api, key)
        data = random_bytes(900)
        signed = await api.presign("shop", data)
        await api.put(signed, data)
        for more in ({}, {"signature": Signer().sign(digest_of(data))}):
            status, error = await api.complete("shop", data, signed["upload_id"], **more)
            assert (status, error["code"]) == (403, "signature_required")
        assert (await api.call("GET", "/artifacts"))[1]["items"] == []
        good = key.sign(digest_of(data))
        status, done = await api.complete("shop", data, signed["upload_id"], signature=good)
        assert (status, done["verified"]) == (200, True)
