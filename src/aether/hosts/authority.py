"""The local certificate authority of `aether up --tls`: made once, trusted by whoever chooses to, bounded by names.

Its certificate says for which names it may be believed (RFC 5280 section 4.2.1.10): whoever trusts it trusts it for
this server's names and for no bank's. Leaves live for days and are made anew in memory when a host is asked for.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from aether.model.errors import LocalIOError

LEAF_DAYS = 30
_CA_DAYS = 3650
_BEGIN_EARLY = dt.timedelta(hours=1)
"""Clocks of other machines may be behind."""
_LOOPBACK = ("127.0.0.0/8", "::1/128")


class LocalAuthority:
    """`folder` holds `ca.pem` for everybody and `ca-key.pem` for the server alone."""

    def __init__(self, folder: Path, domains: Iterable[str], addresses: Iterable[str]) -> None:
        self.certificate = folder / "ca.pem"
        self._folder = folder
        self._secret = folder / "ca-key.pem"
        self._domains = sorted({domain.lower().strip(".") for domain in domains if domain})
        self._addresses = sorted(set(addresses))
        self._key: ec.EllipticCurvePrivateKey
        self._ca: x509.Certificate
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())

    def open(self) -> bool:
        """Load the authority, or make it; True when it was made. Raises LocalIOError."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            made = not self._load()
            if made:
                self._make()
            # the key file is the one that counts: the certificate is in it, so the two can never disagree
            public = self._ca.public_bytes(serialization.Encoding.PEM)
            if not self.certificate.exists() or self.certificate.read_bytes() != public:
                write_private(self.certificate, public, mode=0o644)
        except (OSError, ValueError) as error:
            raise LocalIOError(
                f"the local certificate authority in {self._folder} cannot be used: {error}; "
                "remove the folder to have a new one made, which must then be trusted anew"
            ) from error
        return made

    def permits(self, name: str) -> bool:
        """True for a host name or address that certificates may be made for."""
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return any(name == domain or name.endswith("." + domain) for domain in self._permitted_names())
        return any(address in network for network in self._permitted_networks())

    def issue(self, names: Collection[str]) -> bytes:
        """Key and certificate for those of `names` that are permitted, as PEM. Raises ValueError when none is."""
        found = [name for name in names if self.permits(name)]
        if not found:
            raise ValueError("the authority may not speak for any of these names")
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, found[0][:64])]))
            .issuer_name(self._ca.subject)
            .public_key(self._leaf_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BEGIN_EARLY)
            .not_valid_after(min(now + dt.timedelta(days=LEAF_DAYS), self._ca.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([_general(name) for name in found]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(_usage(signing_certificates=False), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._leaf_key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        leaf = builder.sign(self._key, hashes.SHA256())
        return _pem(self._leaf_key) + leaf.public_bytes(serialization.Encoding.PEM)

    def _load(self) -> bool:
        """False when there is none, or one that has run out."""
        if not self._secret.exists():
            return False
        pem = self._secret.read_bytes()
        key = serialization.load_pem_private_key(pem, None)
        self._ca = x509.load_pem_x509_certificate(pem)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("its key is of another kind")
        self._key = key
        if self._secret.stat().st_mode & 0o077:
            self._secret.chmod(0o600)
        left = self._ca.not_valid_after_utc - dt.datetime.now(dt.UTC)
        return left > dt.timedelta(days=LEAF_DAYS)

    def _make(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.UTC)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Aether local authority {os.urandom(4).hex()}")])
        permitted: list[x509.GeneralName] = [x509.DNSName(domain) for domain in self._domains]
        permitted += [x509.IPAddress(ipaddress.ip_network(network)) for network in (*_LOOPBACK, *self._addresses)]
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BEGIN_EARLY)
            .not_valid_after(now + dt.timedelta(days=_CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.NameConstraints(permitted, None), critical=True)
            .add_extension(_usage(signing_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
        )
        self._ca = builder.sign(self._key, hashes.SHA256())
        write_private(self._secret, _pem(self._key) + self._ca.public_bytes(serialization.Encoding.PEM))

    def _permitted_names(self) -> list[str]:
        return [str(name.value) for name in self._permitted() if isinstance(name, x509.DNSName)]

    def _permitted_networks(self) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        return [
            ipaddress.ip_network(str(name.value)) for name in self._permitted() if isinstance(name, x509.IPAddress)
        ]

    def _permitted(self) -> list[x509.GeneralName]:
        constraints = self._ca.extensions.get_extension_for_class(x509.NameConstraints).value
        return list(constraints.permitted_subtrees or [])


def write_private(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file that appears whole, with `mode` from its first byte on. Raises OSError."""
    part = path.with_name(f".{path.name}.{os.urandom(6).hex()}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _usage(*, signing_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signing_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signing_certificates,
        crl_sign=signing_certificates,
        encipher_only=False,
        decipher_only=False,
    )
