"""Time-limited URLs that a client may use without a token, signed with HMAC-SHA256 (RFC 2104).

Method, key, exact size, expiry and file name are all under the signature; a URL with anything altered, added
or repeated is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode

from aether.model.errors import BadRequest, Forbidden

_KEY_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
_FIELDS = {
    "PUT": ("size", "expires"),
    "PUT part": ("multipart", "part", "size", "expires"),
    "GET": ("expires", "filename"),
}
MAX_KEY = 300


def check_key(key: str) -> str:
    """Return `key` if it is a relative path of plain segments, else raise BadRequest."""
    segments = key.split("/")
    plain = all(segment and _KEY_CHARS.issuperset(segment) and not segment.startswith(".") for segment in segments)
    if not plain or len(key) > MAX_KEY:
        raise BadRequest("this is not the key of an object")
    return key


@dataclass(frozen=True, slots=True)
class Grant:
    """What a checked URL allows."""

    key: str
    size_bytes: int = 0
    filename: str = ""
    multipart_id: str = ""
    part: int = 0
    """Number of the part of that upload."""


class UrlSigner:
    """`clock` returns seconds since the epoch."""

    def __init__(self, secret: bytes, clock: Callable[[], float] = time.time) -> None:
        self._secret = secret
        self._clock = clock

    def sign(self, method: str, key: str, expires_secs: int, **fields: str | int) -> tuple[str, int]:
        """(URL path with query, expiry in seconds since the epoch)."""
        expires_at = int(self._clock()) + expires_secs
        values = {name: str(value) for name, value in {**fields, "expires": expires_at}.items()}
        values["signature"] = self._signature(_kind(method, values), check_key(key), values)
        return f"/objects/{quote(key)}?{urlencode(values)}", expires_at

    def check(self, method: str, key: str, query: str) -> Grant:
        """Raises Forbidden unless `sign` made exactly this request and it has not expired."""
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=8) if query.count("&") < 8 else []
        values = dict(pairs)
        kind = _kind(method, values)
        names = _FIELDS.get(kind, ())
        if len(values) != len(pairs) or set(values) != {*names, "signature"}:
            raise Forbidden("the URL is not one that was signed here")
        given = values.pop("signature")
        if not hmac.compare_digest(given.encode(), self._signature(kind, key, values).encode()):
            raise Forbidden("the URL was altered, or signed for something else")
        if int(values["expires"]) < self._clock():
            raise Forbidden("the URL has expired; ask for a new one")
        return Grant(
            check_key(key),
            int(values.get("size", "0")),
            values.get("filename", ""),
            values.get("multipart", ""),
            int(values.get("part", "0")),
        )

    def _signature(self, kind: str, key: str, values: dict[str, str]) -> str:
        names = _FIELDS[kind]
        text = "\n".join([kind, key, *(f"{name}={quote(values[name], safe='')}" for name in names)])
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()


def _kind(method: str, values: Mapping[str, str]) -> str:
    return f"{method} part" if "part" in values else method


def load_key(file: Path) -> bytes:
    """The signing key in `file`, made (0600) at the first start. Raises OSError."""
    try:
        return bytes.fromhex(file.read_text())
    except FileNotFoundError:
        pass
    key = secrets.token_bytes(32)
    part = file.with_name(file.name + ".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(key.hex())
        out.flush()
        os.fsync(out.fileno())
    part.rename(file)
    return key
