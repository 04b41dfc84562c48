"""Login, refresh, logout and whoami."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Request, get, post
from litestar.params import JSONBody

from aether.api import auditing
from aether.api.auth import token_of
from aether.api.services import Caller, Deps
from aether.identity.sessions import Pair, Replayed
from aether.model.errors import BadRequest, Unauthorized
from aether.model.times import to_iso, to_iso_or_none

Secret = Annotated[str, msgspec.Meta(max_length=4096)]


class Login(msgspec.Struct):
    """Either `username` and `password`, or any valid token."""

    token: Secret | None = None
    username: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    password: Secret | None = None


class Refresh(msgspec.Struct, forbid_unknown_fields=True):
    """`next` is the refresh token that takes the place of this one, drawn by the client (aer_ and 256 random bits
    as URL-safe base64) so that it may repeat a request whose answer it lost."""

    refresh_token: Secret
    next: Secret | None = None


class SessionView(msgspec.Struct):
    """`token` is the access token; `expires_at` is its end. `refresh_token` gets the next one and is used once."""

    token: str
    name: str
    role: str
    expires_at: str
    refresh_token: str | None
    refresh_expires_at: str | None


class Whoami(msgspec.Struct):
    """`teams` are those whose apps the caller may touch besides its own, `apps` the bounds of a scoped token."""

    name: str
    role: str
    kind: str
    expires_at: str | None
    teams: list[str]
    apps: list[str] | None


@post("/auth/login", status_code=200, tags=["auth"])
async def login(data: JSONBody[Login], services: Deps) -> SessionView:
    """Open a session with a password or a token: an access token of 15 minutes and a refresh token of 30 days."""
    identity, note = services.identity, auditing.note()
    if data.token is not None and data.username is None and data.password is None:
        pair = await identity.login_with_token(data.token, note.address)
    elif data.username is not None and data.password is not None and data.token is None:
        try:
            pair = await identity.login_with_password(data.username, data.password, note.address)
        except Unauthorized:
            # people type passwords where names belong: only a name that exists is written
            known = await identity.accounts.exists(data.username)
            note.actor, note.actor_kind = "nobody", "none"
            note.target = data.username if known else "an unknown user"
            raise
    else:
        raise BadRequest("send either 'username' and 'password', or 'token'")
    note.actor, note.actor_kind, note.target = pair.name, "session", pair.session_id
    return session_view(pair)


@post("/auth/refresh", status_code=200, tags=["auth"])
async def refresh(data: JSONBody[Refresh], services: Deps) -> SessionView:
    """Exchange a refresh token, once, for new tokens. A second use ends the session, unless it repeats the first
    with the same `next` before that was used."""
    note = auditing.note()
    try:
        pair = await services.identity.sessions.refresh(data.refresh_token, data.next)
    except Replayed as error:
        note.actor, note.actor_kind, note.target = "nobody", "none", f"session of {error.name}"
        raise
    note.actor, note.actor_kind, note.target = pair.name, "session", pair.session_id
    return session_view(pair)


@post("/auth/logout", status_code=204, tags=["auth"])
async def logout(request: Request[Any, Any, Any], services: Deps, caller: Caller) -> None:
    """End the session whose access token the request carries, with all its tokens."""
    token, _ = token_of(dict(request.scope["headers"]))
    auditing.about(caller.session_id or "")
    await services.identity.logout(token, caller.session_id)


@get("/auth/whoami", tags=["auth"])
async def whoami(caller: Caller) -> Whoami:
    """Who the token belongs to."""
    return Whoami(
        caller.name,
        caller.role.label,
        caller.kind,
        to_iso_or_none(caller.expires_at),
        sorted(caller.teams),
        None if caller.apps is None else sorted(caller.apps),
    )


def session_view(pair: Pair) -> SessionView:
    """What a client is told of new tokens."""
    return SessionView(
        pair.token,
        pair.name,
        pair.role.label,
        to_iso(pair.expires_at),
        pair.refresh_token,
        to_iso_or_none(pair.refresh_expires_at),
    )


HANDLERS = [login, refresh, logout, whoami]
