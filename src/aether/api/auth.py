"""Who may call what: credentials from headers, and the role that each route declares.

A route says `opt=READER`, `opt=DEPLOYER`, `opt=ADMIN` or `opt=PUBLIC`; one that says nothing keeps the API
from being built.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from litestar import Litestar
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from aether.identity.roles import Principal, Role
from aether.model.errors import Forbidden

_OPT = "role"
PUBLIC: dict[str, Any] = {_OPT: None}
"""No token needed."""
READER: dict[str, Any] = {_OPT: Role.READER}
DEPLOYER: dict[str, Any] = {_OPT: Role.DEPLOYER}
ADMIN: dict[str, Any] = {_OPT: Role.ADMIN}


def token_of(headers: dict[bytes, bytes]) -> tuple[str | None, bool]:
    """(token, came by Basic). Basic carries the token as its password, so that a browser can open /swagger."""
    scheme, _, rest = headers.get(b"authorization", b"").partition(b" ")
    rest = rest.strip()
    if scheme.lower() == b"bearer":
        return rest.decode("latin-1") or None, False
    if scheme.lower() == b"basic":
        try:
            decoded = base64.b64decode(rest, validate=True).decode("utf-8", "replace")
        except binascii.Error:
            return None, True
        return decoded.partition(":")[2] or None, True
    return None, False


def refuse_cross_site(headers: dict[bytes, bytes]) -> None:
    """Browsers attach remembered Basic credentials to requests of foreign pages, apps on sibling hosts
    included; such a request is refused. Raises Forbidden."""
    site = headers.get(b"sec-fetch-site", b"none")
    origin = headers.get(b"origin", b"").decode("latin-1")
    host = headers.get(b"host", b"").decode("latin-1")
    if site not in (b"none", b"same-origin") or (origin and urlsplit(origin).netloc != host):
        raise Forbidden("a page of another site may not use this API with a browser's remembered password")


async def principal(request: ASGIConnection[Any, Any, Any, Any]) -> Principal:
    """Dependency: the caller."""
    found: Principal = request.scope["state"]["principal"]
    return found


def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Litestar guard on every route. Raises Forbidden when the caller's role is too small."""
    needed: Role | None = handler.opt.get(_OPT)
    if needed is None:
        return
    caller: Principal = connection.scope["state"]["principal"]
    if caller.role < needed:
        raise Forbidden(f"this needs the role {needed.label}; {caller.name} has {caller.role.label}")


def handlers_of(app: Litestar) -> Iterable[tuple[str, BaseRouteHandler]]:
    """Every (path template, handler) of the API."""
    for route in app.routes:
        handlers: list[Any] = getattr(route, "route_handlers", None) or [getattr(route, "route_handler", None)]
        for handler in handlers:
            # Litestar answers OPTIONS itself; such a handler does nothing and declares nothing.
            if getattr(handler, "http_methods", None) != {"OPTIONS"}:
                yield route.path_format, handler


def public_paths(app: Litestar) -> frozenset[str]:
    """Paths without authentication. Raises RuntimeError for a route that declares no role."""
    found: set[str] = set()
    for path, handler in handlers_of(app):
        if _OPT not in handler.opt:
            raise RuntimeError(f"the route {path} ({handler}) declares no role")
        if handler.opt[_OPT] is None:
            found.add(path)
    return frozenset(found)
