"""Where the certificates of this server come from: files that the operator keeps, or the local authority.

Files are looked at every few seconds and on SIGHUP; a pair that does not fit together (one of two is written yet) is
left for the next look, and the old one stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from aether.edge.tls import CertificateBook, Made, server_context
from aether.hosts.authority import LEAF_DAYS, LocalAuthority
from aether.hosts.certificates import Certificates
from aether.hosts.pair import read_pair
from aether.hosts.renewer import Renewer
from aether.hosts.service import Hosts
from aether.model.errors import AetherError, ConfigError
from aether.observability.logging import logger
from aether.settings import Settings
from aether.topology.public import api_hosts

_LOOK_SECS = 5.0
_HANDED_OUT_SECS = LEAF_DAYS * 86_400 * 2 / 3
"""A leaf is handed out for two thirds of its life, so that nobody meets one that is about to end."""
_log = logger("aether.tls")


@dataclass(slots=True)
class Tls:
    """`ca_file` is what clients must trust, when the certificates are the local authority's."""

    book: CertificateBook
    ca_file: Path | None = None
    files: tuple[Path, Path] | None = None
    seen: object = None

    async def watch(self) -> None:
        """Show the operator's files anew whenever they change. Never returns."""
        if self.files is None:
            await asyncio.Event().wait()
        asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        if not sys.stdin or sys.stdin.closed or not sys.stdin.isatty():
            # on a terminal SIGHUP says that it was closed, and ends the server as it always does
            loop.add_signal_handler(signal.SIGHUP, asked.set)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECS):
                    await asked.wait()
            asked.clear()
            self.look()

    def look(self) -> bool:
        """Show the files if they have changed; True when they were."""
        assert self.files is not None
        found = _stamp(self.files)
        if found == self.seen or found is None:
            return False
        try:
            _show_files(self.book, *self.files)
        except ConfigError as error:
            _log.warning("the new certificate is not shown", problem=error.message)
            return False
        self.seen = found
        _log.info("certificate shown anew", file=str(self.files[0]))
        return True


def open_tls(settings: Settings, host: str) -> Tls | None:
    """None when the server speaks plain HTTP. Raises ConfigError and LocalIOError."""
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise ConfigError("a certificate and its key belong together: give both --tls-cert and --tls-key")
    if settings.acme_email and (settings.tls or settings.tls_cert) and not settings.http_port:
        raise ConfigError("the authority looks for proofs over plain HTTP: give --http-port 80 beside --acme-email")
    book = CertificateBook()
    if settings.tls_cert:
        if settings.tls:
            raise ConfigError("--tls makes certificates of its own: give either it or --tls-cert and --tls-key")
        files = Path(settings.tls_cert).expanduser(), Path(settings.tls_key).expanduser()
        stamp = _stamp(files)
        _show_files(book, *files)
        return Tls(book, None, files, stamp)
    if settings.tls:
        return Tls(book, _local(settings, host, book))
    if settings.acme_email:
        raise ConfigError("--acme-email gets certificates for TLS: give --tls, or --tls-cert and --tls-key, too")
    if settings.http_port:
        raise ConfigError("--http-port is the plain port beside TLS: give --tls, or --tls-cert and --tls-key, too")
    return None


def open_acme(settings: Settings, hosts: Hosts, certificates: Certificates) -> Renewer | None:
    """Orders certificates for custom hosts, if an authority is configured and work in the background is wanted."""
    if not settings.acme_email or settings.disable_background:
        return None
    from aether.hosts.acme import Authority

    key = settings.data_dir / "acme" / "account-key.pem"
    authority = Authority(settings.acme_directory, settings.acme_email, key, settings.acme_ca_file)
    return Renewer(hosts, certificates, authority)


def _show_files(book: CertificateBook, chain: Path, key: Path) -> None:
    """Raises ConfigError naming the file."""
    try:
        pair = read_pair(chain.read_bytes(), key.read_bytes())
        book.set_default(server_context(chain, key))
        if key.stat().st_mode & 0o044:
            _log.warning("others can read the key", file=str(key), hint=f"chmod 600 {key}")
    except OSError as error:
        name = error.filename or chain
        raise ConfigError(f"the certificate cannot be used: {name}: {error.strerror or error}") from error
    except AetherError as error:
        raise ConfigError(f"the certificate {chain} with the key {key} cannot be used: {error.message}") from error
    if pair.not_after < time.time() * 1_000_000:
        _log.warning("the certificate has run out", file=str(chain))


def _local(settings: Settings, host: str, book: CertificateBook) -> Path:
    """Answer every name with a certificate of the local authority."""
    names = api_hosts(settings, host)
    plain = [name.strip("[]") for name in names if name.strip("[]") not in ("0.0.0.0", "::", "")]
    addresses = [name for name in plain if _is_address(name)]
    domains = ["localhost", "test", settings.base_domain, *(name for name in plain if not _is_address(name))]
    authority = LocalAuthority(settings.data_dir / "ca", domains, addresses)
    if authority.open():
        _log.info("made a local certificate authority", certificate=str(authority.certificate))
    if not authority.permits(f"x.{settings.base_domain}"):
        _log.warning(
            "the local authority may not speak for the base domain",
            base_domain=settings.base_domain,
            hint=f"remove {authority.certificate.parent} to have one made that may, and trust that one",
        )
    folder = settings.data_dir / "run"

    def make(name: str) -> Made | None:
        wanted = [name] if name and authority.permits(name) else plain
        with tempfile.NamedTemporaryFile(dir=folder, prefix="leaf-", suffix=".pem") as file:
            file.write(authority.issue(wanted))
            file.flush()
            return Made(server_context(Path(file.name)), time.time() + _HANDED_OUT_SECS)

    book.make = make
    return authority.certificate


def _is_address(name: str) -> bool:
    return name.replace(".", "").isdigit() or ":" in name


def _stamp(files: tuple[Path, Path]) -> object:
    try:
        found = [os.stat(path) for path in files]
    except OSError:
        return None
    return [(stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in found]
