"""The authorization table, row by row: every route called as every kind of caller on a whole server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, cast

import aiohttp
import pytest

from aether.api.authorization import ROUTES, WEBSOCKET
from support import supply
from support.server import Server, hello, server

CALLERS = ("anonymous", "reader", "owner", "other", "admin")
"""reader and owner (a deployer) are in the team that owns the app `shop`, other (a deployer) is not."""
PASSWORD = "correct horse"

# (method, route): (path, body, statuses as anonymous, reader, owner, other, admin); {me} is the caller, {digest}
# and {id} are the app's artifact and deployment. What changes something and must go on working afterwards is sent
# so that whoever is let through learns of a mistake in it (400, 409), which nobody else may.
CALLS: dict[tuple[str, str], tuple[str, Any, int, int, int, int, int]] = {
    ("GET", "/healthz"): ("/healthz", None, 200, 200, 200, 200, 200),
    ("GET", "/health"): ("/health", None, 200, 200, 200, 200, 200),
    ("GET", "/readyz"): ("/readyz", None, 200, 200, 200, 200, 200),
    ("GET", "/startupz"): ("/startupz", None, 200, 200, 200, 200, 200),
    ("GET", "/metrics"): ("/metrics", None, 401, 200, 200, 200, 200),
    ("GET", "/openapi.json"): ("/openapi.json", None, 401, 200, 200, 200, 200),
    ("GET", "/openapi/{path}"): ("/openapi/redoc", None, 401, 200, 200, 200, 200),
    ("GET", "/swagger"): ("/swagger", None, 401, 200, 200, 200, 200),
    ("GET", "/swagger/{file}"): ("/swagger/start.js", None, 401, 200, 200, 200, 200),
    ("POST", "/auth/login"): ("/auth/login", {}, 400, 400, 400, 400, 400),
    ("POST", "/auth/refresh"): ("/auth/refresh", {}, 400, 400, 400, 400, 400),
    ("POST", "/auth/logout"): ("/auth/logout", None, 401, 204, 204, 204, 204),
    ("GET", "/auth/whoami"): ("/auth/whoami", None, 401, 200, 200, 200, 200),
    ("POST", "/auth/device"): ("/auth/device", {"client": "{me}"}, 201, 201, 201, 201, 201),
    ("POST", "/auth/device/token"): ("/auth/device/token", {"device_code": "?"}, 404, 404, 404, 404, 404),
    ("GET", "/auth/device/{user_code}"): ("/auth/device/{code}", None, 401, 200, 200, 200, 200),
    ("POST", "/auth/device/{user_code}"): ("/auth/device/BBBB-BBBB", {"approve": True}, 401, 404, 404, 404, 404),
    ("POST", "/users"): ("/users", {"name": "u-{me}"}, 401, 403, 403, 403, 201),
    ("GET", "/users"): ("/users", None, 401, 403, 403, 403, 200),
    ("PATCH", "/users/{name}"): ("/users/victim", {"disabled": False}, 401, 403, 403, 403, 200),
    ("POST", "/teams"): ("/teams", {"name": "t-{me}"}, 401, 403, 403, 403, 201),
    ("GET", "/teams"): ("/teams", None, 401, 200, 200, 200, 200),
    ("DELETE", "/teams/{team}"): ("/teams/web", None, 401, 403, 403, 403, 409),
    ("PUT", "/teams/{team}/members/{user}"): ("/teams/spare/members/victim", None, 401, 403, 403, 403, 200),
    ("DELETE", "/teams/{team}/members/{user}"): ("/teams/spare/members/victim", None, 401, 403, 403, 403, 204),
    ("POST", "/tokens"): ("/tokens", {"name": "x", "user": "victim", "role": "reader"}, 401, 403, 403, 403, 201),
    ("GET", "/tokens"): ("/tokens", None, 401, 200, 200, 200, 200),
    ("DELETE", "/tokens/{token_id}"): ("/tokens/{token}", None, 401, 404, 404, 404, 204),
    ("GET", "/audit"): ("/audit", None, 401, 403, 403, 403, 200),
    ("POST", "/gc"): ("/gc", {"dry_run": True}, 401, 403, 403, 403, 200),
    ("POST", "/backup"): ("/backup", {"keys": "?"}, 401, 403, 403, 403, 400),
    ("POST", "/apps"): ("/apps", {"name": "made-by-{me}"}, 401, 403, 201, 201, 201),
    ("GET", "/apps"): ("/apps", None, 401, 200, 200, 200, 200),
    ("GET", "/apps/{app}"): ("/apps/shop", None, 401, 200, 200, 404, 200),
    ("PATCH", "/apps/{app}"): ("/apps/shop", {"owner": "nobody"}, 401, 403, 404, 404, 404),
    ("DELETE", "/apps/{app}"): ("/apps/doomed-{me}", None, 401, 403, 204, 404, 204),
    ("GET", "/apps/{app}/deployments"): ("/apps/shop/deployments", None, 401, 200, 200, 404, 200),
    ("GET", "/apps/{app}/releases"): ("/apps/shop/releases", None, 401, 200, 200, 404, 200),
    ("POST", "/apps/{app}/rollback"): ("/apps/shop/rollback", {"digest": "?"}, 401, 403, 400, 404, 400),
    ("POST", "/apps/{app}/scale"): ("/apps/shop/scale", {"web": 99}, 401, 403, 400, 404, 400),
    ("GET", "/apps/{app}/config"): ("/apps/shop/config", None, 401, 200, 200, 404, 200),
    ("GET", "/apps/{app}/config/changes"): (
        "/apps/shop/config/changes?a={id}&b={id}", None, 401, 200, 200, 404, 200,
    ),
    ("PUT", "/apps/{app}/config"): ("/apps/shop/config", {}, 401, 403, 200, 404, 200),
    ("GET", "/apps/{app}/logs"): ("/apps/shop/logs", None, 401, 200, 200, 404, 200),
    (WEBSOCKET, "/apps/{app}/logs"): ("/apps/shop/logs?follow=false", None, 401, 101, 101, 403, 101),
    ("GET", "/apps/{app}/hosts"): ("/apps/shop/hosts", None, 401, 200, 200, 404, 200),
    ("POST", "/apps/{app}/hosts"): ("/apps/shop/hosts", {"host": "*.shop.test"}, 401, 403, 400, 404, 400),
    ("POST", "/apps/{app}/hosts/{host}/verify"): ("/apps/shop/hosts/shop.test/verify", None, 401, 403, 200, 404, 200),
    ("PUT", "/apps/{app}/hosts/{host}/certificate"): (
        "/apps/shop/hosts/shop.test/certificate", {"chain": "", "key": ""}, 401, 403, 409, 404, 409,
    ),
    ("DELETE", "/apps/{app}/hosts/{host}/certificate"): (
        "/apps/shop/hosts/shop.test/certificate", None, 401, 403, 409, 404, 409,
    ),
    ("DELETE", "/apps/{app}/hosts/{host}"): ("/apps/shop/hosts/{me}.shop.test", None, 401, 403, 204, 404, 204),
    ("POST", "/apps/{app}/runs"): ("/apps/shop/runs", {"command": ""}, 401, 403, 400, 404, 400),
    ("GET", "/apps/{app}/runs"): ("/apps/shop/runs", None, 401, 200, 200, 404, 200),
    ("GET", "/apps/{app}/runs/{run_id}"): ("/apps/shop/runs/x", None, 401, 404, 404, 404, 404),
    ("POST", "/apps/{app}/runs/{run_id}/stop"): ("/apps/shop/runs/x/stop", {}, 401, 403, 404, 404, 404),
    (WEBSOCKET, "/apps/{app}/runs/{run_id}/attach"): ("/apps/shop/runs/x/attach", None, 401, 403, 403, 403, 403),
    ("GET", "/apps/{app}/volumes"): ("/apps/shop/volumes", None, 401, 200, 200, 404, 200),
    ("DELETE", "/apps/{app}/volumes/{volume}"): ("/apps/shop/volumes/x", None, 401, 403, 404, 404, 404),
    ("POST", "/deployments"): ("/deployments", {"app": "shop", "digest": "?"}, 401, 403, 400, 404, 400),
    ("GET", "/deployments"): ("/deployments?app=shop", None, 401, 200, 200, 404, 200),
    ("GET", "/deployments/{deployment_id}"): ("/deployments/{id}", None, 401, 200, 200, 404, 200),
    ("PATCH", "/deployments/{deployment_id}"): (
        "/deployments/{id}", {"status": "cancelled"}, 401, 403, 409, 404, 409,
    ),
    ("GET", "/deployments/{deployment_id}/events"): ("/deployments/{id}/events", None, 401, 200, 200, 404, 200),
    ("POST", "/artifacts/presign"): (
        "/artifacts/presign", {"app": "shop", "digest": "{digest}", "size_bytes": 1}, 401, 403, 200, 404, 200,
    ),
    ("POST", "/artifacts/complete"): (
        "/artifacts/complete", {"app": "shop", "upload_id": "x"}, 401, 403, 400, 404, 400,
    ),
    ("POST", "/artifacts/multipart/init"): (
        "/artifacts/multipart/init", {"app": "shop", "digest": "{digest}", "size_bytes": 1}, 401, 403, 200, 404, 200,
    ),
    ("POST", "/artifacts/multipart/presign-part"): (
        "/artifacts/multipart/presign-part", {"app": "shop", "upload_id": "x"}, 401, 403, 400, 404, 400,
    ),
    ("POST", "/artifacts/multipart/complete"): (
        "/artifacts/multipart/complete", {"app": "shop", "upload_id": "x"}, 401, 403, 400, 404, 400,
    ),
    ("POST", "/artifacts"): ("/artifacts?app=shop", None, 401, 403, 400, 404, 400),
    ("GET", "/artifacts"): ("/artifacts?app=shop", None, 401, 200, 200, 404, 200),
    ("HEAD", "/artifacts/{digest}"): ("/artifacts/{digest}", None, 401, 200, 200, 404, 200),
    ("GET", "/artifacts/{digest}/meta"): ("/artifacts/{digest}/meta", None, 401, 200, 200, 404, 200),
    ("GET", "/artifacts/{digest}/download"): ("/artifacts/{digest}/download", None, 401, 307, 307, 404, 307),
    ("GET", "/artifacts/{digest}/events"): ("/artifacts/{digest}/events?app=shop", None, 401, 200, 200, 404, 200),
    ("PUT", "/artifacts/{digest}/pin"): ("/artifacts/{digest}/pin", None, 401, 403, 200, 404, 200),
    ("DELETE", "/artifacts/{digest}/pin"): ("/artifacts/{digest}/pin", None, 401, 403, 200, 404, 200),
    **{
        ("POST", f"/artifacts/{{digest}}/{kind}"): (
            f"/artifacts/{{digest}}/{kind}", {}, 401, 403, 400, 404, 400,
        ) for kind in ("manifest", "sbom", "provenance")
    },
    **{
        ("GET", f"/artifacts/{{digest}}/{kind}"): (
            f"/artifacts/{{digest}}/{kind}", None, 401, 200, 200, 404, 200,
        ) for kind in ("manifest", "sbom", "provenance")
    },
    ("GET", "/provenance"): ("/provenance?app=shop", None, 401, 200, 200, 404, 200),
    ("GET", "/provenance/keys"): ("/provenance/keys", None, 401, 200, 200, 200, 200),
    ("POST", "/provenance/keys"): ("/provenance/keys", None, 401, 403, 403, 403, 201),
    ("DELETE", "/provenance/keys/{key_id}"): ("/provenance/keys/x", None, 401, 403, 403, 403, 404),
    ("GET", "/provenance/{digest}"): ("/provenance/{digest}", None, 401, 200, 200, 404, 200),
    ("GET", "/provenance/{digest}/attestation"): (
        "/provenance/{digest}/attestation", None, 401, 200, 200, 404, 200,
    ),
    ("GET", "/apps/{app}/public-keys"): ("/apps/shop/public-keys", None, 401, 200, 200, 404, 200),
    ("POST", "/apps/{app}/public-keys"): (
        "/apps/shop/public-keys", {"public_key_hex": "?"}, 401, 403, 400, 404, 400,
    ),
    ("DELETE", "/apps/{app}/public-keys/{key_id}"): ("/apps/shop/public-keys/x", None, 401, 403, 404, 404, 404),
    ("POST", "/api/functions"): (
        "/api/functions", {"name": "f-{me}", "runtime": "node", "entrypoint": "a.js"}, 401, 403, 201, 201, 201,
    ),
    ("GET", "/api/functions"): ("/api/functions", None, 401, 200, 200, 200, 200),
    ("GET", "/api/functions/runtimes"): ("/api/functions/runtimes", None, 401, 200, 200, 200, 200),
    ("POST", "/api/functions/runtimes"): (
        "/api/functions/runtimes?name=Mine&init=/bin/run", None, 401, 403, 403, 403, 400,
    ),
    ("DELETE", "/api/functions/runtimes/{name}"): ("/api/functions/runtimes/none", None, 401, 403, 403, 403, 404),
    ("GET", "/api/functions/{function}"): ("/api/functions/greet", None, 401, 200, 200, 404, 200),
    ("PUT", "/api/functions/{function}"): ("/api/functions/greet", {}, 401, 403, 200, 404, 200),
    ("PATCH", "/api/functions/{function}"): ("/api/functions/greet", {"owner": "nobody"}, 401, 403, 404, 404, 404),
    ("DELETE", "/api/functions/{function}"): ("/api/functions/gone-{me}", None, 401, 403, 204, 404, 204),
    ("POST", "/api/functions/{function}/code"): ("/api/functions/greet/code", None, 401, 403, 400, 404, 400),
    ("GET", "/api/functions/{function}/versions"): ("/api/functions/greet/versions", None, 401, 200, 200, 404, 200),
    ("POST", "/api/functions/{function}/rollback"): (
        "/api/functions/greet/rollback", {"version": 1}, 401, 403, 400, 404, 400,
    ),
    ("POST", "/api/functions/{function}/warm"): ("/api/functions/greet/warm", None, 401, 403, 409, 404, 409),
    ("GET", "/api/functions/{function}/invocations"): (
        "/api/functions/greet/invocations", None, 401, 200, 200, 404, 200,
    ),
    ("GET", "/api/functions/{function}/logs"): ("/api/functions/greet/logs", None, 401, 200, 200, 404, 200),
}  # fmt: skip


@dataclass
class World:
    """A server with users, a team and its app."""

    up: Server
    facts: dict[str, str]
    tokens: dict[str, str]

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.up.port}"

    def headers(self, caller: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.tokens[caller]}"} if caller in self.tokens else {}

    def login(self, caller: str) -> str:
        if caller == "admin":
            body = {"token": (self.up.data / "admin-token").read_text().strip()}
        else:
            body = {"username": caller, "password": PASSWORD}
        status, session = self.up.api("POST", "/auth/login", body)
        assert status == 200, session
        return session["token"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with server(tmp_path_factory.mktemp("up"), AETHER_STOP_GRACE_SECS="1") as up:
        for name, role in (("reader", "reader"), ("owner", "deployer"), ("other", "deployer"), ("victim", "reader")):
            assert up.api("POST", "/users", {"name": name, "role": role, "password": PASSWORD})[0] == 201
        for team in ("web", "spare"):
            assert up.api("POST", "/teams", {"name": team})[0] == 201
        for name in ("reader", "owner"):
            assert up.api("PUT", f"/teams/web/members/{name}")[0] == 200
        for app in ("shop", *(f"doomed-{caller}" for caller in CALLERS)):
            assert up.api("POST", "/apps", {"name": app, "team": "web"})[1]["owner"] == "web"
        for name in ("greet", *(f"gone-{caller}" for caller in CALLERS)):
            function = {"name": name, "runtime": "node", "entrypoint": "index.js", "team": "web"}
            assert up.api("POST", "/api/functions", function)[1]["owner"] == "web"
        for host in ("shop.test", *(f"{caller}.shop.test" for caller in CALLERS)):
            assert up.api("POST", "/apps/shop/hosts", {"host": host})[0] == 201
        deployed = up.deploy("shop", hello("shop"))
        digest = deployed["digest"]
        documents = {
            "manifest": supply.manifest(digest),
            "sbom": supply.sbom(digest),
            "provenance": supply.envelope("shop", digest, supply.Signer()),
        }
        for kind, body in documents.items():
            assert up.api("POST", f"/artifacts/{digest}/{kind}", body)[0] == 201
        token = up.api("POST", "/tokens", {"name": "ci", "user": "victim"})[1]
        facts = {"digest": deployed["digest"], "id": deployed["id"], "token": token["id"]}
        facts["code"] = up.api("POST", "/auth/device", {"client": "laptop"})[1]["user_code"]
        made = World(up, facts, {})
        made.tokens.update({caller: made.login(caller) for caller in CALLERS[1:]})
        yield made


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as made:
        yield made


def fill(template: Any, facts: dict[str, str]) -> Any:
    if isinstance(template, dict):
        return {key: fill(value, facts) for key, value in cast("dict[str, Any]", template).items()}
    if isinstance(template, str):
        for name, value in facts.items():
            template = template.replace(f"{{{name}}}", value)
    return template


async def status_of(
    world: World, client: aiohttp.ClientSession, method: str, path: str, body: Any, headers: dict[str, str]
) -> tuple[int, bytes]:
    if method == WEBSOCKET:
        try:
            async with client.ws_connect(world.base + path, headers=headers):
                return 101, b""
        except aiohttp.WSServerHandshakeError as refused:
            return refused.status, b""
    options: dict[str, Any] = {"headers": headers, "allow_redirects": False}
    if body is not None:
        options["json"] = body
    async with client.request(method, world.base + path, **options) as answer:
        return answer.status, await answer.read()


def test_every_row_is_called() -> None:
    assert CALLS.keys() == ROUTES.keys()


@pytest.mark.parametrize("row", CALLS, ids=lambda row: " ".join(row))
async def test_row(world: World, client: aiohttp.ClientSession, row: tuple[str, str]) -> None:
    path, body, *expected = CALLS[row]
    for caller, status in zip(CALLERS, expected, strict=True):
        headers = world.headers(caller)
        if row[1] == "/auth/logout" and headers:
            headers = {"Authorization": f"Bearer {world.login(caller)}"}
        facts = {**world.facts, "me": caller}
        found, said = await status_of(world, client, row[0], fill(path, facts), fill(body, facts), headers)
        assert found == status, (caller, said)
        if found == 404 and caller == "other":
            assert b"web" not in said


async def test_what_is_not_there_and_what_is_not_yours_read_the_same(
    world: World, client: aiohttp.ClientSession
) -> None:
    other = world.headers("other")
    for theirs, nothing in (
        ("/apps/shop", "/apps/none"),
        ("/deployments/" + world.facts["id"], "/deployments/00000000-0000-7000-8000-000000000000"),
        ("/api/functions/greet", "/api/functions/none"),
        (f"/artifacts/{world.facts['digest']}/meta", f"/artifacts/{'0' * 64}/meta"),
        ("/deployments?app=shop", "/deployments?app=none"),
    ):
        told: list[str] = []
        for path in (theirs, nothing):
            async with client.get(world.base + path, headers=other) as answer:
                error = await answer.json()
            told.append(f"{answer.status} {error['code']} {error['message']}")
        named = [theirs.rpartition("=")[2].rpartition("/")[2], nothing.rpartition("=")[2].rpartition("/")[2]]
        assert told[0].replace(named[0], "X") == told[1].replace(named[1], "X")

    for app in ("shop", "none"):
        assert (await status_of(world, client, WEBSOCKET, f"/apps/{app}/logs", None, other))[0] == 403


async def test_lists_show_only_what_is_yours(world: World, client: aiohttp.ClientSession) -> None:
    async def items(caller: str, path: str) -> list[dict[str, Any]]:
        async with client.get(world.base + path, headers=world.headers(caller)) as answer:
            assert answer.status == 200
            return (await answer.json())["items"]

    for path, key in (("/apps?limit=500", "name"), ("/deployments", "app"), ("/artifacts", "app")):
        for caller, sees in (("reader", True), ("owner", True), ("other", False), ("admin", True)):
            assert ("shop" in {item[key] for item in await items(caller, path)}) is sees, (path, caller)
    assert [team["name"] for team in await items("owner", "/teams")] == ["web"]
    assert await items("other", "/teams") == []
    assert await items("owner", "/tokens") == []


async def test_a_known_artifact_is_no_duplicate_for_others(world: World, client: aiohttp.ClientSession) -> None:
    other = world.headers("other")
    async with client.post(world.base + "/apps", headers=other, json={"name": "copycat"}) as made:
        assert (await made.json())["owner"] == "other"
    body = {"app": "copycat", "digest": world.facts["digest"], "size_bytes": 10}
    async with client.post(world.base + "/artifacts/presign", headers=other, json=body) as answer:
        assert (await answer.json())["method"] == "PUT"
    body = {"app": "copycat", "digest": world.facts["digest"]}
    async with client.post(world.base + "/deployments", headers=other, json=body) as answer:
        assert answer.status == 404


async def test_an_app_goes_only_to_a_team_of_yours(world: World, client: aiohttp.ClientSession) -> None:
    for caller, team, status in (("other", "web", 404), ("other", "none", 404), ("owner", "web", 201)):
        body = {"name": f"for-{team}-{caller}", "team": team}
        async with client.post(world.base + "/apps", headers=world.headers(caller), json=body) as answer:
            assert answer.status == status


async def test_a_scoped_token_stays_in_its_scope(world: World, client: aiohttp.ClientSession) -> None:
    async def call(method: str, path: str, token: str, body: Any = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {token}"}
        async with client.request(method, world.base + path, headers=headers, json=body) as answer:
            return answer.status, await answer.json() if answer.content_type == "application/json" else None

    owner = world.tokens["owner"]
    status, made = await call("POST", "/tokens", owner, {"name": "ci", "apps": ["shop"], "expires_in_secs": 600})
    assert (status, made["user"], made["role"], made["apps"]) == (201, "owner", "deployer", ["shop"])
    _, session = await call("POST", "/auth/login", owner, {"token": made["token"]})
    for token in (made["token"], session["token"]):
        assert (await call("GET", "/apps/shop", token))[0] == 200
        assert [app["name"] for app in (await call("GET", "/apps", token))[1]["items"]] == ["shop"]
        assert (await call("PUT", "/apps/shop/config", token, {}))[0] == 200
        assert (await call("GET", "/apps/made-by-owner", token))[0] == 404
        assert (await call("POST", "/apps", token, {"name": "elsewhere"}))[0] == 403
        assert (await call("POST", "/tokens", token, {"name": "more"}))[0] == 403
        change = {"password": "another password", "current_password": PASSWORD}
        assert (await call("PATCH", "/users/owner", token, change))[0] == 403
    assert (await call("POST", "/tokens", owner, {"name": "x", "role": "admin"}))[0] == 403
    assert (await call("POST", "/tokens", world.tokens["reader"], {"name": "x", "role": "deployer"}))[0] == 403
    assert (await call("DELETE", f"/tokens/{made['id']}", world.tokens["other"]))[0] == 404
    assert (await call("DELETE", f"/tokens/{made['id']}", owner))[0] == 204
    for token in (made["token"], session["token"]):
        assert (await call("GET", "/apps/shop", token))[0] == 401

    _, bounded = await call(
        "POST", "/tokens", world.tokens["admin"], {"name": "x", "user": "owner", "role": "deployer"}
    )
    assert (await call("GET", "/apps/shop", bounded["token"]))[0] == 200, "an admin may make tokens for users"


async def test_a_user_changes_its_own_password_only(world: World, client: aiohttp.ClientSession) -> None:
    world.up.api("POST", "/users", {"name": "nina", "role": "reader", "password": PASSWORD})
    headers = {"Authorization": f"Bearer {world.login('nina')}"}
    for name, body, status in (
        ("victim", {"password": "another password", "current_password": PASSWORD}, 403),
        ("nina", {"password": "another password"}, 403),
        ("nina", {"password": "another password", "current_password": "wrong"}, 403),
        ("nina", {"role": "admin", "password": "another password", "current_password": PASSWORD}, 403),
        ("nina", {"password": "short", "current_password": PASSWORD}, 400),
        ("nina", {"password": "another password", "current_password": PASSWORD}, 200),
    ):
        async with client.patch(f"{world.base}/users/{name}", headers=headers, json=body) as answer:
            assert answer.status == status, body
    assert world.up.api("POST", "/auth/login", {"username": "nina", "password": PASSWORD})[0] == 401


async def test_the_audit_log_tells_who_did_what(world: World, client: aiohttp.ClientSession) -> None:
    request = {**world.headers("owner"), "X-Request-Id": "audited-1"}
    config = {"set": {"KEY": "a-secret-value"}}
    async with client.put(world.base + "/apps/doomed-reader/config", headers=request, json=config) as answer:
        assert answer.status == 200
    denied = {**world.headers("other"), "X-Request-Id": "audited-2"}
    async with client.put(world.base + "/apps/shop/config", headers=denied, json=config) as answer:
        assert answer.status == 404
    failed = {"username": "victim", "password": "a-wrong-password"}
    assert world.up.api("POST", "/auth/login", failed, {"X-Request-Id": "audited-3"})[0] == 401
    typed = {"username": "my-password-by-mistake", "password": "x"}
    assert world.up.api("POST", "/auth/login", typed, {"X-Request-Id": "audited-4"})[0] == 401
    async with client.post(world.base + "/apps", headers={"Authorization": "Bearer x"}, json={}) as answer:
        assert answer.status == 401

    rows: list[dict[str, Any]] = []
    cursor = ""
    while True:
        status, page = world.up.api("GET", f"/audit?limit=40&cursor={cursor}")
        assert status == 200
        rows += page["items"]
        if not (cursor := page["next_cursor"] or ""):
            break
    assert len({row["id"] for row in rows}) == len(rows)
    assert [row["time"] for row in rows] == sorted((row["time"] for row in rows), reverse=True)
    shown = {row["request_id"]: row for row in rows}
    told = {n: tuple(shown[f"audited-{n}"][key] for key in ("actor", "target", "outcome")) for n in (1, 2, 3, 4)}
    assert told == {
        1: ("owner", "doomed-reader", "ok"),
        2: ("other", "shop", "not_found"),
        3: ("nobody", "victim", "unauthorized"),
        4: ("nobody", "an unknown user", "unauthorized"),
    }
    assert shown["audited-1"]["action"] == "PUT /apps/{app}/config"
    assert shown["audited-1"]["address"] == "127.0.0.1"
    assert any(row["action"] == "PUT /objects/{key}" and row["target"].startswith("pending/") for row in rows)
    assert not any(row["action"].startswith("GET") for row in rows)
    text = str(rows)
    for secret in ("a-secret-value", "a-wrong-password", "my-password-by-mistake", PASSWORD, *world.tokens.values()):
        assert secret not in text
    status, page = world.up.api("GET", "/audit?actor=owner&limit=1")
    assert [row["actor"] for row in page["items"]] == ["owner"]
