"""HTTP to one server over http.client: dialling, keep-alive, deadlines, retries, redirects, error envelopes.

It knows nothing of the API's routes (`api`) and follows no stream over a reconnect (`follow`).

    NetworkError          the server was not reached, or the connection broke
    ├── Unreached         nothing answered, or the connection broke: later the same call may succeed
    └── StreamBroken      a stream ended before its sender ended it; the caller may resume
    AetherError           what the server's envelope says; `reason` in its details is an object store's own code
"""

from __future__ import annotations

import binascii
import contextlib
import http.client
import json
import os
import random
import socket
import ssl
import time
from urllib.parse import urlencode, urljoin, urlsplit

from aether import __version__
from aether.client.dial import BLOCK_BYTES, CONNECT_TIMEOUT_S, Connection, Origin
from aether.client.failures import failure, named
from aether.model.errors import NetworkError, Unauthorized

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Protocol

    class Body(Protocol):
        """What http.client can send: an object it reads in blocks, `size` bytes in all."""

        size: int

        def read(self, size: int = -1, /) -> bytes: ...

    Query = Mapping[str, "str | int | None"]
    OnEvent = Callable[[str, dict[str, object]], None]

ATTEMPTS = 3
MAX_REDIRECTS = 5
MAX_REPLY_BYTES = 64 * 1024 * 1024
_REPEATABLE = frozenset({"GET", "HEAD", "PUT"})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class StreamBroken(NetworkError):
    """A stream was cut or went silent for longer than its sender's keep-alive allows."""


