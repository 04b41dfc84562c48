"""Signed URLs: what was signed is accepted, anything else is not."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.model.errors import BadRequest, Forbidden
from aether.stores.objects.signing import UrlSigner, check_key

segment = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True)
keys = st.lists(segment, min_size=1, max_size=4).map("/".join)


def split(url: str) -> tuple[str, str]:
    path, _, query = url.partition("?")
    return path.removeprefix("/objects/"), query


@given(key=keys, size=st.integers(0, 2**50), expires=st.integers(0, 10**6), age=st.integers(0, 2 * 10**6))
def test_a_put_url_holds_until_it_expires(key: str, size: int, expires: int, age: int) -> None:
    now = [1_000_000.0]
    signer = UrlSigner(b"secret", lambda: now[0])
    url, expires_at = signer.sign("PUT", key, expires, size=size)
    assert expires_at == 1_000_000 + expires
    now[0] += age
    if age > expires:
        with pytest.raises(Forbidden, match="expired"):
            signer.check("PUT", *split(url))
    else:
        grant = signer.check("PUT", *split(url))
        assert (grant.key, grant.size_bytes) == (key, size)


@given(key=keys, name=st.text(max_size=50))
def test_a_get_url_keeps_its_file_name(key: str, name: str) -> None:
    signer = UrlSigner(b"secret")
    url, _ = signer.sign("GET", key, 60, filename=name)
    assert signer.check("GET", *split(url)).filename == name


@given(key=keys, data=st.data())
def test_no_field_can_be_changed_added_or_dropped(key: str, data: st.DataObject) -> None:
    signer = UrlSigner(b"secret")
    path, query = split(signer.sign("PUT", key, 60, size=7)[0])
    fields = dict(parse_qsl(query))
    name = data.draw(st.sampled_from([*fields, "more"]))
    value = data.draw(st.none() | st.text(max_size=70))
    changed = {**fields, name: value}
    kept = {k: v for k, v in changed.items() if v is not None}
    if kept == fields:
        return
    with pytest.raises(Forbidden):
        signer.check("PUT", path, urlencode(kept))


@given(query=st.text(max_size=200), key=st.text(max_size=50), method=st.sampled_from(["PUT", "GET", "DELETE", ""]))
def test_noise_is_refused_without_a_crash(query: str, key: str, method: str) -> None:
    with pytest.raises(Forbidden):
        UrlSigner(b"secret").check(method, key, query)


def test_a_repeated_field_is_refused() -> None:
    path, query = split(UrlSigner(b"secret").sign("PUT", "pending/x", 60, size=7)[0])
    with pytest.raises(Forbidden):
        UrlSigner(b"secret").check("PUT", path, query + "&size=7")


def test_another_server_s_key_does_not_fit() -> None:
    path, query = split(UrlSigner(b"secret").sign("PUT", "pending/x", 60, size=7)[0])
    with pytest.raises(Forbidden):
        UrlSigner(b"other").check("PUT", path, query)


@given(key=keys)
def test_plain_keys_are_keys(key: str) -> None:
    assert check_key(key) == key


@given(key=st.text(max_size=40))
def test_a_key_never_climbs(key: str) -> None:
    try:
        checked = check_key(key)
    except BadRequest:
        return
    assert not checked.startswith("/")
    assert not any(part.startswith(".") or not part for part in checked.split("/"))
