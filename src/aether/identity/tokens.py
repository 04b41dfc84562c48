"""Bearer tokens: checked in constant time, stored only as SHA-256, never logged.

Four kinds: static ones from the settings, the bootstrap admin token that the first start writes to a file only
the server's user can read, access tokens of sessions, and scoped tokens for machines. Which route needs which
role is in `aether.api.authorization`; what a credential acts for is found here.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from aether.identity.accounts import acts_for
from aether.identity.roles import DEFAULT_TEAM, Principal, Role
from aether.identity.secrets import BOOTSTRAP, hash_token, new_token
from aether.model.database import DatabasePort
from aether.model.errors import Unauthorized
from aether.model.names import new_id
from aether.model.times import now_us
from aether.stores.database.tables import sessions, tokens, users

_CACHE_SECS = 2.0
"""How long another server process may go on accepting what was revoked here; here it ends at once."""
_CACHE_ENTRIES = 1024
_ANONYMOUS = Principal("anonymous", Role.ADMIN, "anonymous")


class StaticTokenLike(Protocol):
    @property
    def token(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def name(self) -> str: ...


class TokenService:
    """Decides who a token belongs to. With `required=False` everybody is an anonymous admin."""

    def __init__(
        self, database: DatabasePort, static: Sequence[StaticTokenLike] = (), *, required: bool = True
    ) -> None:
        self._database = database
        self._static = [(hash_token(s.token), Principal(s.name, Role.parse(s.role), "static")) for s in static]
        self._required = required
        self._cache: dict[str, tuple[Principal, float]] = {}
        self._generation = 0
        self.changed = asyncio.Event()
        """Set, and replaced by a fresh one, when something was revoked or changed."""

    async def authenticate(self, token: str | None) -> Principal:
        """Raises Unauthorized for a missing, unknown, expired or revoked token."""
        if not token:
            if not self._required:
                return _ANONYMOUS
            raise Unauthorized("a token is needed: send 'Authorization: Bearer <token>' (aether login gets one)")
        found = await self.holder(hash_token(token))
        if found is not None:
            return found
        if not self._required:
            return _ANONYMOUS
        raise Unauthorized("the token is unknown, expired or revoked; get a new one with 'aether login'")

    async def holder(self, hashed: str) -> Principal | None:
        """Who the token with this hash belongs to now."""
        if (known := self._find_cached(hashed)) is not None:
            return known
        generation = self._generation
        static = self._find_static(hashed)
        found = await self._find_stored(hashed) if static is None else await self._with_owners(static)
        found = found and replace(found, token_hash=hashed)
        # what was read before a revocation must not be remembered after it
        if found is not None and generation == self._generation:
            if len(self._cache) >= _CACHE_ENTRIES:
                self._cache.clear()
            self._cache[hashed] = (found, time.monotonic() + _CACHE_SECS)
        return found

    def forget(self) -> None:
        """Look everything up anew: something was revoked or changed."""
        self._generation += 1
        self._cache.clear()
        self.changed.set()
        self.changed = asyncio.Event()

    async def again(self, caller: Principal) -> Principal | None:
        """The caller of a request that lasts as it would be let in now, None when it would not.

        A session counts as long as it lasts: an access token's own end only says when it must be renewed.
        """
        if caller.session_id is not None:
            return await self._of_session(caller, caller.session_id)
        return caller if caller.token_hash is None else await self.holder(caller.token_hash)

    async def end_old_session(self, token: str) -> None:
        """Revoke a session of the kind without refresh tokens."""
        old = sa.and_(tokens.c.token_hash == hash_token(token), tokens.c.kind == "session")
        async with self._database.write() as tx:
            await tx.execute(sa.delete(tokens).where(old))
        self.forget()

    async def ensure_bootstrap(self, file: Path, place: str | None = None) -> None:
        """Keep exactly one bootstrap admin token, whose text is in `file` (0600); where servers in several data
        directories share the database, one for each such `place`.

        The file is written first: whoever can write it owns the data directory anyway, and a server killed
        between file and row finishes at the next start.
        """
        token = _read_private(file)
        if token is None:
            token = new_token(BOOTSTRAP)
            _write_private(file, token)
        hashed = hash_token(token)
        row = {"id": new_id(), "token_hash": hashed, "name": "admin", "role": "admin", "kind": "bootstrap"}
        others = sa.and_(tokens.c.kind == "bootstrap", tokens.c.token_hash != hashed)
        if place is not None:
            row["created_by"] = place
            others = sa.and_(others, tokens.c.created_by == place)
        try:
            async with self._database.write() as tx:
                await tx.execute(sa.delete(tokens).where(others))
                known = await tx.scalar(sa.select(tokens.c.id).where(tokens.c.token_hash == hashed))
                if known is None:
                    await tx.execute(sa.insert(tokens).values(created_at=now_us(), **row))
        except IntegrityError:
            return  # another server of this file has just written the same

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

    async def _with_owners(self, static: Principal) -> Principal | None:
        async with self._database.read(brief=True) as tx:
            owner, owners, disabled = await acts_for(tx, static.name)
        return None if disabled else replace(static, owner=owner, owners=owners)

    async def _find_stored(self, hashed: str) -> Principal | None:
        query = (
            sa.select(tokens, users.c.name.label("user"), users.c.role.label("user_role"), users.c.disabled_at)
            .add_columns(sessions.c.revoked_at.label("ended_at"), sessions.c.credential_hash)
            .outerjoin(users, users.c.id == tokens.c.user_id)
            .outerjoin(sessions, sessions.c.id == tokens.c.session_id)
            .where(tokens.c.token_hash == hashed, tokens.c.revoked_at.is_(None))
        )
        async with self._database.read(brief=True) as tx:
            row = (await tx.execute(query)).one_or_none()
            if row is None or row.ended_at is not None or row.disabled_at is not None:
                return None
            owner, owners, disabled = (DEFAULT_TEAM, frozenset({DEFAULT_TEAM}), False)
            if row.kind != "bootstrap":
                owner, owners, disabled = await acts_for(tx, row.user or row.name)
        principal = Principal(
            name=row.user or row.name,
            role=_role(row),
            kind="session" if row.kind == "access" else row.kind,
            expires_at=row.expires_at,
            owner=owner,
            owners=owners,
            apps=None if row.apps is None else frozenset(json.loads(row.apps)),
            user_id=row.user_id,
            session_id=row.session_id,
        )
        return None if disabled or _expired(principal) else principal

    async def _of_session(self, caller: Principal, session_id: str) -> Principal | None:
        query = (
            sa.select(sessions, users.c.name.label("user"), users.c.role.label("user_role"), users.c.disabled_at)
            .outerjoin(users, users.c.id == sessions.c.user_id)
            .where(sessions.c.id == session_id, sessions.c.revoked_at.is_(None), sessions.c.expires_at > now_us())
        )
        async with self._database.read() as tx:
            row = (await tx.execute(query)).one_or_none()
            if row is None or row.disabled_at is not None:
                return None
            owner, owners, disabled = caller.owner, caller.owners, False
            if row.user is not None:
                owner, owners, disabled = await acts_for(tx, row.user)
        if disabled:
            return None
        if row.credential_hash is not None and await self.holder(row.credential_hash) is None:
            return None
        role = min(Role.parse(row.role), Role.parse(row.user_role)) if row.user_role else Role.parse(row.role)
        return replace(caller, role=role, owner=owner, owners=owners)


def _role(row: Any) -> Role:
    """A user's role as it is now; a token or what was exchanged for one has no more than was given to it."""
    own = Role.parse(row.role)
    if row.user_role is None:
        return own
    users_role = Role.parse(row.user_role)
    return users_role if row.kind == "access" and row.credential_hash is None else min(own, users_role)


def _expired(principal: Principal) -> bool:
    return principal.expires_at is not None and principal.expires_at <= now_us()


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
