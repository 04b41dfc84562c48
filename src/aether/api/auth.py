"""Credentials from headers, and the caller as handlers get it; what a caller may do is in `authorization`."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection

from aether.identity.roles import Principal
from aether.model.errors import Forbidden


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


def address_of(scope: Mapping[str, Any], headers: dict[bytes, bytes]) -> str:
    """The client's address. Behind the edge, which is the only client of a unix socket, it is what the edge wrote
    into X-Forwarded-For; on a TCP socket that header is a claim of the client's and counts for nothing."""
    client = scope.get("client")
    if client and client[0]:
        return str(client[0])
    return headers.get(b"x-forwarded-for", b"").decode("latin-1").rpartition(",")[2].strip()[:64]
