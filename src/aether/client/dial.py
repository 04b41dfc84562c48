"""From an address to an open connection: origins, dialling, and the connection that the transport drives."""

from __future__ import annotations

import http.client
import select
import socket
import ssl
from urllib.parse import urlsplit

from aether.model.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BLOCK_BYTES = 1024 * 1024
CONNECT_TIMEOUT_S = 10.0
KEEPALIVE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 15, 5, 4
"""A peer whose machine is gone sends nothing, not even an end: after so much silence the kernels ask each other."""


class Origin:
    """Scheme, host and port: what a credential belongs to. `path` is a socket's path for scheme `unix`."""

    __slots__ = ("host", "path", "port", "scheme")

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a URL that is not http, https or unix."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            raise ConfigError(f"'{url}' has an impossible port") from None
        self.scheme = parts.scheme
        self.path = parts.path if parts.scheme == "unix" else ""
        self.host = (parts.hostname or "localhost") if self.path else (parts.hostname or "")
        self.port = port or (443 if parts.scheme == "https" else 80)
        if parts.scheme not in ("http", "https", "unix") or not self.host:
            raise ConfigError(f"'{url}' is not an address of a server")

    def same(self, other: Origin) -> bool:
        return (self.scheme, self.host, self.port, self.path) == (other.scheme, other.host, other.port, other.path)

    @property
    def is_loopback(self) -> bool:
        """Whether bytes to it never leave this machine."""
        return bool(self.path) or is_loopback(self.host)

    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.path or self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"{self.scheme}://{self.host_header()}"


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine's loopback interface, by its spelling alone."""
    host = host.strip("[]").rstrip(".").lower()
    if host == "::1" or host == "localhost" or host.endswith(".localhost"):
        return True
    return host.startswith("127.") and host.replace(".", "").isdigit()


def dial(origin: Origin, timeout_s: float, ca_file: str = "") -> socket.socket:
    """A connected socket; `ca_file` is trusted beside what the system trusts.

    `*.localhost` is 127.0.0.1, because it does not resolve everywhere. Raises OSError.
    """
    if origin.path:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address: Any = origin.path
    elif origin.host.endswith(".localhost") or origin.host.replace(".", "").isdigit():
        # not getaddrinfo: for a str it loads the idna codec, which costs as much as the whole request
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        address = (origin.host if origin.host[0].isdigit() else "127.0.0.1", origin.port)
    else:
        sock = socket.create_connection((origin.host, origin.port), timeout_s)
        address = None
    try:
        sock.settimeout(timeout_s)
        if address is not None:
            sock.connect(address)
        if not origin.path:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(sock)
        if origin.scheme == "https":
            context = ssl.create_default_context()
            if ca_file:
                _trust(context, ca_file)
            context.set_alpn_protocols(["http/1.1"])
            return context.wrap_socket(sock, server_hostname=origin.host)
    except BaseException:
        sock.close()
        raise
    return sock


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for names, value in (
        (("TCP_KEEPIDLE", "TCP_KEEPALIVE"), KEEPALIVE_S),  # Linux, macOS
        (("TCP_KEEPINTVL",), KEEPALIVE_INTERVAL_S),
        (("TCP_KEEPCNT",), KEEPALIVE_PROBES),
    ):
        known = [getattr(socket, name) for name in names if hasattr(socket, name)]
        if known:
            sock.setsockopt(socket.IPPROTO_TCP, known[0], value)


def _trust(context: ssl.SSLContext, ca_file: str) -> None:
    try:
        context.load_verify_locations(ca_file)
    except OSError as error:
        reason = "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigError(f"cannot trust the certificates of {ca_file}: {reason}") from error


class Connection(http.client.HTTPConnection):
    """A connection that dials by `dial` and lets its owner set the time limit of each step."""

    def __init__(self, origin: Origin, ca_file: str = "") -> None:
        super().__init__(origin.host, origin.port, blocksize=BLOCK_BYTES)
        self.ca_file = ca_file
        self.origin = origin
        self.used = False
        self.raw: socket.socket | None = None

    def connect(self) -> None:
        if self.raw is None:
            self.open(CONNECT_TIMEOUT_S)

    def open(self, timeout_s: float) -> None:
        self.raw = self.sock = dial(self.origin, timeout_s, self.ca_file)

    def limit(self, seconds: float) -> None:
        """Bound the next socket operations, also after http.client gave up `sock` (`Connection: close`)."""
        if self.raw is not None:
            self.raw.settimeout(max(seconds, 0.001))

    def is_fresh(self) -> bool:
        """False when the server has already closed an idle connection (or sent something nobody asked for)."""
        if self.raw is None:
            return False
        poll = select.poll()
        poll.register(self.raw, select.POLLIN)
        return not poll.poll(0)
