"""Backends that answer themselves: for apps not meant to run, for hosts that redirect, and for proofs of control.

Each stands where a pooled connection would, so that the path of a request to a running app pays nothing for it.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

from aether.edge.pool import EdgeBackend
from aether.edge.upstream import UpstreamConnection

if TYPE_CHECKING:
    from aether.edge.exchange import Exchange
    from aether.edge.table import Route


class ClosedBackend(EdgeBackend):
    """Answers 503 with `message`; no connection is ever opened."""

    __slots__ = ("message",)

    def __init__(self, message: str) -> None:
        super().__init__("closed", _nowhere, _stays)
        self.message = message

    def take(self, now: float) -> UpstreamConnection | None:
        return _Refusal(self)


class RedirectBackend(EdgeBackend):
    """Sends every request on to the same path under `origin`."""

    __slots__ = ("origin",)

    def __init__(self, origin: str) -> None:
        super().__init__("redirect", _nowhere, _stays)
        self.origin = origin

    def take(self, now: float) -> UpstreamConnection | None:
        return _Redirection(self)


class ChallengeBackend(EdgeBackend):
    """Answers some paths with texts and gives every other request to `route`, if there is one."""

    __slots__ = ("answers", "route")

    def __init__(self, answers: Mapping[str, str], route: Route | None) -> None:
        super().__init__("challenge", _nowhere, _stays)
        self.answers = answers
        self.route = route

    def take(self, now: float) -> UpstreamConnection | None:
        return _Challenge(self)


class _Unmade(UpstreamConnection):
    """A connection that was never made."""

    __slots__ = ()

    def __init__(self, backend: EdgeBackend) -> None:
        super().__init__(backend, _nothing)

    def gone(self) -> bool:
        return False

    def abort(self) -> None:
        self.closed = True

    def close(self) -> None:
        self.closed = True


class _Refusal(_Unmade):
    __slots__ = ("_message",)

    def __init__(self, backend: ClosedBackend) -> None:
        super().__init__(backend)
        self._message = backend.message

    def begin(self, exchange: Exchange, data: bytes) -> None:
        del data
        exchange.fail(503, self._message)


class _Redirection(_Unmade):
    __slots__ = ("_origin",)

    def __init__(self, backend: RedirectBackend) -> None:
        super().__init__(backend)
        self._origin = backend.origin

    def begin(self, exchange: Exchange, data: bytes) -> None:
        del data
        target = exchange.head.target.decode("ascii")
        exchange.redirect(self._origin + (target if target != "*" else "/"))


class _Challenge(_Unmade):
    __slots__ = ("_answers", "_route")

    def __init__(self, backend: ChallengeBackend) -> None:
        super().__init__(backend)
        self._answers = backend.answers
        self._route = backend.route

    def begin(self, exchange: Exchange, data: bytes) -> None:
        head = exchange.head
        text = self._answers.get(head.target.decode("ascii"))
        if text is not None and head.method in (b"GET", b"HEAD"):
            exchange.say(text)
        elif self._route is not None:
            exchange.reroute(self._route, data)
        else:
            exchange.fail(404, f"no app answers to the host '{head.host.decode('ascii')}'")


async def _nowhere() -> socket.socket:
    raise ConnectionRefusedError("the app is not meant to run")


def _nothing(size: int, flags: int) -> bytes:
    raise BlockingIOError


def _stays(backend: EdgeBackend) -> None:
    """It is in no route's list, so there is nothing to withdraw."""
