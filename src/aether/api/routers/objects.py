"""Signed PUT and GET of objects, as plain ASGI: bodies of hundreds of megabytes pass without a framework.

Bodies are gathered to RECEIVED_BYTES and written by a thread while the next ones arrive, so that neither the
event loop nor the socket waits for the disk and two blocks per upload are all the memory it takes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from aether.api.services import Services
from aether.api.transfers import Grant, ObjectTransfer, Upload
from aether.model.errors import AetherError, BadRequest, NotFound, PayloadTooLarge, ServiceUnavailable

BLOCK_BYTES = 1 << 20
RECEIVED_BYTES = 1 << 18
"""Written at once: every upload holds two of these, and there may be AETHER_MAX_CONCURRENT_UPLOADS."""
STALL_SECS = 60.0
"""A client that sends or takes nothing for so long is cut off."""
_PREFIX = "/objects/"

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class _MethodNotAllowed(AetherError):
    code, status = "bad_request", 405


class ObjectsApp:
    """ASGI app under /objects/; errors are raised for the shell to answer."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def __call__(self, scope: MutableMapping[str, Any], receive: _Receive, send: _Send) -> None:
        transfer = self._services.transfer
        if transfer is None or scope["type"] != "http":
            raise NotFound("there is nothing at this path")
        method: str = scope["method"]
        if method not in ("PUT", "GET", "HEAD"):
            raise _MethodNotAllowed("an object takes PUT and GET only")
        key = scope["path"][len(_PREFIX) :]
        query = scope["query_string"].decode("latin-1")
        grant = transfer.authorize("GET" if method == "HEAD" else method, key, query)
        if method == "PUT":
            await self._put(transfer, grant, scope, receive, send)
        else:
            await _get(transfer, grant, method == "GET", receive, send)

    async def _put(
        self, transfer: ObjectTransfer, grant: Grant, scope: MutableMapping[str, Any], receive: _Receive, send: _Send
    ) -> None:
        _check_length(dict(scope["headers"]), grant.size_bytes)
        async with self._services.turns.one(), _Counted(self._services):
            upload = await transfer.receive(grant)
            try:
                await _receive_into(upload, grant.size_bytes, receive)
                etag = await upload.finish()
            finally:
                await upload.abort()
        body = msgspec.json.encode({"size_bytes": grant.size_bytes})
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await _start(send, 200, [*headers, (b"etag", b'"%s"' % etag.encode())])
        await send({"type": "http.response.body", "body": body})


class _Counted:
    def __init__(self, services: Services) -> None:
        self._gauge = services.metrics.uploads_in_progress

    async def __aenter__(self) -> None:
        self._gauge.inc()

    async def __aexit__(self, *_: object) -> None:
        self._gauge.dec()


def _check_length(headers: dict[bytes, bytes], signed: int) -> None:
    length = headers.get(b"content-length")
    if length is None or not length.isdigit():
        raise BadRequest("an upload needs a Content-Length")
    if int(length) > signed:
        raise PayloadTooLarge(f"the URL was signed for {signed} bytes, the request announces {int(length)}")
    if int(length) != signed:
        raise BadRequest(f"the URL was signed for {signed} bytes, the request announces {int(length)}")


async def _receive_into(upload: Upload, size: int, receive: _Receive) -> None:
    """Gather bodies in two fixed buffers: one is written while the other fills."""
    filling, other = (memoryview(bytearray(min(RECEIVED_BYTES, size))) for _ in range(2))
    held = total = 0
    writing: asyncio.Task[None] | None = None
    try:
        async for body in _bodies(receive):
            total += len(body)
            if total > size:
                raise PayloadTooLarge(f"the URL was signed for {size} bytes, more arrived")
            while body:
                taken = min(len(filling) - held, len(body))
                filling[held : held + taken] = body[:taken]
                body = body[taken:]
                held += taken
                if held == len(filling):
                    if writing is not None:
                        await writing
                    writing = asyncio.create_task(upload.add(filling))
                    filling, other = other, filling
                    held = 0
        if writing is not None:
            await writing
        if total != size:
            raise BadRequest(f"the URL was signed for {size} bytes, {total} arrived; nothing was kept")
        await upload.add(filling[:held])
    finally:
        if writing is not None:
            await asyncio.wait([writing])


async def _bodies(receive: _Receive) -> AsyncGenerator[memoryview]:
    more = True
    while more:
        message = await _next(receive)
        if message["type"] == "http.disconnect":
            raise BadRequest("the upload broke off; nothing was kept")
        more = message.get("more_body", False)
        yield memoryview(message.get("body", b""))


async def _next(receive: _Receive) -> _Message:
    try:
        async with asyncio.timeout(STALL_SECS):
            return await receive()
    except TimeoutError:
        raise BadRequest(f"nothing arrived for {STALL_SECS:g} s; the upload was given up") from None


async def _get(transfer: ObjectTransfer, grant: Grant, with_body: bool, receive: _Receive, send: _Send) -> None:
    path = transfer.local_path(grant.key)
    try:
        descriptor = os.open(path or "", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound("the object does not exist") from None
    # uvicorn drops what is sent to a client that left, without a word: only `receive` tells.
    gone = asyncio.create_task(_gone(receive))
    try:
        size = os.fstat(descriptor).st_size
        headers = [
            (b"content-type", b"application/gzip"),
            (b"content-length", b"%d" % size),
            (b"content-disposition", b'attachment; filename="%s"' % _header_safe(grant.filename)),
            (b"x-content-type-options", b"nosniff"),
        ]
        await _start(send, 200, headers)
        sent = 0
        while with_body and sent < size and not gone.done():
            block = await asyncio.to_thread(os.pread, descriptor, BLOCK_BYTES, sent)
            if not block:
                raise ServiceUnavailable("the object shrank while it was sent")
            sent += len(block)
            await _send_in_time(send, block)
        await send({"type": "http.response.body", "body": b""})
    finally:
        os.close(descriptor)
        gone.cancel()
        await asyncio.wait([gone])


async def _send_in_time(send: _Send, block: bytes) -> None:
    try:
        async with asyncio.timeout(STALL_SECS):
            await send({"type": "http.response.body", "body": block, "more_body": True})
    except TimeoutError:
        raise BadRequest(f"the client took nothing for {STALL_SECS:g} s; it was cut off") from None


async def _gone(receive: _Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _header_safe(name: str) -> bytes:
    return "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "_" for c in name).encode()


async def _start(send: _Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
