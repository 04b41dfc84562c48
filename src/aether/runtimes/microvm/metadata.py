"""The metadata service of one machine, served by the host: the part of Firecracker's MMDS V2 that guests use.

PUT /latest/api/token with X-metadata-token-ttl-seconds opens a session; GET needs its token. The assignment lies at
/latest/aether/BOOT_TOKEN and is given once: what comes later, the function itself above all, finds nothing.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
import time
from collections.abc import Callable

from aether.runtimes.microvm.calls import take_calls

_MAX_REQUEST = 8 * 1024
_REQUEST_SECS = 10.0
_MAX_SESSIONS, _MAX_TTL = 16, 21_600
_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed"}


class Metadata:
    """What one machine is told; `assignment` makes it at the moment it is asked for."""

    def __init__(self, boot_token: str, assignment: Callable[[], bytes]) -> None:
        self._path = f"/latest/aether/{boot_token}"
        self._assignment: Callable[[], bytes] | None = assignment
        self._sessions: dict[str, float] = {}

    def answer(self, method: str, path: str, fields: dict[str, str], now: float) -> tuple[int, bytes]:
        """Status and body of the answer to a request at `now`, in seconds of a clock that only moves on."""
        if method == "PUT":
            return self._open(path, fields, now)
        if method != "GET":
            return 405, b"only GET and PUT are served"
        if self._sessions.get(fields.get("x-metadata-token", ""), 0.0) < now:
            return 401, b"a session token is needed: PUT /latest/api/token"
        if self._assignment is None or not hmac.compare_digest(path.encode(), self._path.encode()):
            return 404, b"there is nothing here"
        given, self._assignment = self._assignment(), None
        return 200, given

    @property
    def given(self) -> bool:
        """Whether the guest has had its assignment."""
        return self._assignment is None

    def _open(self, path: str, fields: dict[str, str], now: float) -> tuple[int, bytes]:
        if path != "/latest/api/token":
            return 404, b"there is nothing here"
        if "x-forwarded-for" in fields:
            return 400, b"sessions are not opened through proxies"
        ttl = fields.get("x-metadata-token-ttl-seconds", "")
        if not (ttl.isascii() and ttl.isdigit() and 1 <= int(ttl[:9]) <= _MAX_TTL):
            return 400, b"X-metadata-token-ttl-seconds must be between 1 and 21600"
        self._sessions = {token: until for token, until in self._sessions.items() if until >= now}
        if len(self._sessions) >= _MAX_SESSIONS:
            return 400, b"there are too many sessions"
        token = secrets.token_urlsafe(24)
        self._sessions[token] = now + int(ttl)
        return 200, token.encode()


async def serve(listener: socket.socket, metadata: Metadata) -> None:
    """Serve `metadata` on `listener` until cancelled. Closes every connection, not the listener."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await _exchange(reader, writer, metadata):
            pass

    await take_calls(listener, connected, _MAX_REQUEST)


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, metadata: Metadata) -> bool:
    """One request and its answer; False when the connection is to be closed."""
    async with asyncio.timeout(_REQUEST_SECS):
        head = await reader.readuntil(b"\r\n\r\n")
        status, body = 400, b"the request cannot be read"
        parsed = _parse(head)
        if parsed is not None:
            status, body = metadata.answer(*parsed, time.monotonic())
        writer.write(
            b"HTTP/1.1 %d %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n%s"
            % (status, _REASONS[status].encode(), len(body), b"close" if parsed is None else b"keep-alive", body)
        )
        await writer.drain()
    return parsed is not None


def _parse(head: bytes) -> tuple[str, str, dict[str, str]] | None:
    """Method, path and fields with names in lower case; None for what is no request without a body."""
    lines = head[:-4].decode("latin-1").split("\r\n")
    first = lines[0].split(" ")
    if len(first) != 3 or first[2] not in ("HTTP/1.0", "HTTP/1.1"):
        return None
    fields: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or name != name.strip() or name.lower() in fields:
            return None
        fields[name.lower()] = value.strip(" \t")
    if fields.get("content-length", "0") != "0" or "transfer-encoding" in fields:
        return None
    return first[0], first[1], fields
