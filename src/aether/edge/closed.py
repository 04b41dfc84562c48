"""A backend for an app that is not meant to run: it takes every request and refuses it in words of its own.

It stands where a pooled connection would, so that the path of a request to a running app pays nothing for it.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from aether.edge.pool import EdgeBackend
from aether.edge.upstream import UpstreamConnection

if TYPE_CHECKING:
    from aether.edge.exchange import Exchange


class ClosedBackend(EdgeBackend):
    """Answers 503 with `message`; no connection is ever opened."""

    __slots__ = ("message",)

    def __init__(self, message: str) -> None:
        super().__init__("closed", _nowhere, _stays)
        self.message = message

    def take(self, now: float) -> UpstreamConnection | None:
        return _Refusal(self)


class _Refusal(UpstreamConnection):
    """A connection that was never made; fails the one request it is given."""

    __slots__ = ("_message",)

    def __init__(self, backend: ClosedBackend) -> None:
        super().__init__(backend, _nothing)
        self._message = backend.message

    def gone(self) -> bool:
        return False

    def begin(self, exchange: Exchange, data: bytes) -> None:
        del data
        exchange.fail(503, self._message)

    def abort(self) -> None:
        self.closed = True

    def close(self) -> None:
        self.closed = True


async def _nowhere() -> socket.socket:
    raise ConnectionRefusedError("the app is not meant to run")


def _nothing(size: int, flags: int) -> bytes:
    raise BlockingIOError


def _stays(backend: EdgeBackend) -> None:
    """It is in no route's list, so there is nothing to withdraw."""
