"""Users over a real API, and password hashing that costs tests nothing."""

from __future__ import annotations

from typing import Any

from argon2 import PasswordHasher

from aether.identity.passwords import Passwords
from aether.identity.roles import Role
from aether.identity.secrets import REFRESH, new_token
from support.served import Served

CHEAP = Passwords(PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
PASSWORD = "correct horse"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def add_user(api: Served, name: str, role: Role, *teams: str) -> dict[str, str]:
    """Make a user, and the teams it is in; returns the headers of a session of its own."""
    accounts = api.services.identity.accounts
    await accounts.create_user(name, role, PASSWORD)
    for team in teams:
        if not await accounts.list_teams(frozenset({team}), None, 1):
            await accounts.create_team(team)
        await accounts.add_member(team, name)
    return bearer((await login(api, name))["token"])


async def login(api: Served, name: str, password: str = PASSWORD) -> dict[str, Any]:
    status, session = await api.call("POST", "/auth/login", json={"username": name, "password": password})
    assert status == 200, session
    return session


async def refresh(api: Served, token: str, following: str | None = None) -> tuple[int, dict[str, Any]]:
    body = {"refresh_token": token, "next": following}
    return await api.call("POST", "/auth/refresh", json={k: v for k, v in body.items() if v is not None})


def drawn() -> str:
    """A refresh token as a client draws it."""
    return new_token(REFRESH)
