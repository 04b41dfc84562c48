"""Every route of the description, called with what it allows and with what it does not, on a real server.

The examples are the same in every run. `AETHER_FUZZ_EXAMPLES` asks for more of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from support.server import Server, hello, server

schemathesis = pytest.importorskip("schemathesis", reason="component: schemathesis")

EXAMPLES = int(os.environ.get("AETHER_FUZZ_EXAMPLES", "8"))
TOKENS = {"admin": "tok-admin", "deployer": "tok-deployer"}
ENDLESS = ("follow",)
"""Query parameters that make an answer last."""

_DESTROYED = ("/apps/{app}", "/teams/{team}", "/api/functions/{function}")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = {
        "AETHER_API_TOKENS": "tok-admin:admin:ann,tok-deployer:deployer:dan",
        "AETHER_APP_MEMORY_BYTES": "67108864",
    }
    with server(tmp_path_factory.mktemp("fuzz"), **limits) as it:
        # stopped: deployments of it are made and recorded, and no example starts a process
        it.deploy("shop", hello("hi"))
        assert it.api("POST", "/apps/shop/scale", {"web": 0})[0] == 200
        it.api("POST", "/apps", {"name": "idle"})
        it.api("POST", "/teams", {"name": "crew"})
        it.api("POST", "/api/functions", {"name": "greet", "runtime": "node", "entrypoint": "index.js"})
        yield it


@pytest.fixture(scope="module")
def known(up: Server) -> dict[str, str]:
    """Names of things that exist, by the name of the path parameter."""
    newest = up.api("GET", "/deployments?app=shop")[1]["items"][0]
    return {
        "app": "shop",
        "deployment_id": newest["id"],
        "digest": newest["digest"],
        "function": "greet",
        "team": "crew",
        "user": "nobody",
    }


@pytest.fixture(scope="module")
def operations(up: Server) -> list[Any]:
    status, spec = up.api("GET", "/openapi.json")
    assert status == 200
    schema = schemathesis.openapi.from_dict(spec)
    found = [result.ok() for result in schema.get_all_operations()]
    assert len(found) == sum(len(path) for path in spec["paths"].values())
    return found


def checks() -> list[Any]:
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as openapi

    return [
        not_a_server_error,
        openapi.status_code_conformance,
        openapi.content_type_conformance,
        openapi.response_headers_conformance,
        openapi.response_schema_conformance,
    ]


def tame(case: Any, known: dict[str, str], real: bool) -> None:
    """Name something that exists, where that destroys nothing, and let nothing wait."""
    path, method = case.operation.path, case.operation.method.upper()
    if real and not (method == "DELETE" and path in _DESTROYED):
        for name in case.path_parameters or {}:
            if name in known:
                case.path_parameters[name] = "idle" if path.endswith("/scale") else known[name]
    if real and path == "/deployments" and method == "POST" and isinstance(case.body, dict):
        case.body |= {"app": known["app"], "digest": known["digest"]}
    for name in ENDLESS:
        if isinstance(case.query, dict) and name in case.query:
            case.query[name] = "false"
    if isinstance(case.body, dict) and isinstance(case.body.get("wait_secs"), (int, float)):
        case.body["wait_secs"] = min(case.body["wait_secs"], 0)


class Caller:
    """Calls one route again and again with what is made up for it."""

    def __init__(self, up: Server, session: requests.Session, known: dict[str, str], mode: Any) -> None:
        self._base = f"http://127.0.0.1:{up.port}"
        self._session = session
        self._known = known
        self._mode = mode
        self._checks = checks()
        self.count = 0

    def route(self, operation: Any) -> None:
        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=self._mode), real=st.booleans())
        def one(case: Any, real: bool) -> None:
            self._one(case, real)

        one()

    def _one(self, case: Any, real: bool) -> None:
        tame(case, self._known, real)
        answer = case.call(base_url=self._base, session=self._session, timeout=20)
        self.count += 1
        assert b"Traceback" not in answer.content
        case.validate_response(answer, checks=self._checks)


def call_all(up: Server, operations: list[Any], known: dict[str, str], token: str, mode: Any) -> None:
    failures: list[str] = []
    silent: list[str] = []
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {token}"
        caller = Caller(up, session, known, mode)
        for operation in operations:
            before = caller.count
            try:
                caller.route(operation)
            except Unsatisfiable:
                pass  # without parameters there is nothing that does not fit
            except Exception as error:
                told = [error, *getattr(error, "exceptions", ())]
                failures.append(f"{operation.label}\n" + "\n".join(f"{type(e).__name__}: {e}"[:1500] for e in told))
            if caller.count == before:
                silent.append(operation.label)
    assert not failures, "\n\n".join(failures)
    assert mode is schemathesis.GenerationMode.NEGATIVE or not silent


@pytest.mark.parametrize("role", TOKENS)
def test_what_the_description_allows_is_answered_as_it_says(
    up: Server, operations: list[Any], known: dict[str, str], role: str
) -> None:
    call_all(up, operations, known, TOKENS[role], schemathesis.GenerationMode.POSITIVE)
    assert up.api("GET", "/readyz")[0] == 200


def test_what_it_does_not_allow_is_refused_in_the_envelope(
    up: Server, operations: list[Any], known: dict[str, str]
) -> None:
    call_all(up, operations, known, TOKENS["admin"], schemathesis.GenerationMode.NEGATIVE)
    assert up.api("GET", "/readyz")[0] == 200


def test_methods_that_a_path_does_not_take_name_those_it_takes(up: Server, operations: list[Any]) -> None:
    paths: dict[str, set[str]] = {}
    for operation in operations:
        paths.setdefault(operation.path, set()).add(operation.method.upper())
    for path, methods in paths.items():
        place = path.replace("{", "").replace("}", "")
        for method in {"TRACE", "PUT", "DELETE", "PATCH", "POST"} - methods:
            answer = requests.request(
                method,
                f"http://127.0.0.1:{up.port}{place}",
                headers={"Authorization": "Bearer tok-admin"},
                timeout=20,
            )
            assert answer.status_code == 405, (method, path)
            assert set(answer.headers["Allow"].split(", ")) == methods | {"OPTIONS"}, (method, path)
        answer = requests.options(
            f"http://127.0.0.1:{up.port}{place}", headers={"Authorization": "Bearer tok-admin"}, timeout=20
        )
        assert set(answer.headers["Allow"].split(", ")) == methods | {"OPTIONS"}, path


def test_an_empty_key_is_refused_each_time(up: Server) -> None:
    for path, body in (("/apps/shop/rollback", {}), ("/deployments", {"app": "shop", "digest": "0" * 64})):
        for _ in range(2):
            status, answer = up.api("POST", path, body, {"Idempotency-Key": ""})
            assert (status, answer["code"]) == (400, "bad_request"), answer
