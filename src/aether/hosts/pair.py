"""A certificate with its key, looked at before it is shown to anybody; pure."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from aether.model.errors import BadRequest

MAX_PEM = 128 * 1024


@dataclass(frozen=True, slots=True)
class Pair:
    """`pem` is the key and the chain, leaf first. Times are microseconds since the epoch."""

    pem: bytes
    names: tuple[str, ...]
    issuer: str
    fingerprint: str
    not_before: int
    not_after: int

    def covers(self, host: str) -> bool:
        """By its subject alternative names; a wildcard stands for one label."""
        return any(name == host or (name[:2] == "*." and host.partition(".")[2] == name[2:]) for name in self.names)


def read_pair(chain: bytes, key: bytes) -> Pair:
    """Raises BadRequest for what is no certificate, no key, or two that do not belong together."""
    if len(chain) + len(key) > MAX_PEM:
        raise BadRequest("certificate and key are larger than any that make sense")
    try:
        certificates = x509.load_pem_x509_certificates(chain)
    except ValueError:
        raise BadRequest("the certificate is not in PEM form: it starts with -----BEGIN CERTIFICATE-----") from None
    try:
        private = serialization.load_pem_private_key(key, None)
    except TypeError:
        raise BadRequest("the key is protected by a password: store it without one") from None
    except ValueError:
        raise BadRequest("the key is not a private key in PEM form") from None
    leaf = certificates[0]
    if _public(private.public_key()) != _public(leaf.public_key()):
        raise BadRequest("the key does not belong to the certificate; the chain must begin with the server's own")
    try:
        extension = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = tuple(name.lower() for name in extension.value.get_values_for_type(x509.DNSName))
    except x509.ExtensionNotFound:
        names = ()
    own_key = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    whole = b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)
    return Pair(
        own_key + whole,
        names,
        leaf.issuer.rfc4514_string()[:200],
        leaf.fingerprint(hashes.SHA256()).hex(),
        int(leaf.not_valid_before_utc.timestamp() * 1_000_000),
        int(leaf.not_valid_after_utc.timestamp() * 1_000_000),
    )


def split_pem(pem: bytes) -> tuple[bytes, bytes]:
    """Chain and key of what `Pair.pem` holds."""
    at = pem.find(b"-----BEGIN CERTIFICATE-----")
    return (pem[at:], pem[:at]) if at >= 0 else (b"", pem)


def _public(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
