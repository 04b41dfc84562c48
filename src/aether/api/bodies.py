"""Bodies of changes, taken in whole before the change gets its turn.

There are few turns, so a client that dawdles must not hold one. The objects, whose bodies are large, have turns and
clocks of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from aether.model.errors import AetherError, BadRequest, PayloadTooLarge

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

MAX_BYTES = 4 * 1024 * 1024
"""Largest JSON body; artifacts do not travel through routes."""
MAX_DOCUMENT_BYTES = 32 * 1024 * 1024
"""Largest document of an artifact, which its own route bounds further."""
MAX_PUBLIC_BYTES = 64 * 1024
"""Largest body of somebody who has shown no token."""


_DOCUMENTS = ("manifest", "sbom", "provenance")


def limit_of(path: str) -> int:
    """The largest body that a path with a token takes."""
    parts = path.split("/")
    document = len(parts) == 4 and parts[1] == "artifacts" and parts[3] in _DOCUMENTS
    return MAX_DOCUMENT_BYTES if document else MAX_BYTES


class RequestTimeout(AetherError):
    code, status = "bad_request", 408


async def take(receive: Receive, limit: int, timeout_secs: float) -> Receive:
    """A `receive` that gives the whole body at once, then goes on with the original.

    Raises PayloadTooLarge, RequestTimeout, BadRequest when the client leaves.
    """
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_secs or None):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise BadRequest("the request ended before its body did")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise PayloadTooLarge(f"the body has more than {limit} bytes")
                more = message.get("more_body", False)
    except TimeoutError:
        raise RequestTimeout(f"the body did not come within {timeout_secs:g} s") from None
    body: bytes | None = b"".join(parts)

    async def again() -> Message:
        nonlocal body
        if body is None:
            return await receive()
        whole, body = body, None
        return {"type": "http.request", "body": whole, "more_body": False}

    return again
