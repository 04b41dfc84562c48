"""Signatures: the vector CLI, server and pod share, keys that cannot be, and what a signing key may look like."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from aether.artifact import signature
from aether.model.errors import BadRequest, ConfigError, InvalidDigest

VECTOR = json.loads((Path(__file__).parents[1] / "vectors" / "signature.json").read_text("utf-8"))
SEED = bytes.fromhex(VECTOR["seed_hex"])
KEY = VECTOR["public_key_hex"]
P = 2**255 - 19
D = -121665 * pow(121666, P - 2, P) % P

digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
seeds = st.binary(min_size=32, max_size=32)


def test_the_shared_vector() -> None:
    assert signature.public_key(SEED) == KEY
    assert signature.key_id(KEY) == VECTOR["key_id"]
    assert signature.sign(VECTOR["digest"], SEED) == VECTOR["signature_hex"]
    assert signature.verify(VECTOR["digest"], VECTOR["signature_hex"], KEY)


def test_the_vector_holds_for_the_library_alone() -> None:
    key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(KEY))
    key.verify(bytes.fromhex(VECTOR["signature_hex"]), VECTOR["digest"].encode("ascii"))
    about = VECTOR["authorization"]
    key.verify(bytes.fromhex(about["signature_hex"]), about["message"].encode("ascii"))


def test_an_existing_key_lets_a_new_one_in_for_one_app() -> None:
    about = VECTOR["authorization"]
    new = about["new_public_key_hex"]
    assert signature.authorization(about["app"], new).decode("ascii") == about["message"]
    assert signature.authorize(about["app"], new, SEED) == about["signature_hex"]
    assert signature.authorized(about["app"], new, about["signature_hex"], KEY)
    assert not signature.authorized("other", new, about["signature_hex"], KEY)
    assert not signature.authorized(about["app"], KEY, about["signature_hex"], KEY)
    assert not signature.authorized(about["app"], new, about["signature_hex"], new)
    assert not signature.authorized(about["app"], new, "00", KEY)


@given(digests, seeds, st.integers(0, 511))
def test_a_signature_fits_one_digest_one_key_and_no_altered_bit(digest: str, seed: bytes, bit: int) -> None:
    made = signature.sign(digest, seed)
    key = signature.public_key(seed)
    assert len(made) == 128
    assert signature.verify(digest, made, key)
    altered = bytearray.fromhex(made)
    altered[bit // 8] ^= 1 << bit % 8
    assert not signature.verify(digest, altered.hex(), key)
    if seed != SEED:
        assert not signature.verify(digest, made, KEY)
    other = f"{digest[:-1]}{'0' if digest[-1] != '0' else '1'}"
    assert not signature.verify(other, made, key)


@given(st.text(max_size=140), st.text(max_size=140), st.text(max_size=70))
def test_verify_says_no_to_whatever_is_no_signature(digest: str, made: str, key: str) -> None:
    assert not signature.verify(digest, made, key)
    assert not signature.verify(VECTOR["digest"], made, KEY)
    assert not signature.verify(VECTOR["digest"], VECTOR["signature_hex"], key)


def test_upper_case_is_another_text() -> None:
    assert not signature.verify(VECTOR["digest"].upper(), VECTOR["signature_hex"], KEY)
    assert not signature.verify(VECTOR["digest"], VECTOR["signature_hex"].upper(), KEY)
    with pytest.raises(InvalidDigest):
        signature.sign(VECTOR["digest"].upper(), SEED)
    for text in (KEY.upper(), KEY[:-1], KEY + "00", "", "z" * 64):
        with pytest.raises(BadRequest):
            signature.check_public_key(text)
    with pytest.raises(BadRequest):
        signature.check_signature(VECTOR["signature_hex"][:-2])
    assert signature.check_signature(VECTOR["signature_hex"]) == VECTOR["signature_hex"]


def _x(y: int) -> int | None:
    """The even x of the point with this y on the curve, None if there is none."""
    square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    root = pow(square, (P + 3) // 8, P)
    if root * root % P != square:
        root = root * pow(2, (P - 1) // 4, P) % P
    return root if root * root % P == square else None


def _add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    (x1, y1), (x2, y2) = a, b
    both = D * x1 * x2 * y1 * y2 % P
    return (
        (x1 * y2 + x2 * y1) * pow(1 + both, P - 2, P) % P,
        (y1 * y2 + x1 * x2) * pow(1 - both, P - 2, P) % P,
    )


def test_points_of_small_order_are_no_keys() -> None:
    order = 2**252 + 27742317777372353535851937790883648493
    found: set[int] = set()
    for y in range(2, 40):
        x = _x(y)
        point, power, result = (x, y) if x is not None else None, order, (0, 1)
        if point is None:
            continue
        while power:  # order times any point leaves only its part of small order
            result = _add(result, point) if power & 1 else result
            point, power = _add(point, point), power >> 1
        assert _add(*[_add(*[_add(result, result)] * 2)] * 2) == (0, 1)
        found.add(result[1])
    assert found >= {0, 1, P - 1}, "the sample met every small order"
    assert len(found) == 5
    spellings = [y + more * P for y in found for more in (0, 1) if y + more * P < 2**255]
    for spelled in spellings:
        for sign in (0, 1):
            with pytest.raises(BadRequest, match="small order"):
                signature.check_public_key((spelled | sign << 255).to_bytes(32, "little").hex())
    zero_key = bytes([1, *bytes(31)]).hex()
    trivial = bytes([1, *bytes(63)]).hex()
    assert not signature.verify(VECTOR["digest"], trivial, zero_key)


def test_a_seed_is_read_from_hex_and_pem() -> None:
    assert signature.read_seed(f"  {SEED.hex()}\n", "x") == SEED
    assert signature.read_seed(SEED.hex().upper(), "x") == SEED
    key = ed25519.Ed25519PrivateKey.from_private_bytes(SEED)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    assert signature.read_seed(pem, "x") == SEED


def test_what_is_no_signing_key_is_refused_without_being_shown() -> None:
    sealed = ed25519.Ed25519PrivateKey.from_private_bytes(SEED).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    other = ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    cases = {
        "is not a signing key": ["", SEED.hex()[:-1], SEED.hex() + "00", "s3cret-text-of-somebody"],
        "under a password": [sealed.decode()],
        "not Ed25519": [other.decode()],
        "not a private key": ["-----BEGIN PRIVATE KEY-----\ns3cret\n-----END PRIVATE KEY-----"],
    }
    for words, texts in cases.items():
        for text in texts:
            with pytest.raises(ConfigError, match=words) as caught:
                signature.read_seed(text, "AETHER_SIGNING_KEY")
            assert "AETHER_SIGNING_KEY" in caught.value.message
            assert not text or text.strip() not in caught.value.message


def test_a_public_key_is_read_from_hex_and_pem() -> None:
    key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(KEY))
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    assert signature.read_public_key(pem, "x") == KEY
    assert signature.read_public_key(KEY.upper() + "\n", "x") == KEY
    for text in ("nonsense", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"):
        with pytest.raises(ConfigError, match="the file"):
            signature.read_public_key(text, "the file")
