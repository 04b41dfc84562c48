"""What holds for every route: tokens, roles, the envelope, ids, metrics, the description, and stopping."""

from __future__ import annotations

import asyncio
import io
import json
import re
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from aether.api.app import create_api, create_routes
from aether.api.authorization import WEBSOCKET, routes_of
from aether.api.server import ApiServer, unix_socket
from support.served import Served, served

pytestmark = pytest.mark.usefixtures("database_url")

EXEMPT = {"/healthz", "/health", "/readyz", "/startupz", "/auth/login", "/auth/refresh"}
DEVICES = {"/auth/device", "/auth/device/token"}
SPEC_METRICS = """
artifact_presign_requests_total artifact_presign_failures_total artifact_complete_failures_total
artifact_upload_bytes_total artifact_digest_mismatch_total artifact_size_exceeded_total
artifact_pending_gc_runs_total artifact_pending_gc_deleted_total artifact_events_total
artifact_legacy_upload_requests_total artifact_multipart_inits_total artifact_multipart_part_presigns_total
artifact_multipart_completes_total artifact_multipart_complete_failures_total artifact_quota_exceeded_total
artifact_uploads_in_progress artifacts_total artifact_upload_duration_seconds artifact_put_duration_seconds
artifact_complete_duration_seconds artifact_multipart_part_size_bytes artifact_multipart_parts_per_artifact
"""


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as one:
        yield one


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def anonymous(api: Served, method: str, path: str, **options: Any) -> tuple[int, Mapping[str, str], bytes]:
    async with aiohttp.ClientSession() as client, client.request(method, api.base + path, **options) as answer:
        return answer.status, answer.headers, await answer.read()


def every_route(api: Served) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for method, path in routes_of(create_routes(api.services)):
        found.append(("GET" if method == WEBSOCKET else method, re.sub(r"\{[^}]*\}", "x", path)))
    return found


async def test_every_route_needs_a_token_but_the_listed_ones(api: Served) -> None:
    routes = every_route(api)
    assert {path for _, path in routes} >= EXEMPT | {"/apps", "/deployments", "/artifacts/presign", "/metrics"}
    for method, path in routes:
        for headers in (
            {},
            bearer("wrong"),
            bearer(""),
            {"Authorization": "Basic !!!"},
            {"Authorization": "tok-admin"},
        ):
            status, answered, body = await anonymous(api, method, path, headers=headers)
            assert (status == 401) == (path not in EXEMPT | DEVICES), (method, path, status)
            if status == 401:
                assert answered["WWW-Authenticate"] == 'Basic realm="aether", Bearer'
                assert b'"unauthorized"' in body or method == "HEAD"
    assert (await anonymous(api, "GET", "/nothing/here"))[0] == 401


async def test_every_change_needs_more_than_reader(api: Served) -> None:
    free = DEVICES | {"/auth/device/x", "/auth/login", "/auth/logout", "/auth/refresh", "/tokens", "/tokens/x"}
    changes = [(m, p) for m, p in every_route(api) if m in ("POST", "PUT", "PATCH", "DELETE") and p not in free]
    assert len(changes) >= 5
    for method, path in changes:
        status, _, body = await anonymous(api, method, path, headers=bearer("tok-reader"), json={})
        assert status == 403, (method, path, body)
    for method, path in every_route(api):
        if method in ("GET", "HEAD") and path not in ("/users", "/audit"):
            status, _, _ = await anonymous(api, method, path, headers=bearer("tok-reader"))
            assert status != 403, (method, path)


async def test_basic_carries_the_token_as_password(api: Served) -> None:
    for headers in (
        {"Authorization": aiohttp.encode_basic_auth("anything", "tok-reader")},
        {"Authorization": aiohttp.encode_basic_auth("", "tok-reader")},
        {"Authorization": "bearer tok-reader"},
    ):
        status, _, body = await anonymous(api, "GET", "/auth/whoami", headers=headers)
        assert status == 200
        assert json.loads(body) == {
            "name": "rob", "role": "reader", "kind": "static", "expires_at": None, "teams": ["default"], "apps": None,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 404),
        ({}, 404),
    ],
)
async def test_a_foreign_page_cannot_ride_on_a_remembered_password(
    api: Served, extra: dict[str, str], status: int
) -> None:
    headers = {"Authorization": aiohttp.encode_basic_auth("x", "tok-admin"), **extra}
    body = {"app": "none", "digest": "0" * 64, "size_bytes": 1}
    assert (await anonymous(api, "POST", "/artifacts/presign", headers=headers, json=body))[0] == status
    if extra:
        own = {**extra, **bearer("tok-admin")}
        assert (await anonymous(api, "POST", "/artifacts/presign", headers=own, json=body))[0] == 404


async def test_a_websocket_needs_a_token_too(api: Served) -> None:
    async with aiohttp.ClientSession() as client:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await client.ws_connect(api.base + "/apps/x/logs")
    assert refused.value.status == 401


