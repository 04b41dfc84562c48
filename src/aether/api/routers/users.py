"""Users, teams, and tokens for machines."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from litestar import delete, get, patch, post, put
from litestar.params import FromPath, JSONBody, QueryParameter

from aether.api import auditing
from aether.api.paging import DEFAULT_LIMIT, Cursor, Limit, Page, decode_cursor, page
from aether.api.services import Caller, Deps
from aether.identity import accounts
from aether.identity.machine_tokens import DEFAULT_SECS, MachineToken
from aether.identity.roles import Principal, Role
from aether.model.errors import BadRequest, Forbidden
from aether.model.times import to_iso

RoleName = Literal["admin", "deployer", "reader"]
Password = Annotated[str, msgspec.Meta(max_length=4096)]
UserFilter = Annotated[str | None, QueryParameter(name="user", max_length=64, description="Only this user's.")]


class NewUser(msgspec.Struct, forbid_unknown_fields=True):
    """Without a password nobody can log in as the user, but tokens can be made for it."""

    name: str
    role: RoleName = "deployer"
    password: Password | None = None
    email: str | None = None


class UserChange(msgspec.Struct, forbid_unknown_fields=True):
    """An admin may change everything; a user its own password, with `current_password`."""

    role: RoleName | None = None
    disabled: bool | None = None
    password: Password | None = None
    current_password: Password | None = None


class User(msgspec.Struct):
    id: str
    name: str
    email: str | None
    auth_provider: str
    role: str
    disabled: bool
    has_password: bool
    teams: list[str]
    created_at: str


class NewTeam(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class Team(msgspec.Struct):
    name: str
    members: list[str]
    created_at: str


class NewToken(msgspec.Struct, forbid_unknown_fields=True):
    """A token that acts for `user` (default: the caller) with `role` (default: deployer, or reader for a reader),
    on `apps` only when they are given, for 90 days unless `expires_in_secs` says otherwise."""

    name: str
    user: str | None = None
    role: RoleName | None = None
    apps: list[str] | None = None
    expires_in_secs: int = DEFAULT_SECS


class Token(msgspec.Struct):
    id: str
    name: str
    user: str
    role: str
    apps: list[str] | None
    created_by: str
    created_at: str
    expires_at: str


class CreatedToken(Token):
    """`token` is shown this once."""

    token: str = ""


@post("/users", tags=["users"])
async def create_user(data: JSONBody[NewUser], services: Deps) -> User:
    """Make a user; 409 when the name is taken by a user or a team."""
    auditing.about(data.name)
    made = await services.identity.accounts.create_user(data.name, Role.parse(data.role), data.password, data.email)
    return _user(made)


@get("/users", tags=["users"])
async def list_users(services: Deps, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Page[User]:
    """Users by name."""
    keys = decode_cursor(cursor, str)
    rows = await services.identity.accounts.list_users(keys[0] if keys else None, limit)
    return page(rows, limit, _user, lambda row: (row.name,))


@patch("/users/{name:str}", tags=["users"])
async def change_user(name: FromPath[str], data: JSONBody[UserChange], services: Deps, caller: Caller) -> User:
    """Disable, enable, give a role or a password. Disabling ends sessions and tokens at once."""
    identity = services.identity
    if not (caller.role_sees_all and caller.apps is None):
        await _check_own_change(name, data, services, caller)
    changed = await identity.accounts.change_user(
        name,
        role=None if data.role is None else Role.parse(data.role),
        disabled=data.disabled,
        password=data.password,
    )
    return _user(changed)


async def _check_own_change(name: str, data: UserChange, services: Deps, caller: Principal) -> None:
    """Raises Forbidden unless a user changes nothing but its own password and knows the one it has."""
    if caller.kind != "session" or caller.user_id is None or caller.apps is not None or caller.name != name:
        raise Forbidden("only an admin may change other users, and only a user that is logged in its own password")
    if data.role is not None or data.disabled is not None or data.password is None:
        raise Forbidden("only an admin may change roles and disable users")
    throttle, address = services.identity.throttle, auditing.note().address
    throttle.begin(name, address)
    if await services.identity.accounts.check_password(name, data.current_password or "") is None:
        raise Forbidden("current_password is wrong")
    throttle.succeeded(name, address)


@post("/teams", tags=["teams"])
async def create_team(data: JSONBody[NewTeam], services: Deps) -> Team:
    """Make a team; 409 when the name is taken by a user or a team."""
    auditing.about(data.name)
    return _team(await services.identity.accounts.create_team(data.name))


@get("/teams", tags=["teams"])
async def list_teams(
    services: Deps, caller: Caller, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None
) -> Page[Team]:
    """The caller's teams by name; an admin's are all."""
    keys = decode_cursor(cursor, str)
    only = None if caller.role_sees_all else caller.owners
    rows = await services.identity.accounts.list_teams(only, keys[0] if keys else None, limit)
    return page(rows, limit, _team, lambda row: (row.name,))


@delete("/teams/{team:str}", tags=["users"])
async def delete_team(team: FromPath[str], services: Deps) -> None:
    """Delete a team that owns no app; 409 while it does."""
    await services.identity.accounts.delete_team(team)


@put("/teams/{team:str}/members/{user:str}", tags=["teams"])
async def add_member(team: FromPath[str], user: FromPath[str], services: Deps) -> Team:
    """Put a user into a team."""
    return _team(await services.identity.accounts.add_member(team, user))


@delete("/teams/{team:str}/members/{user:str}", tags=["teams"])
async def remove_member(team: FromPath[str], user: FromPath[str], services: Deps) -> None:
    """Take a user out of a team."""
    await services.identity.accounts.remove_member(team, user)


@post("/tokens", tags=["tokens"])
async def create_token(data: JSONBody[NewToken], services: Deps, caller: Caller) -> CreatedToken:
    """Make a token for a machine. Its text is in this answer and nowhere else."""
    if caller.kind == "ci" or caller.apps is not None:
        raise Forbidden("a machine's token makes no other tokens; log in as a user")
    user = data.user or (caller.name if caller.user_id is not None else None)
    if user is None:
        raise BadRequest("name the user that the token acts for", {"field": "user"})
    auditing.about(f"{data.name[:100]} for {user[:64]}")
    if user != caller.name and not caller.role_sees_all:
        raise Forbidden("only an admin may make tokens for other users")
    role = None if data.role is None else Role.parse(data.role)
    if role is not None and role > caller.role:
        raise Forbidden(f"your role is {caller.role.label}; a token of yours cannot have more")
    made = await services.identity.machine_tokens.create(
        user, data.name, role, apps=data.apps, expires_in_secs=data.expires_in_secs, created_by=caller.name
    )
    shown = _token(made)
    return CreatedToken(
        shown.id, shown.name, shown.user, shown.role, shown.apps, shown.created_by, shown.created_at,
        shown.expires_at, token=made.token or "",
    )  # fmt: skip


@get("/tokens", tags=["tokens"])
async def list_tokens(
    services: Deps, caller: Caller, user: UserFilter = None, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None
) -> Page[Token]:
    """The caller's tokens that still work, newest first; an admin's are everybody's."""
    whose = _whose(caller) or user
    rows = await services.identity.machine_tokens.list(whose, _position(cursor), limit)
    return page(rows, limit, _token, lambda row: (row.created_at, row.id))


