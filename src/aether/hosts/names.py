"""Which names may be custom hosts: one spelling for each, and the ones that belong to somebody else; pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

import idna

from aether.model.errors import BadRequest

_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_RESERVED = (".test", ".localhost")
"""Names that are never delegated (RFC 6761): nobody can prove or contest them."""


def canonical(text: str) -> str:
    """The one spelling of a host: lower case, IDNA 2008 (UTS 46), no final dot. Raises BadRequest."""
    given = text.strip().removesuffix(".")
    if "*" in given:
        raise BadRequest("wildcard hosts are not supported: add each host by its name", {"field": "host"})
    if "://" in given or "/" in given or ":" in given:
        raise BadRequest(f"'{text}' is not a host: write the name alone, without scheme, port or path", _FIELD)
    try:
        ipaddress.ip_address(given)
    except ValueError:
        pass
    else:
        raise BadRequest("an address cannot be a custom host: use a name", _FIELD)
    try:
        name = given.lower() if given.isascii() else idna.encode(given, uts46=True).decode("ascii")
        if "xn--" in name:
            idna.decode(name)
    except (idna.IDNAError, UnicodeError) as error:
        raise BadRequest(f"'{text}' is not a host name: {error}", _FIELD) from None
    labels = name.split(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
        raise BadRequest(f"'{text}' is not a host name: labels of a-z, 0-9 and '-', joined by dots", _FIELD)
    if len(labels) < 2:
        raise BadRequest(f"'{text}' is not a whole host name: it has no dot", _FIELD)
    return name


_FIELD = {"field": "host"}


def check_free(name: str, base_domain: str, api_hosts: Collection[str]) -> None:
    """Raise BadRequest for a canonical name that is the API's or under the base domain."""
    base = base_domain.lower().strip(".")
    if name in {host.lower().rstrip(".") for host in api_hosts}:
        raise BadRequest(f"'{name}' is the address of the API and cannot be an app's", _FIELD)
    if name == base or name.endswith("." + base):
        raise BadRequest(f"names under '{base}' belong to the apps of those names and cannot be added", _FIELD)


def is_reserved(name: str) -> bool:
    """True for names that exist on this machine at most, because no DNS will ever have them."""
    return name.endswith(_RESERVED)