async def test_a_session_lives_until_logout(api: Served) -> None:
    status, session = await api.call("POST", "/auth/login", json={"token": "tok-deployer"})
    assert (status, session["name"], session["role"]) == (200, "dan", "deployer")
    headers = bearer(session["token"])
    status, who = await api.call("GET", "/auth/whoami", headers=headers)
    assert (status, who["kind"], who["expires_at"]) == (200, "session", session["expires_at"])
    assert (await api.call("POST", "/auth/logout", headers=headers))[0] == 204
    assert (await api.call("GET", "/auth/whoami", headers=headers))[0] == 401
    assert (await api.call("POST", "/auth/login", json={"token": "nonsense"}))[0] == 401


async def test_without_auth_required_everybody_is_admin(tmp_path: Path) -> None:
    async with served(tmp_path, AETHER_AUTH_REQUIRED="false") as api:
        status, _, body = await anonymous(api, "GET", "/auth/whoami")
        assert status == 200
        assert b'"anonymous"' in body
        foreign = {"Sec-Fetch-Site": "cross-site"}
        assert (await anonymous(api, "POST", "/artifacts/presign", headers=foreign, json={}))[0] == 403


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code"),
    [
        ("GET", "/nothing", {}, 404, "not_found"),
        ("DELETE", "/healthz", {}, 405, "bad_request"),
        ("POST", "/artifacts/presign", {"data": b'{"app'}, 400, "bad_request"),
        ("POST", "/artifacts/presign", {"data": b"[]"}, 400, "bad_request"),
        ("POST", "/artifacts/presign", {"json": {}}, 400, "bad_request"),
        ("POST", "/artifacts/presign", {"data": b"\xff\xfe"}, 400, "bad_request"),
        ("POST", "/artifacts/presign", {"data": b"x" * 4_500_000}, 413, "payload_too_large"),
        ("GET", "/artifacts?limit=x", {}, 400, "bad_request"),
        ("GET", "/artifacts/ABC/meta", {}, 400, "invalid_digest"),
        ("POST", "/objects/pending/x", {}, 405, "bad_request"),
        ("GET", "/objects/", {}, 403, "forbidden"),
        ("GET", "/swagger/etc%2fpasswd", {}, 404, "not_found"),
        ("GET", "/swagger/..%2f__init__.py", {}, 404, "not_found"),
    ],
)
async def test_every_failure_is_an_envelope(
    api: Served, method: str, path: str, options: dict[str, Any], status: int, code: str
) -> None:
    if "data" in options:
        options = {"data": io.BytesIO(options["data"])}
    async with api.client.request(method, api.base + path, **options) as answer:
        body = await answer.json()
    assert (answer.status, body["code"]) == (status, code)
    assert body["message"]
    assert re.fullmatch(r"[0-9a-f]{32}", body["trace_id"])
    assert answer.headers["X-Request-Id"]


