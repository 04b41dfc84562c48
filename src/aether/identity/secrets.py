"""Texts of tokens: made from 256 random bits, recognised by prefix, kept only as SHA-256.

A plain hash is enough for them: what is random to that degree cannot be guessed from its hash, other than a
password (see `aether.identity.passwords`).
"""

from __future__ import annotations

import hashlib
import re
import secrets

ACCESS, REFRESH, CI, BOOTSTRAP, DEVICE = "aes_", "aer_", "aec_", "aeb_", "aed_"
_REFRESH = re.compile(REFRESH + r"[A-Za-z0-9_-]{43}")


def new_token(prefix: str) -> str:
    return prefix + secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def is_refresh_token(text: str) -> bool:
    """Whether `text` has the shape of a refresh token: as many characters as 256 bits take."""
    return _REFRESH.fullmatch(text) is not None
