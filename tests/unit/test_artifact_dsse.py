"""DSSE envelopes: securesystemslib verifies what is written, strangers' envelopes are read, altered ones are not."""

import json
from base64 import b64encode, urlsafe_b64encode
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope as TheirEnvelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from aether.artifact import dsse, signature
from aether.model.errors import BadRequest

VECTOR = json.loads((Path(__file__).parents[1] / "vectors" / "signature.json").read_text("utf-8"))
SEED = bytes.fromhex(VECTOR["seed_hex"])
KEY = VECTOR["public_key_hex"]
OTHER = bytes(range(32))
seeds = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=4, unique=True)


def _theirs(key: str) -> SSlibKey:
    return SSlibKey(signature.key_id(key), "ed25519", "ed25519", {"public": key})


def test_the_shared_vector() -> None:
    about = VECTOR["dsse"]
    made = dsse.Envelope(about["payload"].encode()).signed(SEED)
    assert json.loads(made.encode()) == about["envelope"]
    assert dsse.pae(dsse.PAYLOAD_TYPE, made.payload).hex() == about["pae_hex"]
    assert dsse.decode(made.encode()) == made


def test_the_specification_s_example_of_the_encoding() -> None:
    assert dsse.pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


@given(st.binary(max_size=200), seeds)
def test_securesystemslib_accepts_every_signature(payload: bytes, keys: list[bytes]) -> None:
    envelope = dsse.Envelope(payload)
    for seed in keys:
        envelope = envelope.signed(seed)
    public = [signature.public_key(seed) for seed in keys]
    theirs = TheirEnvelope.from_dict(json.loads(envelope.encode()))
    assert theirs.pae() == dsse.pae(dsse.PAYLOAD_TYPE, payload)
    accepted = theirs.verify([_theirs(key) for key in public], threshold=len(keys))
    assert set(accepted) == {signature.key_id(key) for key in public}
    assert dsse.decode(envelope.encode()).verify(public) == public


def test_an_envelope_that_securesystemslib_made_is_read() -> None:
    signer = CryptoSigner.generate_ed25519()
    theirs = TheirEnvelope(b'{"a":1}', dsse.PAYLOAD_TYPE, {})
    theirs.sign(signer)
    found = dsse.decode(json.dumps(theirs.to_dict()).encode())
    assert found.verify([KEY, signer.public_key.keyval["public"]]) == [signer.public_key.keyval["public"]]


@given(st.binary(min_size=1, max_size=100), st.integers(0, 799))
def test_an_altered_payload_is_signed_by_nobody(payload: bytes, bit: int) -> None:
    made = dsse.Envelope(payload).signed(SEED)
    altered = bytearray(payload)
    altered[bit // 8 % len(payload)] ^= 1 << bit % 8
    assert dsse.Envelope(bytes(altered), made.payload_type, made.signatures).verify([KEY]) == []
    assert dsse.Envelope(payload, "text/plain", made.signatures).verify([KEY]) == []
    raw = json.loads(made.encode())
    raw["payload"] = b64encode(bytes(altered)).decode()
    with pytest.raises(VerificationError):
        TheirEnvelope.from_dict(raw).verify([_theirs(KEY)], 1)


def test_another_key_signed_nothing() -> None:
    made = dsse.Envelope(b"{}").signed(SEED)
    assert made.verify([signature.public_key(OTHER)]) == []
    assert made.verify([KEY, KEY]) == [KEY]


def test_signing_again_replaces_the_signature_of_the_same_key() -> None:
    twice = dsse.Envelope(b"{}").signed(SEED).signed(OTHER).signed(SEED)
    assert [one.keyid for one in twice.signatures] == [
        signature.key_id(signature.public_key(OTHER)),
        signature.key_id(KEY),
    ]


def test_a_key_id_is_a_hint_only() -> None:
    raw = json.loads(dsse.Envelope(b"{}").signed(SEED).encode())
    for keyid in ("", "somebody's name for it"):
        raw["signatures"][0]["keyid"] = keyid
        assert dsse.decode(json.dumps(raw).encode()).verify([KEY]) == [KEY]
    del raw["signatures"][0]["keyid"]
    assert dsse.decode(json.dumps(raw).encode()).verify([KEY]) == [KEY]


def test_url_safe_base64_and_unknown_fields_are_read() -> None:
    made = dsse.Envelope(bytes(range(256))).signed(SEED)
    raw = json.loads(made.encode())
    raw["payload"] = urlsafe_b64encode(made.payload).decode()
    raw["more"] = {"x": 1}
    assert dsse.decode(json.dumps(raw).encode()) == made


def _with(**changes: Any) -> bytes:
    raw = json.loads(dsse.Envelope(b"{}").signed(SEED).encode()) | changes
    return json.dumps({name: value for name, value in raw.items() if value is not ...}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"nonsense",
        b"\xff\xfe",
        _with(payloadType="text/plain"),
        _with(payload="***"),
        _with(payload=7),
        _with(payload=...),
        _with(signatures=[]),
        _with(signatures={}),
        _with(signatures=[{"sig": "x"}]),
        _with(signatures=["x"]),
        _with(signatures=[{"keyid": 1, "sig": ""}]),
        _with(signatures=[{"keyid": "a", "sig": ""}, {"keyid": "a", "sig": ""}]),
        _with(signatures=[{"keyid": str(n), "sig": ""} for n in range(17)]),
        _with()[:-1] + b',"payload":"e30="}',
        b'{"payload":' * 100_000,
    ],
)
def test_what_is_no_envelope_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest):
        dsse.decode(data)


@given(st.binary(max_size=300))
def test_any_bytes_give_an_envelope_or_a_refusal(data: bytes) -> None:
    with pytest.raises(BadRequest):
        dsse.decode(data)


def test_an_envelope_has_a_longest_size() -> None:
    with pytest.raises(BadRequest, match="larger"):
        dsse.decode(b" " * (dsse.MAX_BYTES + 1))
