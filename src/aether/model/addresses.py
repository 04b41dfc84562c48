"""Addresses of services as they may be shown."""

from __future__ import annotations

import urllib.parse

_SECRET = ("password", "sslpassword")


def without_passwords(url: str) -> str:
    """The address with `****` for each password in it."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "****"  # nobody can tell what in it is the password
    login, at, host = parts.netloc.rpartition("@")
    user, colon, _ = login.partition(":")
    netloc = f"{user}{colon and ':****'}{at}{host}"
    query = "&".join(
        f"{pair.partition('=')[0]}=****" if pair.partition("=")[0] in _SECRET else pair
        for pair in parts.query.split("&")
    )
    return urllib.parse.urlunsplit(parts._replace(netloc=netloc, query=query))
