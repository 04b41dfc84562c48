"""Scoped, expiring tokens for machines (CI): each acts for one user, with a role and apps that may be narrower."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from aether.identity.roles import Role
from aether.identity.secrets import CI, hash_token, new_token
from aether.identity.sessions import revoke_sessions
from aether.model.database import DatabasePort
from aether.model.errors import BadRequest, NotFound
from aether.model.names import check_app_name, new_id
from aether.model.times import now_us
from aether.stores.database.tables import tokens, users

DEFAULT_SECS = 90 * 86_400
MAX_SECS = 366 * 86_400
MAX_APPS = 100


@dataclass(frozen=True, slots=True)
class MachineToken:
    """`token` is known only when it is made. Times are microseconds since the epoch."""

    id: str
    name: str
    user: str
    role: Role
    apps: tuple[str, ...] | None
    created_by: str
    created_at: int
    expires_at: int
    token: str | None = field(default=None, repr=False)


class MachineTokens:
    """`forget` is called after a revocation."""

    def __init__(self, database: DatabasePort, forget: Callable[[], None]) -> None:
        self._database = database
        self._forget = forget

    async def create(
        self,
        user: str,
        name: str,
        role: Role | None,
        *,
        apps: Iterable[str] | None,
        expires_in_secs: int,
        created_by: str,
    ) -> MachineToken:
        """`role` None is deployer, or less when the user has less. Raises BadRequest, NotFound for an unknown or
        disabled user."""
        if not 1 <= len(name) <= 100 or not name.isprintable():
            raise BadRequest("a token's name has 1 to 100 printable characters", {"field": "name"})
        if not 60 <= expires_in_secs <= MAX_SECS:
            raise BadRequest(f"expires_in_secs is 60 to {MAX_SECS}", {"field": "expires_in_secs"})
        scope = None if apps is None else tuple(sorted({check_app_name(app) for app in apps}))
        if scope is not None and not 1 <= len(scope) <= MAX_APPS:
            raise BadRequest(f"a scope names 1 to {MAX_APPS} apps", {"field": "apps"})
        now = now_us()
        text = new_token(CI)
        async with self._database.write() as tx:
            query = sa.select(users).where(users.c.name == user).with_for_update(read=True)
            row = (await tx.execute(query)).one_or_none()
            if row is None or row.disabled_at is not None:
                raise NotFound(f"there is no user '{user}' that could hold a token")
            role = role or min(Role.DEPLOYER, Role.parse(row.role))
            if role > Role.parse(row.role):
                raise BadRequest(f"{user} has the role {row.role}; a token cannot have more", {"field": "role"})
            values: dict[str, Any] = {
                "id": new_id(),
                "token_hash": hash_token(text),
                "name": name,
                "role": role.label,
                "kind": "ci",
                "user_id": row.id,
                "apps": None if scope is None else json.dumps(scope),
                "created_by": created_by,
                "created_at": now,
                "expires_at": now + expires_in_secs * 1_000_000,
            }
            await tx.execute(sa.insert(tokens).values(values))
        return MachineToken(values["id"], name, user, role, scope, created_by, now, values["expires_at"], text)

    async def list(self, user: str | None, before: tuple[int, str] | None, limit: int) -> Sequence[MachineToken]:
        """Those that still work, newest first, `limit` + 1 at most; of one user, or of all."""
        query = _live(now_us())
        if user is not None:
            query = query.where(users.c.name == user)
        if before is not None:
            query = query.where(sa.tuple_(tokens.c.created_at, tokens.c.id) < sa.tuple_(*map(sa.literal, before)))
        query = query.order_by(tokens.c.created_at.desc(), tokens.c.id.desc()).limit(limit + 1)
        async with self._database.read() as tx:
            return [_token(row) for row in await tx.execute(query)]

    async def revoke(self, token_id: str, user: str | None) -> MachineToken:
        """End the token and every session it was exchanged for; `user` bounds whose. Raises NotFound."""
        now = now_us()
        async with self._database.write() as tx:
            query = _live(now).where(tokens.c.id == token_id)
            if user is not None:
                query = query.where(users.c.name == user)
            row = (await tx.execute(query)).one_or_none()
            if row is None:
                raise NotFound(f"there is no token '{token_id}'")
            await tx.execute(sa.update(tokens).where(tokens.c.id == token_id).values(revoked_at=now))
            await revoke_sessions(tx, now, "credential", credential_hash=row.token_hash)
        self._forget()
        return _token(row)


def _live(now: int) -> sa.Select[*tuple[Any, ...]]:
    query = sa.select(tokens, users.c.name.label("user")).join(users, users.c.id == tokens.c.user_id)
    return query.where(tokens.c.kind == "ci", tokens.c.revoked_at.is_(None), tokens.c.expires_at > now)


def _token(row: Any) -> MachineToken:
    apps = None if row.apps is None else tuple(json.loads(row.apps))
    return MachineToken(
        row.id, row.name, row.user, Role.parse(row.role), apps, row.created_by, row.created_at, row.expires_at
    )
