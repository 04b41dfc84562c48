"""What a server requires of artifacts it requires of the code of functions: with every new version."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.test_registry_policy import add_key, code, restart, store
from support.server import Server, server
from support.supply import Signer
from support.zips import Item, zipped

HELLO = {"name": "shop", "runtime": "node", "entrypoint": "server.js"}
ZIP = zipped(Item(b"server.js", b"one"))


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Server]:
    """A server that keeps functions without running them, and requires nothing yet."""
    with server(tmp_path / "up", AETHER_FUNCTION_RUNTIME="off") as it:
        it.api("POST", "/apps", {"name": "shop"})
        assert it.api("POST", "/api/functions", HELLO)[0] == 201
        yield it


def give(up: Server, digest: str) -> tuple[int, Any]:
    return up.api("POST", "/api/functions/shop/code", {"artifact": digest})


def version(up: Server) -> int:
    return up.api("GET", "/api/functions/shop")[1]["version"]


def test_signatures_are_required_with_every_version(fresh: Server) -> None:
    up, key = fresh, Signer()
    unsigned, signed = store(up, "shop", "one"), store(up, "shop", "two", key)
    raw = {"Content-Type": "application/zip"}
    assert up.api("POST", "/api/functions/shop/code", ZIP, raw)[1]["version"] == 2
    assert give(up, unsigned)[1]["version"] == 3
    restart(up, AETHER_REQUIRE_SIGNATURE="1")
    other = zipped(Item(b"server.js", b"two"))
    assert code(up.api("POST", "/api/functions/shop/code", other, raw)) == (403, "signature_required")
    assert code(give(up, signed)) == (403, "signature_required")
    key_id = add_key(up, "shop", key)
    assert give(up, signed)[1]["version"] == 4
    for earlier in (2, 3):  # an archive of unknown origin, and an artifact without a signature
        answer = up.api("POST", "/api/functions/shop/rollback", {"version": earlier})
        assert code(answer) == (403, "signature_required")
    assert up.api("PUT", "/api/functions/shop", {"env_vars": {"A": "1"}})[1]["version"] == 5
    assert up.api("DELETE", f"/apps/shop/public-keys/{key_id}")[0] == 200
    assert code(up.api("PUT", "/api/functions/shop", {"env_vars": {"A": "2"}})) == (403, "signature_required")
    assert version(up) == 5


@pytest.mark.parametrize(
    ("setting", "refusal"),
    [("AETHER_ENFORCE_SBOM", "sbom_required"), ("AETHER_REQUIRE_PROVENANCE", "provenance_required")],
)
def test_documents_are_required_too(fresh: Server, setting: str, refusal: str) -> None:
    up = fresh
    digest = store(up, "shop", "one", Signer())
    restart(up, **{setting: "1"})
    assert code(give(up, digest)) == (403, refusal)
    raw = {"Content-Type": "application/zip"}
    assert code(up.api("POST", "/api/functions/shop/code", ZIP, raw)) == (403, refusal)
    assert version(up) == 1


def test_code_outlives_the_artifact_and_its_app(fresh: Server) -> None:
    up = fresh
    assert give(up, store(up, "shop", "one"))[0] == 200
    assert up.api("DELETE", "/apps/shop")[0] == 204
    assert up.api("PUT", "/api/functions/shop", {"memory_mb": 256})[1]["version"] == 3
    restart(up, AETHER_REQUIRE_SIGNATURE="1")
    # nothing is known of its signature any more
    assert code(up.api("PUT", "/api/functions/shop", {"memory_mb": 512})) == (403, "signature_required")


def test_a_server_that_runs_no_functions_says_so(fresh: Server) -> None:
    up = fresh
    assert give(up, store(up, "shop", "one"))[0] == 200
    status, said = up.api("POST", "/api/functions/shop/warm")
    assert (status, said["message"]) == (503, "functions are not run by this server")
    assert up.api("GET", "/api/functions/shop")[1]["status"] == "idle"
    assert up.api("DELETE", "/api/functions/shop")[0] == 204
