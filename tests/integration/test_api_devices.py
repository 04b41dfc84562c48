"""Logging a machine in that has no credentials: over the API, and with the command line on both sides."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from aether.identity.devices import new_code, plain_code, shown_code
from aether.identity.roles import Role
from aether.model.errors import BadRequest
from aether.stores.database.tables import device_logins
from support.command import AETHER, aether, home
from support.identity import PASSWORD, add_user, bearer, login
from support.served import Served, served

pytestmark = pytest.mark.usefixtures("database_url")


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    (tmp_path / "server").mkdir()
    async with served(tmp_path / "server") as one:
        yield one


@pytest.fixture
def environ(api: Served, tmp_path: Path) -> dict[str, str]:
    return home(tmp_path, api.base)


async def begin(api: Served) -> tuple[str, str]:
    """(secret, code)."""
    status, begun = await api.call("POST", "/auth/device", json={"client": "laptop"}, headers={"Authorization": ""})
    assert (status, begun["status"], begun["client"]) == (201, "pending", "laptop")
    return begun["device_code"], begun["user_code"]


async def redeem(api: Served, secret: str, wait: float = 0) -> tuple[int, dict[str, str]]:
    body = {"device_code": secret, "wait_secs": wait}
    return await api.call("POST", "/auth/device/token", json=body, headers={"Authorization": ""})


async def decide(api: Served, code: str, headers: dict[str, str], *, approve: bool = True) -> int:
    return (await api.call("POST", f"/auth/device/{code}", json={"approve": approve}, headers=headers))[0]


async def test_a_device_gets_a_session_of_its_approver(api: Served) -> None:
    ida = await add_user(api, "ida", Role.DEPLOYER, "web")
    secret, code = await begin(api)
    assert (await redeem(api, secret))[0] == 202
    waiting = asyncio.create_task(redeem(api, secret, 20))
    await asyncio.sleep(0)
    assert await decide(api, code.lower().replace("-", " "), ida) == 200
    status, session = await asyncio.wait_for(waiting, 5)
    assert (status, session["name"], session["role"]) == (200, "ida", "deployer")
    assert (await api.call("GET", "/auth/whoami", headers=bearer(session["token"])))[1]["teams"] == ["web"]
    assert (await api.call("POST", "/auth/refresh", json={"refresh_token": session["refresh_token"]}))[0] == 200

    # the secret works once, and ending the approver's own session leaves the device's alone
    assert (await redeem(api, secret))[0] == 404
    assert (await api.call("POST", "/auth/logout", headers=ida))[0] == 204
    assert (await api.call("GET", "/auth/whoami", headers=bearer(session["token"])))[0] == 200
    await api.services.identity.accounts.change_user("ida", disabled=True)
    assert (await api.call("GET", "/auth/whoami", headers=bearer(session["token"])))[0] == 401


async def test_a_device_let_in_with_a_token_ends_with_it(api: Served) -> None:
    ida = await add_user(api, "ida", Role.DEPLOYER)
    made = (await api.call("POST", "/tokens", json={"name": "ci", "role": "reader"}, headers=ida))[1]
    secret, code = await begin(api)
    assert await decide(api, code, bearer(made["token"])) == 200
    _, session = await redeem(api, secret)
    assert session["role"] == "reader"
    assert (await api.call("DELETE", f"/tokens/{made['id']}", headers=ida))[0] == 204
    assert (await api.call("GET", "/auth/whoami", headers=bearer(session["token"])))[0] == 401


async def test_nobody_comes_in_who_was_not_let_in(api: Served) -> None:
    ida = await add_user(api, "ida", Role.READER)
    secret, code = await begin(api)
    assert (await redeem(api, "aed_guess"))[0] == 404
    assert await decide(api, "BBBB-BBBB", ida) == 404
    assert await decide(api, "nonsense!", ida) == 400
    assert await decide(api, code, {"Authorization": ""}) == 401
    assert await decide(api, code, ida, approve=False) == 200
    assert await decide(api, code, ida) == 409
    assert (await redeem(api, secret))[0] == 403

    # approved, but the approver was disabled before the device came back
    secret, code = await begin(api)
    assert await decide(api, code, ida) == 200
    await api.services.identity.accounts.change_user("ida", disabled=True)
    assert (await redeem(api, secret))[0] == 401
    assert (await redeem(api, secret))[0] == 404


async def test_a_code_expires(api: Served) -> None:
    ida = await add_user(api, "ida", Role.READER)
    secret, code = await begin(api)
    async with api.database.write() as tx:
        await tx.execute(sa.update(device_logins).values(expires_at=1))
    assert await decide(api, code, ida) == 404
    assert (await redeem(api, secret))[0] == 404
    await begin(api)
    async with api.database.read() as tx:
        assert await tx.scalar(sa.select(sa.func.count()).select_from(device_logins)) == 1


async def test_a_secret_redeemed_twice_at_once_gives_one_session(api: Served) -> None:
    ida = await add_user(api, "ida", Role.READER)
    secret, code = await begin(api)
    assert await decide(api, code, ida) == 200
    statuses = [status for status, _ in await asyncio.gather(*(redeem(api, secret) for _ in range(8)))]
    assert sorted(statuses) == [200] + [404] * 7


def test_codes_are_read_as_people_type_them() -> None:
    code = new_code()
    assert plain_code(shown_code(code)) == plain_code(shown_code(code).lower()) == plain_code(f" {code} ") == code
    for wrong in ("", "BCDF", "BCDF-GHJA", "BCDF-GHJKL", "ΒCDF-GHJK"):
        with pytest.raises(BadRequest):
            plain_code(wrong)


async def test_two_command_lines(api: Served, environ: dict[str, str]) -> None:
    await add_user(api, "ida", Role.DEPLOYER)
    there = {**environ, "XDG_CACHE_HOME": environ["XDG_CACHE_HOME"] + "-there"}
    code, _, errors = await aether(there, "login", "--username", "ida", stdin=PASSWORD + "\n")
    assert code == 0, errors
    device = await asyncio.create_subprocess_exec(
        AETHER, "login", "--device", env=environ, stdin=-1, stdout=-1, stderr=-1, cwd=environ["HOME"]
    )
    assert device.stderr is not None
    shown = ""
    while "--approve" not in shown:
        shown = (await asyncio.wait_for(device.stderr.readline(), 30)).decode()
    typed = shown.split("--approve ")[1].strip()
    code, _, errors = await aether(there, "login", "--approve", typed)
    assert (code, "add --yes" in errors) == (2, True)
    code, out, errors = await aether(there, "login", "--approve", typed, "--yes", "--format", "json")
    assert code == 0, errors
    assert " on " in json.loads(out)["let_in"]
    out_bytes, _ = await asyncio.wait_for(device.communicate(), 30)
    assert (device.returncode, b"as ida (deployer)" in out_bytes) == (0, True)
    code, out, _ = await aether(environ, "logout")
    assert (code, "ended" in out or "logged out" in out) == (0, True)
    code, _, errors = await aether(there, "login", "--approve", typed, "--yes")
    assert (code != 0, "already" in errors) == (True, True)


async def test_apps_change_hands_and_teams_end(api: Served, environ: dict[str, str]) -> None:
    await add_user(api, "ida", Role.DEPLOYER, "web", "ops")
    await add_user(api, "bob", Role.DEPLOYER, "web")
    bob = bearer((await login(api, "bob"))["token"])
    await api.add_app("shop", "web")
    admin = {"Authorization": "Bearer tok-admin"}
    status, refused = await api.call("DELETE", "/teams/web", headers=admin)
    assert (status, "shop" in refused["message"]) == (409, True)
    # the API of `served` has no apps, so the rule is asked directly
    accounts = api.services.identity.accounts
    caller = await api.services.identity.tokens.authenticate(bob["Authorization"].split()[1])
    assert await accounts.owner_to_be(caller, "web") == "web"
    for other in ("ops", "ida", "nobody"):
        with pytest.raises(Exception, match="there is no user or team"):
            await accounts.owner_to_be(caller, other)
    await accounts.create_team("gone")
    assert (await api.call("DELETE", "/teams/gone", headers=admin))[0] == 204
    assert (await api.call("DELETE", "/teams/gone", headers=admin))[0] == 404
    environ["AETHER_TOKEN"] = "tok-admin"
    code, out, errors = await aether(environ, "audit", "--format", "json", "--limit", "2")
    assert code == 0, errors
    assert [row["outcome"] for row in json.loads(out)["items"]] == ["not_found", "ok"]
    code, out, _ = await aether(environ, "audit", "--actor", "ann")
    assert (code, "DELETE /teams/{team}" in out) == (0, True)
