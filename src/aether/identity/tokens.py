"""Bearer tokens: checked in constant time, stored only as SHA-256, never logged.

Three kinds: static ones from the settings, the bootstrap admin token that the first start writes to a file
only the server's user can read, and session tokens that `aether login` exchanges one of the others for.
Which route needs which role is declared at the routes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa

from aether.identity.roles import Principal, Role
from aether.model.database import DatabasePort
from aether.model.errors import Unauthorized
from aether.model.names import new_id
from aether.model.times import now_us
from aether.stores.database.tables import tokens

SESSION_SECS = 30 * 86_400
_CACHE_SECS = 10.0
"""How long another server process may go on accepting a token revoked here."""
_CACHE_ENTRIES = 1024
_ANONYMOUS = Principal("anonymous", Role.ADMIN, "anonymous")


class StaticTokenLike(Protocol):
    @property
    def token(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def name(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Session:
    """A new session token; the only moment at which its text is known."""

    principal: Principal
    token: str = field(repr=False)


class TokenService:
    """Decides who a token belongs to. With `required=False` everybody is an anonymous admin."""

    def __init__(
        self, database: DatabasePort, static: Sequence[StaticTokenLike] = (), *, required: bool = True
    ) -> None:
        self._database = database
        self._static = [(_hash(s.token), Principal(s.name, Role.parse(s.role), "static")) for s in static]
        self._required = required
        self._cache: dict[str, tuple[Principal, float]] = {}

    async def authenticate(self, token: str | None) -> Principal:
        """Raises Unauthorized for a missing, unknown, expired or revoked token."""
        if not token:
            if not self._required:
                return _ANONYMOUS
            raise Unauthorized("a token is needed: send 'Authorization: Bearer <token>' (aether login gets one)")
        hashed = _hash(token)
        found = self._find_static(hashed) or self._find_cached(hashed) or await self._find_stored(hashed)
        if found is not None:
            return found
        if not self._required:
            return _ANONYMOUS
        raise Unauthorized("the token is unknown, expired or revoked; get a new one with 'aether login'")

    async def login(self, token: str) -> Session:
        """Exchange a valid token for a session token with the same name and role, valid 30 days and, when
        the given one is a session itself, no longer than that. Raises Unauthorized."""
        given = await self.authenticate(token)
        now = now_us()
        expires_at = now + SESSION_SECS * 1_000_000
        if given.expires_at is not None:
            expires_at = min(expires_at, given.expires_at)
        principal = Principal(given.name, given.role, "session", expires_at)
        session = Session(principal, "aes_" + secrets.token_urlsafe(32))
        async with self._database.write() as tx:
            await tx.execute(sa.delete(tokens).where(tokens.c.kind == "session", tokens.c.expires_at <= now))
            await tx.execute(_insert(session.token, principal, now))
        return session

    async def logout(self, token: str | None) -> None:
        """Revoke a session token; other kinds stay as they are, because they are not the caller's to end."""
        if not token:
            return
        hashed = _hash(token)
        async with self._database.write() as tx:
            await tx.execute(sa.delete(tokens).where(tokens.c.token_hash == hashed, tokens.c.kind == "session"))
        self._cache.pop(hashed, None)

    async def ensure_bootstrap(self, file: Path) -> None:
        """Keep exactly one bootstrap admin token, whose text is in `file` (0600).

        The file is written first: whoever can write it owns the data directory anyway, and a server killed
        between file and row finishes at the next start.
        """
        token = _read_private(file)
        if token is None:
            token = "aeb_" + secrets.token_urlsafe(32)
            _write_private(file, token)
        hashed, now = _hash(token), now_us()
        async with self._database.write() as tx:
            await tx.execute(sa.delete(tokens).where(tokens.c.kind == "bootstrap", tokens.c.token_hash != hashed))
            known = await tx.scalar(sa.select(tokens.c.id).where(tokens.c.token_hash == hashed))
            if known is None:
                await tx.execute(_insert(token, Principal("admin", Role.ADMIN, "bootstrap"), now))

    def _find_static(self, hashed: str) -> Principal | None:
        found: Principal | None = None
        for known, principal in self._static:
            if hmac.compare_digest(known, hashed):
                found = principal
        return found

    def _find_cached(self, hashed: str) -> Principal | None:
        entry = self._cache.get(hashed)
        if entry is None or entry[1] < time.monotonic() or _expired(entry[0]):
            return None
        return entry[0]

    async def _find_stored(self, hashed: str) -> Principal | None:
        async with self._database.read() as tx:
            query = sa.select(tokens).where(tokens.c.token_hash == hashed, tokens.c.revoked_at.is_(None))
            row = (await tx.execute(query)).one_or_none()
        if row is None:
            return None
        principal = Principal(row.name, Role.parse(row.role), row.kind, row.expires_at)
        if _expired(principal):
            return None
        if len(self._cache) >= _CACHE_ENTRIES:
            self._cache.clear()
        self._cache[hashed] = (principal, time.monotonic() + _CACHE_SECS)
        return principal


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def _expired(principal: Principal) -> bool:
    return principal.expires_at is not None and principal.expires_at <= now_us()


def _insert(token: str, principal: Principal, now: int) -> sa.Insert:
    return sa.insert(tokens).values(
        id=new_id(),
        token_hash=_hash(token),
        name=principal.name,
        role=principal.role.label,
        kind=principal.kind,
        created_at=now,
        expires_at=principal.expires_at,
    )


def _read_private(file: Path) -> str | None:
    try:
        text = file.read_text().strip()
    except FileNotFoundError:
        return None
    if file.stat().st_mode & 0o077:
        file.chmod(0o600)
    return text or None


def _write_private(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as out:
        out.write(text + "\n")
        out.flush()
        os.fsync(out.fileno())
    part.rename(file)
