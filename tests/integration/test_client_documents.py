"""Documents and downloads of the client against a server that refuses, is older, or breaks off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from aether.client.api import Api
from aether.client.documents import send_documents
from aether.client.download import download
from aether.client.transport import Transport
from aether.model.errors import BadRequest, DigestMismatch, NetworkError, NotFound, Unauthorized
from support.breaking import Exchange, Server, serving

DIGEST = "a" * 64
GIVEN = {"manifest": b"{}", "sbom": b'{"a":1}', "provenance": b"[]"}


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as it:
        yield it


@pytest.fixture
def api(server: Server) -> Iterator[Api]:
    with Api(Transport(server.url, "secret")) as it:
        yield it


def paths(kind: str) -> str:
    return f"/artifacts/{DIGEST}/{kind}"


def test_every_document_is_sent_as_it_is_with_the_token(server: Server, api: Api) -> None:
    for kind in GIVEN:
        server.routes[paths(kind)] = lambda it: it.reply({}, 201)
    assert send_documents(api, "shop", DIGEST, GIVEN) == dict.fromkeys(GIVEN)
    sent = {it.path.rpartition("/")[2].partition("?")[0]: it.body for it in server.seen}
    assert sent == GIVEN
    assert {it.headers["Authorization"] for it in server.seen} == {"Bearer secret"}
    assert {it.headers["Content-Type"] for it in server.seen} == {"application/json"}


def test_an_older_server_and_one_that_refuses(server: Server, api: Api) -> None:
    server.routes[paths("manifest")] = lambda it: it.reply({}, 201)
    server.routes[paths("sbom")] = lambda it: it.reply({"code": "bad_request", "message": "not valid"}, 400)
    server.routes[paths("provenance")] = lambda it: it.reply({"code": "not_found", "message": "no route"}, 404)
    found = send_documents(api, "shop", DIGEST, GIVEN)
    assert found["manifest"] is None
    assert isinstance(found["sbom"], BadRequest)
    assert isinstance(found["provenance"], NotFound)


def test_a_token_that_ran_out_is_renewed_once(server: Server) -> None:
    def answer(it: Exchange) -> None:
        if it.headers["Authorization"] == "Bearer new":
            it.reply({}, 201)
        else:
            it.reply({"code": "unauthorized", "message": "expired"}, 401)

    for kind in GIVEN:
        server.routes[paths(kind)] = answer
    with Api(Transport(server.url, "old", renew=lambda _: "new")) as api:
        assert send_documents(api, "shop", DIGEST, GIVEN) == dict.fromkeys(GIVEN)
    with Api(Transport(server.url, "old")) as api:
        assert isinstance(send_documents(api, "shop", DIGEST, GIVEN)["sbom"], Unauthorized)


def test_a_broken_connection_is_tried_again(server: Server, api: Api) -> None:
    for kind in GIVEN:
        server.routes[paths(kind)] = lambda it: it.cut() if it.number == 1 else it.reply({}, 201)
    assert send_documents(api, "shop", DIGEST, GIVEN) == dict.fromkeys(GIVEN)


def test_a_download_follows_the_redirect_and_keeps_the_token(server: Server, api: Api, tmp_path: Path) -> None:
    with serving() as store:
        store.routes["/bytes"] = lambda it: it.reply(b"x" * 100_000)
        there = f"{store.url}/bytes?signed=1"
        server.routes[paths("download")] = lambda it: it.reply({}, 307, Location=there)
        download(api.transport, DIGEST, str(tmp_path / "a"), app="shop", size_bytes=100_000)
        assert (tmp_path / "a").read_bytes() == b"x" * 100_000
        assert server.seen[0].headers["Authorization"] == "Bearer secret"
        assert "Authorization" not in store.seen[0].headers


def test_downloads_that_are_not_what_was_said(server: Server, api: Api, tmp_path: Path) -> None:
    server.routes[paths("download")] = lambda it: it.reply(b"x" * 10)
    with pytest.raises(DigestMismatch, match="more than the 5 bytes"):
        download(api.transport, DIGEST, str(tmp_path / "a"), size_bytes=5)
    with pytest.raises(NetworkError, match="10 of 20"):
        download(api.transport, DIGEST, str(tmp_path / "b"), size_bytes=20)
    server.routes[paths("download")] = lambda it: it.reply({}, 307, Location=paths("download"))
    with pytest.raises(NetworkError, match="without end"):
        download(api.transport, DIGEST, str(tmp_path / "c"), size_bytes=20)
    server.routes[paths("download")] = lambda it: it.reply({"code": "not_found", "message": "gone"}, 404)
    with pytest.raises(NotFound):
        download(api.transport, DIGEST, str(tmp_path / "d"), size_bytes=20)