class Reply:
    """A whole answer. Header names are lower case."""

    __slots__ = ("body", "headers", "origin", "status")

    def __init__(self, status: int, headers: dict[str, str], body: bytes, origin: Origin) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.origin = origin

    def json(self) -> Any:
        """The body as JSON; raises NetworkError when it is something else."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise NetworkError(
                f"{self.origin} does not answer like an Aether server: is the address right?"
            ) from None


class Stream:
    """An answer that is read while it is being sent, on a connection of its own."""

    def __init__(self, connection: Connection, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self._connection = connection
        self._response = response

    def read(self, timeout_s: float) -> bytes:
        """The bytes that have come, at least one; `b""` after the sender's end. Raises StreamBroken."""
        self._connection.limit(timeout_s)
        try:
            piece = self._response.read1(BLOCK_BYTES)
            # read1 does not complain about a body that ends early
            if not piece and self._response.length:
                raise http.client.IncompleteRead(b"", self._response.length)
            return piece
        except TimeoutError:
            raise StreamBroken(f"{self._connection.origin} went silent") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise StreamBroken(f"the connection to {self._connection.origin} broke") from error

    def close(self) -> None:
        self._response.close()
        self._connection.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Transport:
    """One server and one token; keeps one idle connection. Not for use by several threads at once.

    `ca_file` is trusted beside what the system trusts. `renew` is asked for another token when the server refuses the
    one it is given; None from it means that there is none.
    """

    def __init__(
        self,
        base: str,
        token: str | None = None,
        *,
        timeout_s: float = 30.0,
        on_event: OnEvent | None = None,
        renew: Callable[[str], str | None] | None = None,
        ca_file: str = "",
    ) -> None:
        self.base = base
        self.origin = Origin(base)
        self.token = token
        self.traceparent = ""
        """Sent with every request: what a command does becomes one trace (W3C Trace Context)."""
        self.timeout_s = timeout_s
        self._prefix = "" if self.origin.path else urlsplit(base).path.rstrip("/")
        self._idle: Connection | None = None
        self._busy: Connection | None = None
        self._on_event = on_event
        self._renew = renew
        self._ca_file = ca_file

    @property
    def ca_file(self) -> str:
        """Certificates trusted beside those of the system."""
        return self._ca_file

    def close(self) -> None:
        if self._idle is not None:
            self._idle.close()
            self._idle = None

    def __enter__(self) -> Transport:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        content: object = None,
        document: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        repeatable: bool | None = None,
        timeout_s: float | None = None,
    ) -> Reply:
        """Send `content` as JSON, or the JSON text `document`, and return the answer with status below 300.

        `timeout_s` bounds the whole call. A call that never reached the server is tried again; one that may have is
        tried again only if `repeatable` (default: GET, HEAD, PUT). Raises NetworkError, or what the envelope says.
        """
        body = document if content is None else json.dumps(content).encode()
        fields = dict(headers or {})
        if body is not None:
            fields["Content-Type"] = "application/json"
        patience = timeout_s or self.timeout_s

        def send() -> Reply:
            return self._call(
                method,
                self._url(path, query),
                fields,
                (lambda: body) if body is not None else None,
                method in _REPEATABLE if repeatable is None else repeatable,
                time.monotonic() + patience,
                None,
            )

        try:
            return send()
        except Unauthorized:
            # a refused request has done nothing, so it may be sent again whatever its method
            if not self._renewed():
                raise
            return send()

    def sibling(self) -> Transport:
        """Another connection to the same server, for another thread; it carries no token."""
        other = Transport(self.base, timeout_s=self.timeout_s, on_event=self._on_event, ca_file=self._ca_file)
        other.traceparent = self.traceparent
        return other

    def cut(self) -> None:
        """From another thread: break off what is being sent or awaited. The call under way raises."""
        busy = self._busy
        if busy is not None and busy.raw is not None:
            with contextlib.suppress(OSError):
                busy.raw.shutdown(socket.SHUT_RDWR)

    def put(
        self, url: str, body: Body, *, headers: Mapping[str, str] | None = None, block_timeout_s: float = 300.0
    ) -> Reply:
        """PUT `body` to a signed `url` (absolute, or a path of this server), in one attempt.

        `headers` are sent as they are: they may be under the signature. `block_timeout_s` bounds each block of
        1 MiB and the wait for the answer, not the whole: slow links are allowed. Raises NetworkError, LocalIOError,
        or what the answer says.
        """
        url = url if "://" in url else self._url(url, None)
        there = self._origin(url)
        if self.origin.scheme == "https" and there.scheme != "https" and not there.is_loopback:
            raise NetworkError(
                f"{self.origin} would have the artifact sent to {there} without TLS: refused. Its object store needs "
                "an https address (AETHER_S3_BASE_URL on the server)"
            )
        fields = {**(headers or {}), "Content-Length": str(body.size)}
        if not any(name.lower() == "content-type" for name in fields):
            fields["Content-Type"] = "application/gzip"
        return self._call("PUT", url, fields, lambda: body, False, None, block_timeout_s, attempts=1)

    def post(self, path: str, body: Body, content_type: str, timeout_s: float) -> Reply:
        """POST `body` to `path` in one attempt; `timeout_s` bounds each block and the wait for the answer. Raises
        NetworkError, LocalIOError, or what the envelope says."""
        fields = {"Content-Type": content_type, "Content-Length": str(body.size)}
        return self._call("POST", self._url(path, None), fields, lambda: body, False, None, timeout_s, attempts=1)

    def open(
        self, method: str, path: str, *, headers: Mapping[str, str], body: bytes | None, timeout_s: float
    ) -> Stream:
        """Send one request and return the open answer whatever its status. `timeout_s` bounds the wait for its
        headers. Raises NetworkError."""
        connection = Connection(self.origin, self._ca_file)
        try:
            connection.open(min(CONNECT_TIMEOUT_S, timeout_s))
            connection.limit(timeout_s)
            url = self._url(path, None)
            connection.request(method, _target(url), body=body, headers=self._headers(self.origin, headers))
            response = connection.getresponse()
            self._note("http", method=method, url=_shown(url), status=response.status)
        except BaseException as error:
            connection.close()
            raise named(error, connection.origin, self.origin) from error
        return Stream(connection, response)

    def stream(
        self,
        path: str,
        *,
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
        content: object = None,
        timeout_s: float | None = None,
    ) -> Stream:
        """GET `path`, or POST `content` as JSON to it, and return the open answer; one attempt, and another one with
        a renewed token. `timeout_s` bounds the wait for its headers."""
        try:
            return self._open(path, query, headers, content, timeout_s)
        except Unauthorized:
            if not self._renewed():
                raise
            return self._open(path, query, headers, content, timeout_s)

    def upgrade(self, path: str) -> socket.socket:
        """GET `path` as a WebSocket; returns the socket, which is the caller's. The server must speak only when it
        has been spoken to. Raises what `stream` raises."""
        connection = Connection(self.origin)
        deadline = time.monotonic() + self.timeout_s
        fields = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": binascii.b2a_base64(os.urandom(16), newline=False).decode(),
        }
        try:
            connection.open(min(CONNECT_TIMEOUT_S, self.timeout_s))
            connection.limit(deadline - time.monotonic())
            url = self._url(path, None)
            connection.request("GET", _target(url), headers=self._headers(self.origin, fields))
            response = connection.getresponse()
            self._note("http", method="GET", url=_shown(url), status=response.status)
            if response.status != 101 or connection.raw is None:
                raise failure(self._reply(connection, response, deadline), "GET", self.origin)
        except BaseException as error:
            connection.close()
            raise named(error, connection.origin, self.origin) from error
        return connection.raw

    def _renewed(self) -> bool:
        """Whether there is another token to try."""
        if self._renew is None or not self.token:
            return False
        token = self._renew(self.token)
        if token is None or token == self.token:
            return False
        self.token = token
        return True

    def _open(
        self,
        path: str,
        query: Query | None,
        headers: Mapping[str, str] | None,
        content: object,
        timeout_s: float | None,
    ) -> Stream:
        method, body = ("GET", None) if content is None else ("POST", json.dumps(content).encode())
        if body is not None:
            headers = {"Content-Type": "application/json", **(headers or {})}
        connection = Connection(self.origin, self._ca_file)
        deadline = time.monotonic() + (timeout_s or self.timeout_s)
        try:
            connection.open(min(CONNECT_TIMEOUT_S, deadline - time.monotonic()))
            connection.limit(deadline - time.monotonic())
            url = self._url(path, query)
            connection.request(method, _target(url), body=body, headers=self._headers(self.origin, headers))
            response = connection.getresponse()
            self._note("http", method=method, url=_shown(url), status=response.status)
            if response.status != 200:
                raise failure(self._reply(connection, response, deadline), method, self.origin)
        except BaseException as error:
            connection.close()
            raise named(error, connection.origin, self.origin) from error
        return Stream(connection, response)

    def _call(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        make_body: Callable[[], bytes | Body | None] | None,
        repeatable: bool,
        deadline: float | None,
        block_timeout_s: float | None,
        attempts: int = ATTEMPTS,
    ) -> Reply:
        attempt, redirects = 0, 0
        while True:
            attempt += 1
            origin = self._origin(url)
            connection: Connection | None = None
            started = time.monotonic()
            try:
                connection = self._connected(origin, deadline)
                reply = self._exchange(
                    connection, method, url, headers, make_body and make_body(), deadline, block_timeout_s
                )
            except (OSError, http.client.HTTPException) as error:
                reached = connection is not None
                if connection is not None:
                    connection.close()
                self._note("http", method=method, url=_shown(url), failed=str(error) or type(error).__name__)
                again = not isinstance(error, (TimeoutError, socket.gaierror, ssl.SSLError)) and (
                    repeatable or not reached
                )
                pause = _backoff(attempt)
                if (
                    not again
                    or attempt >= attempts
                    or (deadline is not None and time.monotonic() + pause >= deadline)
                ):
                    raise named(error, origin, self.origin) from error
                time.sleep(pause)
                continue
            except BaseException:
                # also Ctrl-C: half an answer must not meet the next request
                if connection is not None:
                    connection.close()
                raise
            took_ms = round((time.monotonic() - started) * 1000, 1)
            self._note("http", method=method, url=_shown(url), status=reply.status, ms=took_ms)
            location = reply.headers.get("location")
            if reply.status not in _REDIRECTS or not location:
                if reply.status >= 300:
                    raise failure(reply, method, self.origin)
                return reply
            redirects += 1
            if redirects > MAX_REDIRECTS:
                raise NetworkError(f"{origin} redirects without end")
            target = location if self.origin.path and location.startswith("/") else urljoin(url, location)
            if method not in ("GET", "HEAD") and reply.status not in (307, 308):
                raise NetworkError(f"{origin} answered {method} with a redirect that would turn it into a GET")
            there = self._origin(target)
            if origin.scheme == "https" and there.scheme != "https":
                raise NetworkError(f"{origin} redirects to {there} without TLS: refused")
            url, attempt = target, 0

    def _origin(self, url: str) -> Origin:
        """Whom `url` belongs to; behind a socket the server's own have no host."""
        own = self.origin.path and (url.startswith("unix:") or "://" not in url)
        return self.origin if own else Origin(url)

    def _connected(self, origin: Origin, deadline: float | None) -> Connection:
        idle, self._idle = self._idle, None
        if idle is not None:
            if idle.origin.same(origin) and idle.is_fresh():
                return idle
            idle.close()
        connection = Connection(origin, self._ca_file)
        left = CONNECT_TIMEOUT_S if deadline is None else min(CONNECT_TIMEOUT_S, deadline - time.monotonic())
        connection.open(max(left, 0.001))
        return connection

    def _exchange(
        self,
        connection: Connection,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | Body | None,
        deadline: float | None,
        block_timeout_s: float | None,
    ) -> Reply:
        def limit() -> None:
            connection.limit(block_timeout_s or (deadline or 0.0) - time.monotonic())

        limit()
        self._busy = connection
        try:
            connection.request(method, _target(url), body=body, headers=self._headers(connection.origin, headers))
        except (BrokenPipeError, ConnectionResetError) as broken:
            # a server may refuse an upload before it has read it all; its reason is worth more than the broken pipe
            try:
                response = connection.getresponse()
            except (OSError, http.client.HTTPException):
                raise broken from None
            reply = self._reply(connection, response, deadline)
            connection.close()
            if reply.status < 300:
                raise
            return reply
        limit()
        response = connection.getresponse()
        reply = self._reply(connection, response, deadline)
        if response.will_close:
            connection.close()
        else:
            self._idle = connection
        return reply

    def _reply(self, connection: Connection, response: http.client.HTTPResponse, deadline: float | None) -> Reply:
        pieces: list[bytes] = []
        size = 0
        while True:
            if deadline is not None:
                if (left := deadline - time.monotonic()) <= 0:
                    raise TimeoutError
                connection.limit(left)
            piece = response.read1(BLOCK_BYTES)
            if not piece:
                break
            pieces.append(piece)
            size += len(piece)
            if size > MAX_REPLY_BYTES:
                raise NetworkError(f"{connection.origin} sent more than {MAX_REPLY_BYTES} bytes")
        # read1 does not complain about a body that ends early
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        response.close()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, headers, b"".join(pieces), connection.origin)

    def _headers(self, origin: Origin, extra: Mapping[str, str] | None) -> dict[str, str]:
        headers = {"Host": origin.host_header(), "User-Agent": f"aether/{__version__}"}
        if origin.same(self.origin):
            headers["Accept"] = "application/json"
            if self.token:
                headers["Authorization"] = f"Bearer {self.token}"
            if self.traceparent:
                headers["traceparent"] = self.traceparent
        given = {name.lower() for name in extra or ()}
        return {**{name: value for name, value in headers.items() if name.lower() not in given}, **(extra or {})}

    def _url(self, path: str, query: Query | None) -> str:
        given = {name: value for name, value in (query or {}).items() if value is not None}
        start = "unix://" if self.origin.path else f"{self.origin.scheme}://{self.origin.host_header()}"
        return f"{start}{self._prefix}{path}" + (f"?{urlencode(given)}" if given else "")

    def _note(self, event: str, **fields: object) -> None:
        if self._on_event is not None:
            self._on_event(event, fields)


def _target(url: str) -> str:
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _shown(url: str) -> str:
    """`url` for a log line: a signed URL's query is a credential."""
    return url.split("?", 1)[0]


def _backoff(attempt: int) -> float:
    return (0.1 * 2 ** (attempt - 1)) * (0.5 + random.random() / 2)
