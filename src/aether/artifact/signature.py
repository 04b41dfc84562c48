"""Ed25519 signatures of artifacts (RFC 8032): over the digest's 64 lower-case hex characters, as ASCII bytes.

The same bytes are signed and checked by the CLI, the server and the pod; `tests/vectors/signature.json` holds the
vector all of them are tested with. Where a seed comes from (environment, file) is left to the callers; here its text
is understood. The library behind it is loaded on use: a deploy without a key does not pay for it.
"""

import binascii
from hashlib import sha256
from typing import TYPE_CHECKING

from aether.model.errors import BadRequest, ConfigError
from aether.model.names import check_app_name, check_digest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SEED_BYTES = KEY_BYTES = 32
SIGNATURE_BYTES = 64
_HEX = frozenset("0123456789abcdef")
_AUTHORIZATION = "aether-public-key:v1"
_PEM = "-----BEGIN"

_SMALL_ORDER = frozenset(
    bytes.fromhex(text)
    for text in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
)
"""Points whose order divides 8, without the sign bit: as a public key each has signatures that fit many texts, made
by nobody."""


def _unhex(text: str, size: int) -> bytes | None:
    """The `size` bytes that `text` spells in lower-case hex, None if it does not."""
    return bytes.fromhex(text) if len(text) == 2 * size and _HEX.issuperset(text) else None


def _private(seed: bytes) -> "Ed25519PrivateKey":
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(seed)


def check_public_key(text: str) -> str:
    """`text` if it is a usable public key in 64 lower-case hex characters, else raises BadRequest."""
    raw = _unhex(text, KEY_BYTES)
    if raw is None:
        raise BadRequest("a public key is 32 bytes of Ed25519 written as 64 lower-case hex characters")
    if raw[:-1] + bytes([raw[-1] & 0x7F]) in _SMALL_ORDER:
        raise BadRequest("this public key is a point of small order, which nobody's signatures can be told by")
    return text


def check_signature(text: str) -> str:
    """`text` if it has the shape of a signature (128 lower-case hex characters), else raises BadRequest."""
    if _unhex(text, SIGNATURE_BYTES) is None:
        raise BadRequest("a signature is 64 bytes of Ed25519 written as 128 lower-case hex characters")
    return text


def key_id(public_key_hex: str) -> str:
    """The name of a public key: the first 16 hex characters of the SHA-256 of its 32 bytes."""
    return sha256(bytes.fromhex(check_public_key(public_key_hex))).hexdigest()[:16]


def public_key(seed: bytes) -> str:
    """The public key of a seed, in hex."""
    return _private(seed).public_key().public_bytes_raw().hex()


def sign_bytes(message: bytes, seed: bytes) -> bytes:
    """The 64 bytes of signature of `message`."""
    return _private(seed).sign(message)


def verify_bytes(message: bytes, signature: bytes, public_key_hex: str) -> bool:
    """Whether `signature` is that of `message` by the key. False for a key or signature that cannot be one."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        raw = bytes.fromhex(check_public_key(public_key_hex))
        Ed25519PublicKey.from_public_bytes(raw).verify(signature, message)
    except (BadRequest, ValueError, InvalidSignature):
        return False
    return True


def sign(digest: str, seed: bytes) -> str:
    """The signature of an artifact: 128 hex characters. Raises InvalidDigest."""
    return sign_bytes(check_digest(digest).encode("ascii"), seed).hex()


def verify(digest: str, signature_hex: str, public_key_hex: str) -> bool:
    """Whether the signature is that of the artifact by the key; False also for what is malformed."""
    signature = _unhex(signature_hex, SIGNATURE_BYTES)
    if signature is None or len(digest) != 64 or not _HEX.issuperset(digest):
        return False
    return verify_bytes(digest.encode("ascii"), signature, public_key_hex)


def authorization(app: str, new_public_key_hex: str) -> bytes:
    """The bytes that an active key of `app` signs so that a new key may be added. Raises BadRequest."""
    return f"{_AUTHORIZATION}:{check_app_name(app)}:{check_public_key(new_public_key_hex)}".encode("ascii")


def authorize(app: str, new_public_key_hex: str, seed: bytes) -> str:
    """The signature (hex) by which an existing key lets a new one in."""
    return sign_bytes(authorization(app, new_public_key_hex), seed).hex()


def authorized(app: str, new_public_key_hex: str, signature_hex: str, public_key_hex: str) -> bool:
    """Whether the existing key `public_key_hex` of `app` let the new key in."""
    signature = _unhex(signature_hex, SIGNATURE_BYTES)
    return signature is not None and verify_bytes(authorization(app, new_public_key_hex), signature, public_key_hex)


def read_seed(text: str, where: str) -> bytes:
    """The seed that `text` holds: 64 hex characters, or a private key in PEM (PKCS#8, not encrypted).

    Raises ConfigError, which names `where` and never shows the text.
    """
    text = text.strip()
    if text.startswith(_PEM):
        return _read_pem(text, where)
    try:
        seed = binascii.unhexlify(text)
    except ValueError:
        seed = b""
    if len(seed) != SEED_BYTES:
        raise ConfigError(
            f"{where} holds something that is not a signing key: it is the 32 bytes of an Ed25519 seed as 64 hex "
            "characters, or a private key in PEM (PKCS#8); 'aether keys generate' makes one"
        )
    return seed


def _read_pem(text: str, where: str) -> bytes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(text.encode("utf-8", "replace"), password=None)
    except TypeError:
        raise ConfigError(f"{where} holds a private key under a password: take the password off") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{where} holds PEM that is not a private key (PKCS#8)") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{where} holds a private key that is not Ed25519: 'aether keys generate' makes one")
    return key.private_bytes_raw()


def read_public_key(text: str, where: str) -> str:
    """The public key that `text` holds, as 64 lower-case hex characters: hex, or PEM (SubjectPublicKeyInfo).

    Raises ConfigError, which names `where`.
    """
    text = text.strip()
    if not text.startswith(_PEM):
        try:
            return check_public_key(text.lower())
        except BadRequest as error:
            raise ConfigError(f"{where}: {error.message}") from None
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(text.encode("utf-8", "replace"))
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{where} holds PEM that is not a public key") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{where} holds a public key that is not Ed25519")
    return check_public_key(key.public_bytes_raw().hex())
