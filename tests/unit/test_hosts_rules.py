"""Custom hosts: which names may be one, which addresses may prove one, and what a resolver's answer says."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.hosts.dns import TXT, A, DnsError, ask, parse_resolver, read
from aether.hosts.names import canonical, check_free, is_reserved
from aether.hosts.proof import allowed_private, is_public
from aether.model.errors import BadRequest


@pytest.mark.parametrize(
    ("given_name", "name"),
    [
        ("WWW.Example.COM", "www.example.com"),
        (" shop.example.com. ", "shop.example.com"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.Example", "xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("a-b.1c.example", "a-b.1c.example"),
    ],
)
def test_a_host_has_one_spelling(given_name: str, name: str) -> None:
    assert canonical(given_name) == name
    assert canonical(name) == name


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "example", "*.example.com", "http://example.com", "example.com/x", "example.com:80", "10.0.0.1",
        "::1", "-a.example", "a-.example", "a..example", "a_b.example", "a.example.1", "x" * 64 + ".example",
        "a.b\n.example", "a b.example", "xn--\u00e9.example", "xn--a.example", ("a" * 60 + ".") * 5 + "example",
        "\u2028.example",
    ],
)  # fmt: skip
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        canonical(text)


@given(st.text(max_size=40))
def test_a_host_is_refused_or_safe_in_a_header_and_a_file_name(text: str) -> None:
    try:
        name = canonical(text)
    except BadRequest:
        return
    assert canonical(name) == name
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
    assert "." in name
    assert not name.startswith(".")
    assert ".." not in name


def test_names_of_the_api_and_of_apps_are_not_free() -> None:
    for name in ("apps.example.com", "shop.apps.example.com", "a.b.apps.example.com", "api.example.com"):
        with pytest.raises(BadRequest):
            check_free(name, "apps.example.com", ["localhost", "API.example.com."])
    check_free("example.com", "apps.example.com", ["api.example.com"])
    check_free("notapps.example.com", "apps.example.com", [])


def test_reserved_names() -> None:
    assert is_reserved("shop.test")
    assert is_reserved("a.shop.localhost")
    assert not is_reserved("shop.example.com")
    assert not is_reserved("test.example")
    assert not is_reserved("mytest.org")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False), ("0.0.0.0", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("224.0.0.1", False), ("255.255.255.255", False),
        ("::1", False), ("fe80::1", False), ("fd00::1", False), ("::ffff:127.0.0.1", False), ("::", False),
        ("::ffff:93.184.216.34", True), ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False), ("ff02::1", False),
    ],
)  # fmt: skip
def test_only_public_addresses_prove(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_private_hosts_are_allowed_by_name() -> None:
    assert allowed_private("a.corp", ["a.corp"])
    assert allowed_private("a.b.corp", [".corp"])
    assert not allowed_private("corp", [".corp"])
    assert not allowed_private("xa.corp", ["a.corp"])


def test_resolvers_are_written_with_or_without_port() -> None:
    assert parse_resolver("9.9.9.9") == ("9.9.9.9", 53)
    assert parse_resolver("127.0.0.1:8053") == ("127.0.0.1", 8053)
    assert parse_resolver("::1") == ("::1", 53)
    assert parse_resolver("[::1]:8053") == ("::1", 8053)
    assert parse_resolver("[::1]") == ("::1", 53)
    for wrong in ("dns.example", "", "1.2.3.4:x"):
        with pytest.raises(ValueError):
            parse_resolver(wrong)


def answer(question: bytes, *records: tuple[int, bytes], code: int = 0) -> bytes:
    head = question[:2] + struct.pack("!HHHHH", 0x8180 | code, 1, len(records), 0, 0)
    body = b"".join(b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, 60, len(data)) + data for kind, data in records)
    return head + question[12:] + body


def test_an_answer_of_a_resolver_is_read() -> None:
    question = ask("_aether.example.com", TXT, b"ab")
    texts = (TXT, b"\x03one\x04 two"), (5, b"\xc0\x0c"), (TXT, b"\x05three")
    assert read(answer(question, *texts), question, TXT) == ["one two", "three"]
    assert read(answer(question, code=3), question, TXT) == []
    where = ask("example.com", A, b"cd")
    assert read(answer(where, (A, bytes([192, 0, 2, 1]))), where, A) == ["192.0.2.1"]
    with pytest.raises(DnsError):
        read(answer(question, code=2), question, TXT)
    with pytest.raises(DnsError, match="another question"):
        read(answer(ask("_aether.example.org", TXT, b"ab")), question, TXT)


@given(st.binary(max_size=80), st.integers(0, 120))
def test_nonsense_of_a_resolver_is_an_error_of_a_known_kind(junk: bytes, cut: int) -> None:
    question = ask("example.com", TXT, b"ab")
    message = answer(question, (TXT, b"\x05three"))[:cut] + junk
    try:
        assert isinstance(read(message, question, TXT), list)
    except (DnsError, ValueError, IndexError, struct.error):
        return
