"""Brings an artifact of any size from the registry into a file, over the server's redirect to its store.

The credential goes to the server only: the store's address is signed, and may be somebody else's.
"""

from __future__ import annotations

import http.client
import os
import time
from urllib.parse import quote, urlencode, urljoin, urlsplit

from aether.client.dial import BLOCK_BYTES, CONNECT_TIMEOUT_S, Connection, Origin
from aether.model.errors import DigestMismatch, LocalIOError, NetworkError, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.client.transport import Transport

_BLOCK_TIMEOUT_S = 60.0
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5


def download(transport: Transport, digest: str, path: str, *, app: str | None = None, size_bytes: int) -> None:
    """Write the artifact `digest`, `size_bytes` long, to the new file `path`; whether its bytes are the right ones is
    the caller's to check. Raises NotFound, NetworkError, LocalIOError, DigestMismatch for another size."""
    query = f"?{urlencode({'app': app})}" if app else ""
    url = f"/artifacts/{quote(digest, safe='')}/download{query}"
    if not transport.origin.path:
        url = transport.base.rstrip("/") + url
    for _ in range(_MAX_REDIRECTS + 1):
        # behind a socket the server's own addresses have no host
        origin = Origin(url) if "://" in url else transport.origin
        connection = Connection(origin, transport.ca_file)
        try:
            target = _once(transport, connection, origin, url, path, size_bytes)
        except (OSError, http.client.HTTPException) as error:
            raise NetworkError(f"the download from {origin} broke off: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if target is None:
            return
        url = urljoin(url, target)
        if origin.scheme == "https" and not url.startswith("https://"):
            raise NetworkError(f"{origin} redirects to {Origin(url)} without TLS: refused")
    raise NetworkError(f"{transport.origin} redirects without end")


def _once(
    transport: Transport, connection: Connection, origin: Origin, url: str, path: str, size_bytes: int
) -> str | None:
    """One request; returns where it is redirected to, None when the file is written."""
    connection.open(CONNECT_TIMEOUT_S)
    connection.limit(_BLOCK_TIMEOUT_S)
    headers = {"Host": origin.host_header(), "Accept-Encoding": "identity"}
    if transport.token and origin.same(transport.origin):
        headers["Authorization"] = f"Bearer {transport.token}"
    parts = urlsplit(url)
    connection.request("GET", parts.path + (f"?{parts.query}" if parts.query else ""), headers=headers)
    response = connection.getresponse()
    location = response.getheader("Location")
    if response.status in _REDIRECTS and location:
        return location
    if response.status == 404:
        raise NotFound("the registry does not have this artifact any more")
    if response.status != 200:
        raise NetworkError(f"{origin} answered {response.status} instead of the artifact")
    _write(connection, response, path, size_bytes)
    return None


def _write(connection: Connection, response: http.client.HTTPResponse, path: str, size_bytes: int) -> None:
    began, size = time.monotonic(), 0
    try:
        out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LocalIOError(f"cannot write {path}: {error.strerror}") from error
    with os.fdopen(out, "wb", buffering=0) as file:
        while True:
            connection.limit(_BLOCK_TIMEOUT_S)
            block = response.read1(BLOCK_BYTES)
            if not block:
                break
            size += len(block)
            if size > size_bytes:
                raise DigestMismatch(f"the store sends more than the {size_bytes} bytes that the artifact has")
            try:
                file.write(block)
            except OSError as error:
                raise LocalIOError(f"cannot write {path}: {error.strerror}") from error
    if size != size_bytes:
        took = time.monotonic() - began
        raise NetworkError(f"the download ended after {size} of {size_bytes} bytes ({took:.0f} s)")
