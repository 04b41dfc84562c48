"""The command line as a user: logins with a password, sessions that renew themselves, users, teams and tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from aether.client.api import connect
from aether.client.session import read_session, write_session
from aether.identity.roles import Role
from aether.model.errors import NetworkError, Unauthorized
from aether.model.times import now_us
from aether.stores.database.tables import sessions, tokens
from support.command import aether, home
from support.identity import PASSWORD, add_user, login, refresh
from support.product import free_port
from support.served import Served, served

pytestmark = pytest.mark.usefixtures("database_url")


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path / "server") as one:
        yield one


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()


@pytest.fixture
def environ(api: Served, tmp_path: Path) -> dict[str, str]:
    return home(tmp_path, api.base)


async def log_in(api: Served, environ: dict[str, str]) -> None:
    await add_user(api, "ida", Role.DEPLOYER)
    code, _, errors = await aether(environ, "login", "--username", "ida", stdin=PASSWORD + "\n")
    assert code == 0, errors


async def let_access_tokens_run_out(api: Served) -> None:
    async with api.database.write() as tx:
        await tx.execute(sa.update(tokens).where(tokens.c.kind == "access").values(expires_at=now_us() - 1))
    api.services.identity.tokens.forget()


async def live_sessions(api: Served) -> int:
    query = sa.select(sa.func.count()).select_from(sessions).where(sessions.c.revoked_at.is_(None))
    async with api.database.read() as tx:
        return int(await tx.scalar(query) or 0)


async def test_a_password_is_asked_for_and_not_kept(api: Served, environ: dict[str, str], tmp_path: Path) -> None:
    await log_in(api, environ)
    content = (tmp_path / "cache" / "aether" / "session.json").read_text()
    assert PASSWORD not in content
    assert json.loads(content)["refresh_token"].startswith("aer_")
    code, _, errors = await aether(environ, "login", "--username", "ida", stdin="wrong password\n")
    assert (code, "wrong" in errors) == (10, True)
    assert (tmp_path / "cache" / "aether" / "session.json").read_text() == content
    assert (await aether(environ, "login", "--username", "ida"))[0] == 2


async def test_a_session_renews_itself(api: Served, environ: dict[str, str]) -> None:
    await log_in(api, environ)
    before = read_session(environ)
    await let_access_tokens_run_out(api)
    code, _, errors = await aether(environ, "apps", "create", "shop", "--format", "json")
    assert code == 40, errors  # this server runs no apps: the request was let through
    after = read_session(environ)
    assert before is not None
    assert after is not None
    assert after.token != before.token
    assert after.refresh_token != before.refresh_token
    assert (after.name, after.next_refresh) == ("ida", "")


async def test_many_commands_at_once_do_not_end_their_session(api: Served, environ: dict[str, str]) -> None:
    await log_in(api, environ)
    lived = await live_sessions(api)
    for _ in range(2):
        await let_access_tokens_run_out(api)
        done = await asyncio.gather(*(aether(environ, "user", "tokens") for _ in range(6)))
        assert [code for code, _, _ in done] == [0] * 6, done
    assert await live_sessions(api) == lived


async def test_a_lost_answer_does_not_cost_the_session(api: Served, environ: dict[str, str]) -> None:
    await log_in(api, environ)
    await let_access_tokens_run_out(api)
    session = read_session(environ)
    assert session is not None
    # what a command leaves that was killed after the server had rotated the token
    session.next_refresh = "aer_" + "n" * 43
    write_session(session, environ)
    assert (await refresh(api, session.refresh_token, session.next_refresh))[0] == 200
    assert (await aether(environ, "user", "tokens"))[0] == 0
    renewed = read_session(environ)
    assert renewed is not None
    assert renewed.refresh_token == "aer_" + "n" * 43


async def test_a_server_that_is_away_does_not_cost_the_session(api: Served, environ: dict[str, str]) -> None:
    await log_in(api, environ)
    session = read_session(environ)
    assert session is not None
    away = f"http://127.0.0.1:{free_port()}"
    session.api_base = away
    write_session(session, environ)
    here = {**environ, "AETHER_API_BASE": away}
    with connect(here) as client:
        with pytest.raises(NetworkError):
            await asyncio.to_thread(client.whoami)
        renew: Any = client.transport._renew  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(NetworkError):
            await asyncio.to_thread(renew, session.token)
    kept = read_session(environ)
    assert kept is not None
    assert (kept.token, kept.refresh_token) == (session.token, session.refresh_token)
    kept.api_base = api.base
    write_session(kept, environ)
    await let_access_tokens_run_out(api)
    assert (await aether(environ, "user", "tokens"))[0] == 0


async def test_a_token_of_another_server_is_not_offered(api: Served, environ: dict[str, str]) -> None:
    await log_in(api, environ)
    await let_access_tokens_run_out(api)
    with connect(environ) as client:
        other = read_session(environ)
        assert other is not None
        other.api_base, other.token = "http://127.0.0.1:1", "aes_of_another_server"
        write_session(other, environ)
        with pytest.raises(Unauthorized):
            await asyncio.to_thread(client.whoami)
        assert client.transport.token != "aes_of_another_server"


async def test_logout_ends_a_session_whose_access_token_ran_out(api: Served, environ: dict[str, str]) -> None:
    await log_in(api, environ)
    lived = await live_sessions(api)
    await let_access_tokens_run_out(api)
    code, _, errors = await aether(environ, "logout")
    assert code == 0, errors
    assert await live_sessions(api) == lived - 1
    assert read_session(environ) is None


async def test_users_teams_and_tokens(api: Served, environ: dict[str, str]) -> None:
    async def run(*words: str, stdin: str = "", code: int = 0) -> Any:
        found, out, errors = await aether(environ, *words, "--format", "json", stdin=stdin)
        assert found == code, (words, out, errors)
        return json.loads(out) if out else None

    assert (await aether(environ, "login", "--token", "tok-admin"))[0] == 0
    words = ("user", "create", "bob", "--role", "deployer", "--email", "bob@example.com")
    made = await run(*words, stdin="bobs password\n")
    assert (made["name"], made["role"], made["has_password"]) == ("bob", "deployer", True)
    assert "password_hash" not in made
    await run("user", "create", "robot", "--no-password")
    for name, code in (("bob", 20), ("Bad Name", 2), ("admin", 2), ("default", 2)):
        await run("user", "create", name, "--no-password", code=code)
    await run("user", "create", "short", stdin="x\n", code=2)
    await run("team", "create", "web")
    assert (await run("team", "add", "web", "bob"))["members"] == ["bob"]
    await run("team", "add", "web", "nobody", code=2)
    assert [team["name"] for team in (await run("team", "list"))["items"]] == ["default", "web"]
    token = await run("user", "token", "robot", "--app", "shop", "--expires", "1h", "--role", "reader")
    assert (token["user"], token["apps"], token["role"]) == ("robot", ["shop"], "reader")
    code, out, errors = await aether(environ, "user", "token", "robot")
    assert code == 0
    assert out.startswith("aec_")
    assert out.strip() not in errors
    assert len((await run("user", "tokens", "robot"))["items"]) == 2
    await run("user", "revoke", token["id"])
    assert len((await run("user", "tokens"))["items"]) == 1

    bob = (await login(api, "bob", "bobs password"))["token"]
    assert (await run("user", "disable", "bob"))["disabled"] is True
    status, _ = await api.call("GET", "/auth/whoami", headers={"Authorization": f"Bearer {bob}"})
    assert status == 401
    await run("user", "enable", "bob")
    assert (await run("user", "role", "bob", "reader"))["role"] == "reader"
    await run("team", "remove", "web", "bob")
    code, out, _ = await aether(environ, "user", "list")
    assert (code, "bob" in out, "robot" in out) == (0, True, True)
