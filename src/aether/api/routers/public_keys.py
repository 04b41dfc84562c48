"""Public keys of apps: whose signatures count."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import delete, get, post
from litestar.params import FromPath, JSONBody

from aether.api import auditing
from aether.api.artifact_views import registry_of
from aether.api.paging import Page
from aether.api.services import Caller, Deps
from aether.identity.roles import Role
from aether.model.times import to_iso, to_iso_or_none
from aether.registry.public_keys import PublicKey, authorization

Hex64 = Annotated[str, msgspec.Meta(max_length=64)]


class Authorize(msgspec.Struct, forbid_unknown_fields=True):
    """An active key of the app, by `key_id` (or its id here) or by itself, and its Ed25519 signature of
    `aether-public-key:v1:<app>:<new key in 64 lower-case hex characters>`."""

    signature_hex: Annotated[str, msgspec.Meta(max_length=128)]
    key_id: Hex64 | None = None
    public_key_hex: Hex64 | None = None


class NewPublicKey(msgspec.Struct, forbid_unknown_fields=True):
    """An Ed25519 public key in 64 lower-case hex characters; whoever is no admin needs `authorization`."""

    public_key_hex: str
    authorization: Authorize | None = None


class PublicKeyView(msgspec.Struct):
    id: str
    app_id: str
    key_id: str
    public_key_hex: str
    active: bool
    created_by: str
    created_at: str
    deactivated_at: str | None


@get("/apps/{app:str}/public-keys", tags=["apps"])
async def list_keys(app: FromPath[str], services: Deps) -> Page[PublicKeyView]:
    """The app's keys, deactivated ones too, newest first; there are so few that they are one page."""
    return Page([_view(key) for key in await registry_of(services).public_keys.list(app)])


@post("/apps/{app:str}/public-keys", tags=["apps"])
async def add_key(app: FromPath[str], data: JSONBody[NewPublicKey], services: Deps, caller: Caller) -> PublicKeyView:
    """Let a key in; one that is active stays as it is."""
    auditing.about(f"{app} {data.public_key_hex[:64]}")
    given = data.authorization
    made = await registry_of(services).public_keys.add(
        app,
        data.public_key_hex,
        trusted=caller.role is Role.ADMIN,
        authorization=given and authorization(given.key_id, given.public_key_hex, given.signature_hex),
        actor=caller.name,
    )
    return _view(made)


@delete("/apps/{app:str}/public-keys/{key_id:str}", status_code=200, tags=["apps"])
async def deactivate_key(app: FromPath[str], key_id: FromPath[str], services: Deps) -> PublicKeyView:
    """Deactivate a key: nothing that it signed counts any more."""
    return _view(await registry_of(services).public_keys.deactivate(app, key_id))


def _view(key: PublicKey) -> PublicKeyView:
    return PublicKeyView(
        key.id,
        key.app_id,
        key.key_id,
        key.public_key_hex,
        key.active,
        key.created_by,
        to_iso(key.created_at),
        to_iso_or_none(key.deactivated_at),
    )


HANDLERS = [list_keys, add_key, deactivate_key]