async def test_a_bug_is_told_without_its_trace(api: Served, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        async def find(self, *_: object) -> None:
            raise RuntimeError("secret /etc/path")

    api.services.registry = Broken()  # type: ignore[assignment]
    status, body = await api.call("GET", f"/artifacts/{'0' * 64}/meta")
    assert (status, body["code"]) == (500, "internal")
    assert "secret" not in str(body)
    assert "Traceback" not in str(body)


async def test_ids_are_taken_over_when_sane(api: Served) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    given = {"X-Request-Id": "req-1.2:3", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    status, headers, body = await anonymous(api, "GET", "/nope", headers=given)
    assert (status, headers["X-Request-Id"]) == (401, "req-1.2:3")
    assert trace.encode() in body
    bad = {"X-Request-Id": "x" * 200, "traceparent": f"00-{'0' * 32}-00f067aa0ba902b7-01"}
    _, headers, body = await anonymous(api, "GET", "/healthz", headers=bad)
    assert re.fullmatch(r"[0-9a-f]{24}", headers["X-Request-Id"])
    assert b"0" * 32 not in body


async def test_metrics_name_routes_by_template(api: Served) -> None:
    await api.call("GET", f"/artifacts/{'a' * 64}/meta")
    await api.call("GET", "/secret-path-1")
    status, text = await api.call("GET", "/metrics")
    assert status == 200
    shown = text.decode()
    assert 'route="/artifacts/{digest}/meta",status="404"' in shown
    assert 'route="unmatched",status="404"' in shown
    assert "secret-path" not in shown
    assert "a" * 64 not in shown
    for name in SPEC_METRICS.split():
        assert f"\n# TYPE {name} " in shown, name


async def test_probes(api: Served) -> None:
    assert (await anonymous(api, "GET", "/healthz"))[0] == 200
    assert (await anonymous(api, "GET", "/startupz"))[0] == 503
    api.services.started.set()
    assert (await anonymous(api, "GET", "/startupz"))[0] == 200
    assert (await api.call("GET", "/readyz"))[1] == {"status": "ok", "checks": {"database": "ok", "objects": "ok"}}

    async def away() -> None:
        raise OSError("unplugged")

    api.services.checks = {**api.services.checks, "cable": away}
    status, body = await api.call("GET", "/readyz")
    assert (status, body["details"]["checks"]["cable"]) == (503, "unplugged")
    api.services.shutdown.set()
    assert (await anonymous(api, "GET", "/readyz"))[0] == 503
    assert (await anonymous(api, "GET", "/healthz"))[0] == 200


async def test_the_description_is_openapi_3_1(api: Served) -> None:
    status, spec = await api.call("GET", "/openapi.json")
    assert status == 200
    assert spec["openapi"].startswith("3.1")
    assert spec["security"] == [{"bearer_auth": []}]
    assert spec["components"]["securitySchemes"]["bearer_auth"] == {"type": "http", "scheme": "bearer"}
    assert {"/artifacts/presign", "/artifacts/complete", "/artifacts/{digest}/download", "/auth/login"} <= set(
        spec["paths"]
    )
    ids = [operation["operationId"] for path in spec["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids))
    assert spec["paths"]["/auth/login"]["post"]["security"] == []
    assert "security" not in spec["paths"]["/auth/whoami"]["get"]
    assert set(spec["components"]["schemas"]["Error"]["properties"]) == {"code", "message", "details", "trace_id"}
    for path in spec["paths"].values():
        for operation in path.values():
            assert {"500", "503"} <= operation["responses"].keys()
            refusals = [answer for status, answer in operation["responses"].items() if status >= "400"]
            schemas = [answer["content"]["application/json"]["schema"] for answer in refusals]
            assert schemas == [{"$ref": "#/components/schemas/Error"}] * len(refusals)
    parameters = [p["name"] for p in spec["paths"]["/artifacts"]["get"]["parameters"]]
    filters = ["app", "before", "cursor", "digest", "limit", "runtime", "since", "verified"]
    assert sorted(parameters) == filters


async def test_swagger_needs_no_internet(api: Served) -> None:
    status, page = await api.call("GET", "/swagger")
    assert status == 200
    links = re.findall(r'(?:src|href)="([^"]+)"', page.decode())
    assert len(links) == 5
    for link in links:
        assert link.startswith("/swagger/")
        async with api.client.get(api.base + link) as asset:
            assert asset.status == 200, link
            assert len(await asset.read()) > 100
            assert "default-src 'self'" in asset.headers["Content-Security-Policy"]


async def test_the_unix_socket_is_private_and_serves(api: Served) -> None:
    path = api.folder / "api.sock"
    path.write_text("stale")
    server = ApiServer(create_api(api.services), unix_socket(path), grace_secs=1)
    await server.start()
    assert path.stat().st_mode & 0o777 == 0o600
    connector = aiohttp.UnixConnector(str(path))
    async with aiohttp.ClientSession(connector=connector) as client, client.get("http://x/healthz") as answer:
        assert answer.status == 200
    await server.stop()


async def test_an_upload_under_way_may_end_while_the_server_stops(api: Served) -> None:
    await api.add_app("shop")
    signed = await api.presign("shop", b"x" * 100)
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(f"PUT {signed['url']} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode() + b"x" * 50)
    await writer.drain()
    path = api.folder / "second.sock"
    server = ApiServer(create_api(api.services), unix_socket(path), grace_secs=5)
    await server.start()
    second_reader, second = await asyncio.open_unix_connection(str(path))
    second.write(f"PUT {signed['url']} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode() + b"x" * 50)
    await second.drain()
    while api.sample("artifact_uploads_in_progress") < 2:
        await asyncio.sleep(0.005)
    stopping = asyncio.create_task(server.stop())
    await asyncio.sleep(0.2)  # long enough for a server that does not wait to have cut the connection
    second.write(b"x" * 50)
    assert (await second_reader.readline()).startswith(b"HTTP/1.1 200")
    second.close()
    await stopping
    writer.write(b"x" * 50)
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_too_many_changes_at_once_are_told_to_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aether.api.shell._CONTROL_WAIT_SECS", 0.05)
    async with served(tmp_path, AETHER_MAX_CONCURRENT_CONTROL="1") as api:
        await api.add_app("shop")
        began, over = asyncio.Event(), asyncio.Event()
        presign = api.registry.uploads.presign

        async def lasting(*arguments: Any, **named: Any) -> Any:
            began.set()
            await over.wait()
            return await presign(*arguments, **named)

        monkeypatch.setattr(api.registry.uploads, "presign", lasting)
        first = asyncio.create_task(api.presign("shop", b"first"))
        await began.wait()
        status, error = await api.call("POST", "/artifacts/presign", json={})
        assert (status, error["code"]) == (503, "service_unavailable")
        assert (await api.call("GET", "/artifacts"))[0] == 200
        over.set()
        assert (await first)["method"] == "PUT"


async def test_bodies_are_bounded_in_size_and_time(tmp_path: Path) -> None:
    async with served(tmp_path, AETHER_API_BODY_TIMEOUT_SECS="0.2") as api:
        status, _, body = await anonymous(api, "POST", "/auth/login", data=b" " * 70_000)
        assert (status, json.loads(body)["code"]) == (413, "payload_too_large")
        with socket.create_connection(("127.0.0.1", api.port)) as slow:
            slow.sendall(b"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
            slow.settimeout(10)
            answer = b""
            while b"}" not in answer:
                answer += await asyncio.to_thread(slow.recv, 65536)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"did not come within 0.2 s" in answer