@delete("/tokens/{token_id:str}", tags=["tokens"])
async def revoke_token(token_id: FromPath[str], services: Deps, caller: Caller) -> None:
    """End a token, and the sessions it was exchanged for, at once."""
    await services.identity.machine_tokens.revoke(token_id, _whose(caller))


def _whose(caller: Principal) -> str | None:
    """The user that the caller is bound to; None for an admin."""
    return None if caller.sees_everything else caller.name


def _position(cursor: str | None) -> tuple[int, str] | None:
    keys = decode_cursor(cursor, int, str)
    return None if keys is None else (keys[0], keys[1])


def _user(row: accounts.User) -> User:
    return User(
        row.id, row.name, row.email, row.auth_provider, row.role.label, row.disabled_at is not None,
        row.password_hash is not None, list(row.teams), to_iso(row.created_at),
    )  # fmt: skip


def _team(row: accounts.Team) -> Team:
    return Team(row.name, list(row.members), to_iso(row.created_at))


def _token(row: MachineToken) -> Token:
    apps = None if row.apps is None else list(row.apps)
    return Token(
        row.id, row.name, row.user, row.role.label, apps, row.created_by, to_iso(row.created_at),
        to_iso(row.expires_at),
    )  # fmt: skip


HANDLERS = [
    create_user, list_users, change_user, create_team, list_teams, delete_team, add_member, remove_member,
    create_token, list_tokens, revoke_token,
]  # fmt: skip
