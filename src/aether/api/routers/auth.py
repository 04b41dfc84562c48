"""Login, logout and whoami."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, get, post
from litestar.params import JSONBody

from aether.api.auth import PUBLIC, READER, token_of
from aether.api.services import Caller, Deps
from aether.model.times import to_iso_or_none


class Login(msgspec.Struct):
    """Any valid token."""

    token: str


class SessionView(msgspec.Struct):
    token: str
    name: str
    role: str
    expires_at: str | None


class Whoami(msgspec.Struct):
    name: str
    role: str
    kind: str
    expires_at: str | None


@post("/auth/login", opt=PUBLIC, status_code=200, tags=["auth"])
async def login(data: JSONBody[Login], services: Deps) -> SessionView:
    """Exchange a token for a session token, valid 30 days."""
    session = await services.tokens.login(data.token)
    who = session.principal
    return SessionView(session.token, who.name, who.role.label, to_iso_or_none(who.expires_at))


@post("/auth/logout", opt=READER, status_code=204, tags=["auth"])
async def logout(request: Request[Any, Any, Any], services: Deps) -> None:
    """End the session whose token the request carries."""
    token, _ = token_of(dict(request.scope["headers"]))
    await services.tokens.logout(token)


@get("/auth/whoami", opt=READER, tags=["auth"])
async def whoami(caller: Caller) -> Whoami:
    """Who the token belongs to."""
    return Whoami(caller.name, caller.role.label, caller.kind, to_iso_or_none(caller.expires_at))


HANDLERS = [login, logout, whoami]
