"""Logins with passwords, rotation of refresh tokens, what ends a session, and the limit on guesses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aether.identity.roles import Role
from support.identity import PASSWORD, add_user, bearer, drawn, login, refresh
from support.served import Served, served

pytestmark = pytest.mark.usefixtures("database_url")


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as one:
        yield one


async def whoami(api: Served, token: str) -> int:
    return (await api.call("GET", "/auth/whoami", headers=bearer(token)))[0]


async def test_a_password_opens_a_session(api: Served) -> None:
    await add_user(api, "ida", Role.DEPLOYER, "web")
    session = await login(api, "ida")
    assert (session["name"], session["role"]) == ("ida", "deployer")
    status, who = await api.call("GET", "/auth/whoami", headers=bearer(session["token"]))
    assert (status, who["kind"], who["teams"], who["expires_at"]) == (200, "session", ["web"], session["expires_at"])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"username": "ida", "password": "wrong password"}, 401),
        ({"username": "nobody", "password": PASSWORD}, 401),
        ({"username": "mute", "password": PASSWORD}, 401),
        ({"username": "gone", "password": PASSWORD}, 401),
        ({"username": "ida", "password": PASSWORD + "x" * 2000}, 401),
        ({"username": "ida", "password": ""}, 401),
        ({"username": "ida"}, 400),
        ({"password": PASSWORD}, 400),
        ({"username": "ida", "password": PASSWORD, "token": "tok-admin"}, 400),
        ({"username": "x" * 65, "password": PASSWORD}, 400),
        ({"token": "wrong"}, 401),
        ({"token": ""}, 401),
        ({}, 400),
    ],
)
async def test_logins_that_fail(api: Served, body: dict[str, str], status: int) -> None:
    accounts = api.services.identity.accounts
    await accounts.create_user("ida", Role.READER, PASSWORD)
    await accounts.create_user("mute", Role.READER, None)
    await accounts.create_user("gone", Role.READER, PASSWORD)
    await accounts.change_user("gone", disabled=True)
    found, answer = await api.call("POST", "/auth/login", json=body)
    assert found == status, answer
    if status == 401 and "username" in body:
        assert answer["message"] == "the user name or the password is wrong, or the user is disabled"


async def test_every_refresh_token_works_once(api: Served) -> None:
    await add_user(api, "ida", Role.DEPLOYER)
    session = await login(api, "ida")
    other = await login(api, "ida")
    status, second = await refresh(api, session["refresh_token"])
    assert status == 200
    assert second["refresh_token"] not in (None, session["refresh_token"])
    assert await whoami(api, second["token"]) == 200
    assert await whoami(api, session["token"]) == 200, "commands under way go on with the token they have"

    status, error = await refresh(api, session["refresh_token"])
    assert (status, error["code"]) == (401, "unauthorized")
    for token in (session["token"], second["token"]):
        assert await whoami(api, token) == 401, "a replay must end the whole family"
    assert (await refresh(api, second["refresh_token"]))[0] == 401
    assert await whoami(api, other["token"]) == 200, "another session of the same user is not concerned"


async def test_a_lost_answer_may_be_asked_for_again(api: Served) -> None:
    await add_user(api, "ida", Role.DEPLOYER)
    first = (await login(api, "ida"))["refresh_token"]
    second, third = drawn(), drawn()
    answers = [await refresh(api, first, second) for _ in range(3)]
    assert [status for status, _ in answers] == [200, 200, 200]
    assert {answer["refresh_token"] for _, answer in answers} == {second}
    assert (await refresh(api, second, third))[0] == 200
    status, _ = await refresh(api, first, second)
    assert status == 401, "once the successor is used, a repetition is a replay"
    assert (await refresh(api, third))[0] == 401


async def test_a_thief_with_the_same_token_and_another_successor_ends_the_session(api: Served) -> None:
    await add_user(api, "ida", Role.DEPLOYER)
    first = (await login(api, "ida"))["refresh_token"]
    second = drawn()
    status, session = await refresh(api, first, second)
    assert status == 200
    assert (await refresh(api, first, drawn()))[0] == 401
    assert await whoami(api, session["token"]) == 401
    assert (await refresh(api, second))[0] == 401


async def test_of_racing_strangers_only_one_gets_through(api: Served) -> None:
    await add_user(api, "ida", Role.DEPLOYER)
    first = (await login(api, "ida"))["refresh_token"]
    answers = await asyncio.gather(*(refresh(api, first, drawn()) for _ in range(8)))
    assert sorted(status for status, _ in answers) == [200] + [401] * 7
    winner = next(answer for status, answer in answers if status == 200)
    assert await whoami(api, winner["token"]) == 401


@pytest.mark.parametrize("following", ["", "short", "aer_" + "x" * 42, "aer_" + "x" * 44, "aer_" + "é" * 43])
async def test_a_successor_must_be_worth_something(api: Served, following: str) -> None:
    await add_user(api, "ida", Role.DEPLOYER)
    first = (await login(api, "ida"))["refresh_token"]
    assert (await refresh(api, first, following))[0] == 400
    assert (await refresh(api, first, first))[0] == 400
    assert (await refresh(api, first))[0] == 200, "nothing was used up"


async def test_a_successor_that_was_used_before_is_refused(api: Served) -> None:
    await add_user(api, "ida", Role.DEPLOYER)
    one, other = (await login(api, "ida"))["refresh_token"], (await login(api, "ida"))["refresh_token"]
    assert (await refresh(api, one, other))[0] == 400
    assert (await refresh(api, one))[0] == 200


async def test_unknown_refresh_tokens(api: Served) -> None:
    for token in ("", "x", drawn(), "tok-admin"):
        assert (await refresh(api, token))[0] == 401


async def test_logout_ends_the_family(api: Served) -> None:
    await add_user(api, "ida", Role.DEPLOYER)
    session = await login(api, "ida")
    _, second = await refresh(api, session["refresh_token"])
    assert (await api.call("POST", "/auth/logout", headers=bearer(second["token"])))[0] == 204
    assert await whoami(api, session["token"]) == 401
    assert await whoami(api, second["token"]) == 401
    assert (await refresh(api, second["refresh_token"]))[0] == 401


async def test_disabling_ends_everything_at_once(api: Served) -> None:
    identity = api.services.identity
    await add_user(api, "ida", Role.DEPLOYER)
    session = await login(api, "ida")
    machine = await identity.machine_tokens.create(
        "ida", "ci", Role.DEPLOYER, apps=None, expires_in_secs=600, created_by="ann"
    )
    assert machine.token
    _, exchanged = await api.call("POST", "/auth/login", json={"token": machine.token})
    live = [session["token"], machine.token, exchanged["token"]]
    assert [await whoami(api, token) for token in live] == [200, 200, 200]
    await identity.accounts.change_user("ida", disabled=True)
    assert [await whoami(api, token) for token in live] == [401, 401, 401]
    assert (await refresh(api, session["refresh_token"]))[0] == 401
    assert (await refresh(api, exchanged["refresh_token"]))[0] == 401
    await identity.accounts.change_user("ida", disabled=False)
    assert [await whoami(api, token) for token in live] == [401, 401, 401], "what was revoked stays so"
    assert await whoami(api, (await login(api, "ida"))["token"]) == 200


async def test_a_new_password_ends_sessions_and_a_new_role_counts_at_once(api: Served) -> None:
    accounts = api.services.identity.accounts
    headers = await add_user(api, "ida", Role.DEPLOYER)
    await accounts.change_user("ida", role=Role.READER)
    assert (await api.call("GET", "/auth/whoami", headers=headers))[1]["role"] == "reader"
    await accounts.change_user("ida", password="another password")
    assert (await api.call("GET", "/auth/whoami", headers=headers))[0] == 401
    await login(api, "ida", "another password")


async def test_guesses_are_limited_by_name(api: Served) -> None:
    await add_user(api, "ida", Role.DEPLOYER)
    for name in ("ida", "nobody"):
        seen = []
        for _ in range(12):
            body = {"username": name, "password": "a guess"}
            async with api.client.post(api.base + "/auth/login", json=body) as answer:
                seen.append(answer.status)
                after = answer.headers.get("Retry-After")
        assert seen == [401] * 10 + [429] * 2, "an unknown name must not be told from a known one"
        assert after is not None
        assert 1 <= int(after) <= 30
    body = {"username": "ida", "password": PASSWORD}
    status, error = await api.call("POST", "/auth/login", json=body)
    assert (status, error["code"]) == (429, "rate_limited")


async def test_guesses_are_limited_by_address(api: Served) -> None:
    seen = []
    for n in range(32):
        status, _ = await api.call("POST", "/auth/login", json={"username": f"u{n}", "password": "a guess"})
        seen.append(status)
    assert seen == [401] * 30 + [429] * 2
    forged = {"X-Forwarded-For": "203.0.113.9"}
    body = {"username": "v", "password": "a guess"}
    assert (await api.call("POST", "/auth/login", json=body, headers=forged))[0] == 429


async def test_logins_that_succeed_are_not_counted(api: Served) -> None:
    await add_user(api, "ida", Role.DEPLOYER)
    for _ in range(15):
        await login(api, "ida")
