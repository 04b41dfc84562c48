"""The public listener: the port that browsers and the CLI talk to."""

from __future__ import annotations

import errno
import ipaddress
import socket

from aether.hosts.dns import parse_resolver
from aether.hosts.proof import ProofOptions
from aether.model.errors import ConfigError, LocalIOError
from aether.settings import Settings

BACKLOG = 4096


def listen(host: str, port: int) -> socket.socket:
    """A socket that already queues connections; they are answered once the edge accepts them.

    Raises LocalIOError naming the port when it is in use or not ours to have.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise LocalIOError(f"'{host}' is not an address to listen on: {error.strerror or error}") from error
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise LocalIOError(f"port {port} on {host} is in use; choose another with --port") from error
        raise LocalIOError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return sock


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(settings: Settings, host: str) -> None:
    """Raise ConfigError for what may only be done where nobody else can reach it."""
    if is_loopback(host):
        return
    if settings.sandbox == "none":
        raise ConfigError("AETHER_SANDBOX=none runs apps unprotected; it is allowed only when listening on loopback")
    if not settings.auth_required:
        raise ConfigError("AETHER_AUTH_REQUIRED=false makes everybody an admin; it is allowed only on loopback")


def proof_options(settings: Settings) -> ProofOptions:
    """Raises ConfigError for a resolver that is no address."""
    try:
        resolver = parse_resolver(settings.dns_server) if settings.dns_server else None
    except ValueError:
        raise ConfigError(
            f"AETHER_DNS_SERVER is an address with or without a port, not '{settings.dns_server}'"
        ) from None
    return ProofOptions(settings.host_proof_port, settings.host_proof_private, resolver)


def base_url(host: str, port: int, *, secure: bool = False) -> str:
    """How this machine's programs reach the API."""
    name = host.strip("[]")
    if name in ("0.0.0.0", "::", ""):
        name = "127.0.0.1"
    shown = f"[{name}]" if ":" in name else name
    return f"{'https' if secure else 'http'}://{shown}:{port}"


def api_hosts(settings: Settings, host: str) -> list[str]:
    """Host names that belong to the API, never to an app."""
    return ["localhost", "127.0.0.1", "[::1]", host, *settings.api_hosts]


def app_url(app: str, settings: Settings, port: int, *, secure: bool = False) -> str:
    port = settings.public_port or port
    shown = "" if port == (443 if secure else 80) else f":{port}"
    return f"{'https' if secure else 'http'}://{app}.{settings.base_domain}{shown}/"
