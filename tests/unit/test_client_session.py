"""Session and config files: private, whole, and never offered to another server."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from aether.client.dial import Origin, is_loopback
from aether.client.session import (
    DEFAULT_API_BASE,
    Session,
    endpoint,
    normal_base,
    read_session,
    remove_session,
    session_path,
    write_session,
)
from aether.model.errors import ConfigError, LocalIOError


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_CONFIG_HOME": str(tmp_path / "config")}


def test_a_session_is_private_from_its_first_byte(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    real = os.open

    def watched(path: str, flags: int, mode: int = 0o777, **more: int) -> int:
        descriptor = real(path, flags, mode, **more)
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(os, "open", watched)
    before = os.umask(0)
    try:
        path = write_session(Session("http://127.0.0.1:1", "secret", "ada", "admin", "2026"), environ)
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
    assert os.listdir(os.path.dirname(path)) == ["session.json"]
    found = read_session(environ)
    assert found is not None
    assert (found.token, found.name) == ("secret", "ada")


def test_a_failed_write_keeps_the_old_session(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_session(Session("http://127.0.0.1:1", "old"), environ)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LocalIOError, match="No space left"):
        write_session(Session("http://127.0.0.1:1", "new"), environ)
    found = read_session(environ)
    assert found is not None
    assert found.token == "old"
    assert os.listdir(os.path.dirname(session_path(environ))) == ["session.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "null", '{"api_base": 1, "token": 2}', '{"token": "x"}'])
def test_a_damaged_session_says_what_to_do(environ: dict[str, str], content: str) -> None:
    path = Path(session_path(environ))
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ConfigError, match="aether login"):
        read_session(environ)


def test_removing(environ: dict[str, str]) -> None:
    assert not remove_session(environ)
    write_session(Session("http://127.0.0.1:1", "x"), environ)
    assert remove_session(environ)
    assert read_session(environ) is None


def test_where_server_and_token_come_from(environ: dict[str, str]) -> None:
    found = endpoint(environ)
    assert (found.api_base, found.token) == (DEFAULT_API_BASE, None)
    config = Path(environ["XDG_CONFIG_HOME"]) / "aether" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text('api_base = "https://one.example/"\n')
    assert endpoint(environ).api_base == "https://one.example"
    write_session(Session("https://two.example", "two"), environ)
    found = endpoint(environ)
    assert (found.api_base, found.token) == ("https://two.example", "two")
    found = endpoint({**environ, "AETHER_API_BASE": "https://three.example"})
    assert (found.api_base, found.token) == ("https://three.example", None), "a token went to a strange server"
    found = endpoint({**environ, "AETHER_API_BASE": "https://two.example/", "AETHER_TOKEN": "env"})
    assert (found.api_base, found.token) == ("https://two.example", "env")


@pytest.mark.parametrize("token", ["one\ntwo", "tök", "a b"])
def test_a_token_that_no_header_can_carry_is_a_configuration_error(environ: dict[str, str], token: str) -> None:
    with pytest.raises(ConfigError, match="AETHER_TOKEN"):
        endpoint({**environ, "AETHER_TOKEN": token})


def test_a_broken_config_names_its_file(environ: dict[str, str]) -> None:
    config = Path(environ["XDG_CONFIG_HOME"]) / "aether" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text("api_base = ")
    with pytest.raises(ConfigError, match=r"config\.toml"):
        endpoint(environ)
    config.write_text("api_base = 7")
    with pytest.raises(ConfigError, match="api_base"):
        endpoint(environ)


@pytest.mark.parametrize("url", ["", "ftp://x", "http://", "localhost:8080", "unix:relative", "http:/x"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError):
        normal_base(url)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("http://h", "http://h:80/x", True),
        ("http://h", "https://h", False),
        ("http://h:1", "http://h:2", False),
        ("http://H/", "http://h", True),
        ("http://h", "http://h.evil", False),
        ("unix:/a", "unix:/b", False),
    ],
)
def test_origins(a: str, b: str, same: bool) -> None:
    assert Origin(a).same(Origin(b)) is same


def test_host_headers() -> None:
    assert Origin("http://a.localhost:8080/x").host_header() == "a.localhost:8080"
    assert Origin("http://[::1]:8080").host_header() == "[::1]:8080"
    assert Origin("https://h").host_header() == "h"
    assert str(Origin("unix:/run/api.sock")) == "unix:/run/api.sock"
    with pytest.raises(ConfigError):
        Origin("http://h:99999")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("a.localhost", True), ("[::1]", True),
        ("0.0.0.0", False), ("127.0.0.1.evil.example", False), ("localhost.example", False), ("10.0.0.1", False),
    ],
)  # fmt: skip
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_the_file_holds_what_it_must(environ: dict[str, str]) -> None:
    path = write_session(Session("http://127.0.0.1:1", "t", "n", "r", "e"), environ)
    content = json.loads(Path(path).read_text())
    assert content == {"api_base": "http://127.0.0.1:1", "token": "t", "name": "n", "role": "r", "expires_at": "e"}
