"""Cross-origin requests as browsers make them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from aether.model.errors import ConfigError
from aether.settings import load
from support.served import Served, served

PAGE = "https://console.example.com"
NO_TOKEN = {"Authorization": ""}


async def ask(api: Served, method: str, path: str, **headers: str) -> tuple[int, Mapping[str, str]]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with api.client.request(method, api.base + path, headers=named) as answer:
        return answer.status, answer.headers.copy()


async def preflight(api: Served, origin: str) -> tuple[int, Mapping[str, str]]:
    asks = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
    return await ask(api, "OPTIONS", "/apps", Origin=origin, **NO_TOKEN, **asks)


async def test_a_named_origin_may_ask_and_read(tmp_path: Path) -> None:
    async with served(tmp_path, AETHER_CORS_ALLOWED_ORIGINS=f"{PAGE}, http://localhost:5173") as api:
        status, said = await preflight(api, PAGE)
        assert (status, said["Access-Control-Allow-Origin"]) == (204, PAGE)
        assert "POST" in said["Access-Control-Allow-Methods"]
        assert "Authorization" in said["Access-Control-Allow-Headers"]
        assert "Access-Control-Allow-Credentials" not in said

        status, said = await ask(api, "GET", "/auth/whoami", Origin=PAGE)
        assert (status, said["Access-Control-Allow-Origin"], said["Vary"]) == (200, PAGE, "Origin")
        assert "X-Request-Id" in said["Access-Control-Expose-Headers"]

        # a page must be able to read why it was refused
        status, said = await ask(api, "GET", "/nothing", Origin=PAGE, Authorization="Bearer no")
        assert (status, said["Access-Control-Allow-Origin"]) == (401, PAGE)


async def test_other_origins_get_no_permission(tmp_path: Path) -> None:
    async with served(tmp_path, AETHER_CORS_ALLOWED_ORIGINS=PAGE) as api:
        for origin in ("https://evil.example", f"{PAGE}.evil.example", "null", "http://console.example.com"):
            _, said = await preflight(api, origin)
            assert not any(name.startswith("Access-Control") for name in said)
            status, said = await ask(api, "GET", "/auth/whoami", Origin=origin)
            assert (status, said["Vary"]) == (200, "Origin")
            assert "Access-Control-Allow-Origin" not in said


async def test_every_origin_when_the_operator_says_so(tmp_path: Path) -> None:
    async with served(tmp_path, AETHER_CORS_ALLOWED_ORIGINS="*") as api:
        _, said = await ask(api, "GET", "/healthz", Origin="https://any.example")
        assert said["Access-Control-Allow-Origin"] == "*"


async def test_nothing_is_said_unless_set(tmp_path: Path) -> None:
    async with served(tmp_path) as api:
        status, said = await preflight(api, PAGE)
        assert status == 401
        assert not any(name.startswith("Access-Control") for name in said)


NO_ORIGINS = (PAGE[8:], f"{PAGE}/", f"{PAGE}/app", "https://*.example.com", "https://Example.com", "null")


@pytest.mark.parametrize("origin", NO_ORIGINS)
def test_what_is_no_origin_is_refused_at_the_start(origin: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="AETHER_CORS_ALLOWED_ORIGINS"):
        load({"AETHER_CORS_ALLOWED_ORIGINS": origin}, data_dir=tmp_path)
