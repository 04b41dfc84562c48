"""Keys, sealed texts, and what is said when a key is missing."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.model.errors import ConfigError, ServiceUnavailable
from aether.stores.keys.keyring import Keyring, Source, key_id, load, sealed_with

OURS = Source("secrets.key", None)
OLD, NEW = b"o" * 32, b"n" * 32


def text(key: bytes) -> str:
    return base64.b64encode(key).decode()


@given(st.binary(max_size=2000), st.text(max_size=50))
def test_what_is_sealed_opens_again_and_nothing_of_it_shows(plain: bytes, about: str) -> None:
    keys = Keyring([NEW, OLD], OURS)
    sealed = keys.seal(plain, about)
    assert keys.unseal(sealed, about) == plain
    assert sealed.isascii()
    assert sealed.startswith(keys.mark)
    assert sealed_with(sealed) == keys.newest == key_id(NEW)
    assert len(plain) < 8 or plain not in base64.urlsafe_b64decode(sealed.rpartition(":")[2])


def test_a_text_opens_only_as_what_it_was_made_for() -> None:
    keys = Keyring([NEW], OURS)
    sealed = keys.seal(b"secret", "configs/a/1")
    for wrong in ("configs/a/2", "configs/b/1", "deployments/a/1"):
        with pytest.raises(ServiceUnavailable, match="altered, or belongs to another row"):
            keys.unseal(sealed, wrong)


@given(st.integers(min_value=0, max_value=10_000))
def test_an_altered_text_does_not_open(at: int) -> None:
    keys = Keyring([NEW], OURS)
    sealed = keys.seal(b"a secret of some length", "x")
    head, _, body = sealed.rpartition(":")
    raw = bytearray(base64.urlsafe_b64decode(body))
    raw[at % len(raw)] ^= 1
    with pytest.raises(ServiceUnavailable):
        keys.unseal(f"{head}:{base64.urlsafe_b64encode(raw).decode()}", "x")


@pytest.mark.parametrize("broken", ["", "plain", "{}", "a1:", "a1:zz:AAAA", "a2:x:y"])
def test_what_was_never_sealed_does_not_open(broken: str) -> None:
    with pytest.raises(ServiceUnavailable):
        Keyring([NEW], OURS).unseal(broken, "x")


def test_older_keys_read_and_the_first_one_writes() -> None:
    sealed = Keyring([OLD], OURS).seal(b"x", "a")
    assert Keyring([NEW, OLD], OURS).unseal(sealed, "a") == b"x"
    with pytest.raises(ServiceUnavailable, match=key_id(OLD)):
        Keyring([NEW], OURS).unseal(sealed, "a")


def test_the_first_start_makes_a_private_key_and_the_next_one_reads_it(tmp_path: Path) -> None:
    made = load(tmp_path, given="", file=None, in_use=())
    file = tmp_path / "secrets.key"
    assert file.stat().st_mode & 0o777 == 0o600
    kept = file.read_bytes()
    again = load(tmp_path, given="", file=None, in_use=[made.newest])
    assert again.newest == made.newest
    assert file.read_bytes() == kept
    assert sorted(os.listdir(tmp_path)) == ["secrets.key"]


def test_a_missing_key_is_named_and_never_replaced(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"secrets.key is missing.*{key_id(OLD)}.*put the file back"):
        load(tmp_path, given="", file=None, in_use=[key_id(OLD)])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "secrets.key").write_text(text(NEW))
    (tmp_path / "secrets.key").chmod(0o600)
    with pytest.raises(ConfigError, match=f"does not hold the key {key_id(OLD)}.*holds {key_id(NEW)}"):
        load(tmp_path, given="", file=None, in_use=[key_id(OLD)])
    with pytest.raises(ConfigError, match="names is missing: make one"):
        load(tmp_path, given="", file=tmp_path / "none", in_use=())


def test_keys_of_the_environment_come_first_and_are_not_written(tmp_path: Path) -> None:
    keys = load(tmp_path, given=f"{text(NEW)}, {text(OLD)}", file=tmp_path / "none", in_use=[key_id(OLD)])
    assert keys.ids == [key_id(NEW), key_id(OLD)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "# only a comment\n", "not base64!\n", "c2hvcnQ=\n", "\0\n"])
def test_a_file_without_a_usable_key_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "k"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=r"holds (no key|something that is not a key)") as told:
        load(tmp_path, given="", file=file, in_use=())
    assert "c2hvcnQ" not in told.value.message


def test_a_file_that_everybody_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "k"
    file.write_text(text(NEW))
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load(tmp_path, given="", file=file, in_use=())
