"""Users and teams: made by admins, owners of apps, never renamed. A user is never deleted but disabled, a team only
when it owns nothing.

Names of both are one space, held by the database, because an app's owner is written as such a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.identity.passwords import Passwords
from aether.identity.roles import DEFAULT_TEAM, Principal, Role
from aether.identity.sessions import revoke_sessions
from aether.model.database import DatabasePort
from aether.model.errors import BadRequest, Conflict, NotFound
from aether.model.names import new_id
from aether.model.times import now_us
from aether.stores.database.tables import applications, functions, memberships, owners, teams, tokens, users

MAX_NAME = 64
RESERVED = frozenset({"admin", "anonymous", "api-token", DEFAULT_TEAM})
"""Names that credentials without a user carry."""
_FIRST = frozenset("abcdefghijklmnopqrstuvwxyz")
_REST = _FIRST | frozenset("0123456789-_.")


@dataclass(frozen=True, slots=True)
class User:
    """Times are microseconds since the epoch."""

    id: str
    name: str
    email: str | None
    auth_provider: str
    role: Role
    created_at: int
    disabled_at: int | None
    password_hash: str | None = field(repr=False)
    teams: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Team:
    name: str
    created_at: int
    members: tuple[str, ...] = ()


class Accounts:
    """`forget` is called after every change that may take something away from somebody."""

    def __init__(self, database: DatabasePort, passwords: Passwords, forget: Callable[[], None]) -> None:
        self._database = database
        self._passwords = passwords
        self._forget = forget

    async def create_user(self, name: str, role: Role, password: str | None, email: str | None = None) -> User:
        """Without a password nobody can log in as the user; tokens for it work. Raises BadRequest, Conflict."""
        check_name(name)
        _check_email(email)
        hashed = None if password is None else await self._passwords.hash(password)
        row = {
            "id": new_id(),
            "name": name,
            "email": email,
            "auth_provider": "password",
            "password_hash": hashed,
            "role": role.label,
            "created_at": now_us(),
        }
        try:
            async with self._database.write() as tx:
                await tx.execute(sa.insert(owners).values(name=name, kind="user"))
                await tx.execute(sa.insert(users).values(row))
        except IntegrityError:
            raise Conflict(f"there is already a user or team '{name}', or a user with this address") from None
        # a static token of this name acts for the user from now on
        self._forget()
        return await self.user(name)

    async def user(self, name: str) -> User:
        """Raises NotFound."""
        async with self._database.read() as tx:
            row = (await tx.execute(sa.select(users).where(users.c.name == name))).one_or_none()
            if row is None:
                raise NotFound(f"there is no user '{name}'")
            return (await _with_teams(tx, [row]))[0]

    async def exists(self, name: str) -> bool:
        """Whether there is a user of this name."""
        async with self._database.read() as tx:
            return await tx.scalar(sa.select(users.c.id).where(users.c.name == name)) is not None

    async def list_users(self, after: str | None, limit: int) -> Sequence[User]:
        """By name, `limit` + 1 at most."""
        query = sa.select(users).order_by(users.c.name).limit(limit + 1)
        if after is not None:
            query = query.where(users.c.name > after)
        async with self._database.read() as tx:
            return await _with_teams(tx, (await tx.execute(query)).all())

    async def change_user(
        self, name: str, *, role: Role | None = None, disabled: bool | None = None, password: str | None = None
    ) -> User:
        """Disabling ends every session and token of the user in the same transaction, a new password every session;
        they stay ended when the user is enabled again. Raises NotFound, BadRequest."""
        hashed = None if password is None else await self._passwords.hash(password)
        now = now_us()
        async with self._database.write() as tx:
            # whoever opens a session or makes a token for the user meanwhile holds or awaits the same lock
            query = sa.select(users).where(users.c.name == name).with_for_update(key_share=True)
            found = (await tx.execute(query)).one_or_none()
            if found is None:
                raise NotFound(f"there is no user '{name}'")
            values: dict[str, Any] = {}
            if role is not None:
                values["role"] = role.label
            if hashed is not None:
                values["password_hash"] = hashed
            if disabled is not None:
                values["disabled_at"] = (found.disabled_at or now) if disabled else None
            if values:
                await tx.execute(sa.update(users).where(users.c.id == found.id).values(values))
            if disabled:
                # before the sessions: one that is being opened with a token holds that token
                stored = sa.and_(tokens.c.user_id == found.id, tokens.c.revoked_at.is_(None))
                await tx.execute(sa.select(tokens.c.id).where(stored).order_by(tokens.c.id).with_for_update())
                await tx.execute(sa.update(tokens).where(stored).values(revoked_at=now))
            if disabled or hashed is not None:
                why = "disabled" if disabled else "password"
                await revoke_sessions(tx, now, why, user_id=found.id)
        self._forget()
        return await self.user(name)

    async def check_password(self, name: str, password: str) -> User | None:
        """The user if it may log in with this password; costs the same whatever the answer."""
        async with self._database.read() as tx:
            row = (await tx.execute(sa.select(users).where(users.c.name == name))).one_or_none()
        hashed = None if row is None else row.password_hash
        right = await self._passwords.matches(password, hashed)
        if row is None or hashed is None or not right or row.disabled_at is not None:
            return None
        if self._passwords.is_outdated(hashed):
            renewed = await self._passwords.hash(password)
            async with self._database.write() as tx:
                same = sa.and_(users.c.id == row.id, users.c.password_hash == hashed)
                await tx.execute(sa.update(users).where(same).values(password_hash=renewed))
        return await self.user(name)

    # --- teams

    async def owner_of_new_app(self, caller: Principal, team: str | None) -> str:
        """`team` when the caller belongs to it. Raises NotFound for a team of others or none at all."""
        if team is None:
            return caller.owner
        if not caller.role_sees_all and team not in caller.owners:
            raise NotFound(f"there is no team '{team}'")
        return (await self.team(team)).name

    async def owner_to_be(self, caller: Principal, name: str) -> str:
        """`name` when the caller may give an app to it. Raises NotFound for an unknown owner or a team of others."""
        if caller.role_sees_all or name in caller.owners:
            async with self._database.read() as tx:
                known = await tx.scalar(sa.select(owners.c.name).where(owners.c.name == name)) is not None
            if known or name == DEFAULT_TEAM:
                return name
        raise NotFound(f"there is no user or team '{name}'")

    async def create_team(self, name: str) -> Team:
        """Raises BadRequest, Conflict."""
        check_name(name)
        try:
            async with self._database.write() as tx:
                await tx.execute(sa.insert(owners).values(name=name, kind="team"))
                await tx.execute(sa.insert(teams).values(id=new_id(), name=name, created_at=now_us()))
        except IntegrityError:
            raise Conflict(f"there is already a user or team '{name}'") from None
        self._forget()
        return await self.team(name)

    async def team(self, name: str) -> Team:
        """Raises NotFound."""
        async with self._database.read() as tx:
            row = (await tx.execute(sa.select(teams).where(teams.c.name == name))).one_or_none()
            if row is None:
                raise NotFound(f"there is no team '{name}'")
            return (await _with_members(tx, [row]))[0]

    async def list_teams(self, only: frozenset[str] | None, after: str | None, limit: int) -> Sequence[Team]:
        """By name, `limit` + 1 at most; `only` bounds which."""
        query = sa.select(teams).order_by(teams.c.name).limit(limit + 1)
        if only is not None:
            query = query.where(teams.c.name.in_(only))
        if after is not None:
            query = query.where(teams.c.name > after)
        async with self._database.read() as tx:
            return await _with_members(tx, (await tx.execute(query)).all())

    async def delete_team(self, name: str) -> None:
        """Raises NotFound, Conflict while the team owns apps or functions."""
        async with self._database.write() as tx:
            # whoever makes an app of the team's or gives one to it meanwhile holds or awaits the same lock
            await tx.execute(sa.select(owners.c.name).where(owners.c.name == name).with_for_update())
            if await tx.scalar(sa.select(teams.c.id).where(teams.c.name == name).with_for_update()) is None:
                raise NotFound(f"there is no team '{name}'")
            for table, what in ((applications, "apps"), (functions, "functions")):
                query = sa.select(table.c.name).where(table.c.owner == name).order_by(table.c.name)
                if owned := list((await tx.execute(query.limit(4))).scalars()):
                    few = ", ".join(owned[:3]) + (", ..." if len(owned) > 3 else "")
                    raise Conflict(f"the team owns {what} ({few}): delete them or give them to another owner first")
            await tx.execute(sa.delete(teams).where(teams.c.name == name))
            await tx.execute(sa.delete(owners).where(owners.c.name == name))
        self._forget()

    async def add_member(self, team: str, user: str) -> Team:
        """Idempotent. Raises NotFound."""
        async with self._database.write() as tx:
            team_id, user_id = await _ids(tx, team, user)
            same = sa.and_(memberships.c.team_id == team_id, memberships.c.user_id == user_id)
            if await tx.scalar(sa.select(memberships.c.user_id).where(same)) is None:
                row = {"team_id": team_id, "user_id": user_id, "created_at": now_us()}
                await tx.execute(sa.insert(memberships).values(row))
        self._forget()
        return await self.team(team)

    async def remove_member(self, team: str, user: str) -> None:
        """Idempotent. Raises NotFound for an unknown team or user."""
        async with self._database.write() as tx:
            team_id, user_id = await _ids(tx, team, user)
            same = sa.and_(memberships.c.team_id == team_id, memberships.c.user_id == user_id)
            await tx.execute(sa.delete(memberships).where(same))
        self._forget()


async def acts_for(tx: AsyncConnection, name: str) -> tuple[str, frozenset[str], bool]:
    """(owner of new apps, owners whose apps may be touched, disabled) of a credential called `name`."""
    row = (await tx.execute(sa.select(users.c.id, users.c.disabled_at).where(users.c.name == name))).one_or_none()
    if row is not None:
        query = sa.select(teams.c.name).join(memberships, memberships.c.team_id == teams.c.id)
        found = (await tx.execute(query.where(memberships.c.user_id == row.id))).scalars()
        return name, frozenset({name, *found}), row.disabled_at is not None
    is_team = await tx.scalar(sa.select(teams.c.id).where(teams.c.name == name)) is not None
    owner = name if is_team else DEFAULT_TEAM
    return owner, frozenset({owner}), False


def check_name(name: str) -> str:
    """Return `name` if it may name a user or team, else raise BadRequest."""
    if not 1 <= len(name) <= MAX_NAME or name[0] not in _FIRST or not _REST.issuperset(name):
        raise BadRequest(
            f"a name of a user or team has 1 to {MAX_NAME} of a-z, 0-9, '-', '_' and '.', and begins with a letter",
            {"field": "name"},
        )
    if name in RESERVED:
        raise BadRequest(f"'{name}' is reserved for credentials without a user; choose another", {"field": "name"})
    return name


def _check_email(email: str | None) -> None:
    if email is None:
        return
    local, _, domain = email.partition("@")
    if not local or not domain or len(email) > 254 or not email.isprintable() or " " in email:
        raise BadRequest("the e-mail address is not one", {"field": "email"})


async def _ids(tx: AsyncConnection, team: str, user: str) -> tuple[str, str]:
    """With the team locked: who is in it changes one by one."""
    team_id = await tx.scalar(sa.select(teams.c.id).where(teams.c.name == team).with_for_update())
    if team_id is None:
        raise NotFound(f"there is no team '{team}'")
    user_id = await tx.scalar(sa.select(users.c.id).where(users.c.name == user))
    if user_id is None:
        raise NotFound(f"there is no user '{user}'")
    return team_id, user_id


async def _with_teams(tx: AsyncConnection, rows: Sequence[sa.Row[Any]]) -> list[User]:
    query = sa.select(memberships.c.user_id, teams.c.name).join(teams, teams.c.id == memberships.c.team_id)
    found: dict[str, list[str]] = {row.id: [] for row in rows}
    for user_id, name in await tx.execute(query.where(memberships.c.user_id.in_(found)).order_by(teams.c.name)):
        found[user_id].append(name)
    return [
        User(
            row.id, row.name, row.email, row.auth_provider, Role.parse(row.role), row.created_at, row.disabled_at,
            row.password_hash, tuple(found[row.id]),
        )
        for row in rows
    ]  # fmt: skip


async def _with_members(tx: AsyncConnection, rows: Sequence[sa.Row[Any]]) -> list[Team]:
    query = sa.select(memberships.c.team_id, users.c.name).join(users, users.c.id == memberships.c.user_id)
    found: dict[str, list[str]] = {row.id: [] for row in rows}
    for team_id, name in await tx.execute(query.where(memberships.c.team_id.in_(found)).order_by(users.c.name)):
        found[team_id].append(name)
    return [Team(row.name, row.created_at, tuple(found[row.id])) for row in rows]
