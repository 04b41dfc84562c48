"""Proof that whoever claims a host controls it: a TXT record, or an answer over HTTP at that host.

The name is resolved once and that address is dialled. Private, link-local and other special addresses are refused
unless the operator allows the host by name, and no redirect is followed, so that a claim cannot be used to reach
what is behind this server.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Collection
from dataclasses import dataclass

from aether.hosts.dns import AAAA, TXT, A, DnsError, lookup, system_resolvers

CHALLENGE_PATH = "/.well-known/aether-challenge/"
_MAX_ANSWER = 4096
_FETCH_SECS = 10.0
_AT_ONCE = 4
_EMBEDDING = tuple(ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))
"""IPv6 networks whose addresses stand for IPv4 ones."""


@dataclass(frozen=True, slots=True)
class ProofOptions:
    port: int = 80
    """Where the HTTP answer is looked for."""
    private_hosts: tuple[str, ...] = ()
    """Hosts, and domains with a dot before them, that may be at private addresses."""
    resolver: tuple[str, int] | None = None
    """None: the machine's own."""


class Unproven(Exception):
    """The proof was not found; the message says what was looked for and what was there."""


def dns_name(host: str) -> str:
    return f"_aether.{host}"


def expected(token: str) -> str:
    """What the TXT record or the HTTP answer must say."""
    return f"aether-verification={token}"


def is_public(address: str) -> bool:
    """True for an address of the open internet."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        elif any(found in network for network in _EMBEDDING):
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def allowed_private(host: str, names: Collection[str]) -> bool:
    return any(host.endswith(name) if name.startswith(".") else host == name for name in names)


class Prover:
    """Looks for proofs, a few at a time."""

    def __init__(self, options: ProofOptions) -> None:
        self._options = options
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def prove(self, host: str, token: str) -> str:
        """How the host was proven: `dns` or `http`. Raises Unproven."""
        async with self._turns:
            try:
                await self._by_dns(host, token)
                return "dns"
            except Unproven as error:
                no_record = str(error)
            try:
                await self._by_http(host, token)
                return "http"
            except Unproven as error:
                raise Unproven(f"{error}; {no_record}") from None

    async def _by_dns(self, host: str, token: str) -> None:
        try:
            found = await lookup(dns_name(host), TXT, self._resolvers())
        except DnsError as error:
            raise Unproven(f"TXT {dns_name(host)}: {error}") from None
        if expected(token) not in [text.strip() for text in found]:
            there = "is another" if found else "does not exist"
            raise Unproven(f"the TXT record {dns_name(host)} {there}")

    async def _by_http(self, host: str, token: str) -> None:
        url = f"http://{host}{CHALLENGE_PATH}{token}"
        address = await self._address(host)
        try:
            async with asyncio.timeout(_FETCH_SECS):
                status, body = await _fetch(address, self._options.port, host, CHALLENGE_PATH + token)
        except TimeoutError:
            raise Unproven(f"{url} at {address} did not answer within {_FETCH_SECS:.0f} s") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise Unproven(f"{url} at {address} cannot be fetched: {reason}") from None
        if status != 200 or body.strip() != expected(token).encode():
            raise Unproven(f"{url} at {address} answers {status} and not with the proof")

    async def _address(self, host: str) -> str:
        """The one address that is dialled. Raises Unproven."""
        try:
            if self._options.resolver is None:
                loop = asyncio.get_running_loop()
                async with asyncio.timeout(_FETCH_SECS):
                    infos = await loop.getaddrinfo(host, self._options.port, type=socket.SOCK_STREAM)
                found = [str(info[4][0]) for info in infos]
            else:
                found = [*await lookup(host, A, self._resolvers()), *await lookup(host, AAAA, self._resolvers())]
        except (OSError, TimeoutError, DnsError) as error:
            raise Unproven(f"{host} does not resolve: {getattr(error, 'strerror', None) or error}") from None
        if not found:
            raise Unproven(f"{host} has no address")
        if not allowed_private(host, self._options.private_hosts):
            for address in found:
                if not is_public(address):
                    raise Unproven(f"{host} is at {address}, which is not a public address")
        return found[0]

    def _resolvers(self) -> list[tuple[str, int]]:
        return system_resolvers() if self._options.resolver is None else [self._options.resolver]


async def _fetch(address: str, port: int, host: str, path: str) -> tuple[int, bytes]:
    """Status and body. In HTTP/1.0, whose answers are never chunked. Raises OSError and ValueError."""
    reader, writer = await asyncio.open_connection(address, port, limit=2 * _MAX_ANSWER)
    try:
        shown = host if port == 80 else f"{host}:{port}"
        writer.write(f"GET {path} HTTP/1.0\r\nHost: {shown}\r\nUser-Agent: aether-verification\r\n\r\n".encode())
        answer = b""
        while len(answer) <= _MAX_ANSWER and (part := await reader.read(_MAX_ANSWER)):
            answer += part
            head, ended, body = answer.partition(b"\r\n\r\n")
            if ended and len(body) >= (_length(head) or _MAX_ANSWER):
                break
        head, ended, body = answer.partition(b"\r\n\r\n")
        first = head.split(b"\r\n", 1)[0].split(b" ", 2)
        if not ended or len(first) < 2 or not first[0].startswith(b"HTTP/1.") or not first[1].isdigit():
            raise ValueError("the answer is not HTTP")
        return int(first[1]), body[: _length(head)]
    finally:
        writer.close()


def _length(head: bytes) -> int | None:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            return int(value)
    return None
