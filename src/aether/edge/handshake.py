"""Listening for TLS: connections are counted and bounded from their first moment, before they are anybody's client.

A server of asyncio shakes hands out of its owner's sight, so that silent clients could take every descriptor. Here
each handshake has a time limit, and at the limit of all of them the oldest gives way: an honest one takes
milliseconds.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from functools import partial
from typing import TYPE_CHECKING, Final

from aether.edge.downstream import ClientConnection

if TYPE_CHECKING:
    from aether.edge.server import Edge
    from aether.edge.table import Entrance

_log: Final = logging.getLogger(__name__)
_MAX_AT_ONCE: Final = 1024
_NO_DESCRIPTORS_SECS: Final = 0.1


class TlsDoor:
    """One listening socket. `open` begins, `close` ends; connections that shook hands are the edge's."""

    def __init__(self, edge: Edge, entrance: Entrance, sock: socket.socket, tls: ssl.SSLContext) -> None:
        self._edge = edge
        self._client = partial(ClientConnection, edge, entrance)
        self._socket = sock
        self._tls = tls
        self._shaking: dict[asyncio.Task[None], None] = {}
        self._accepting: asyncio.Task[None] | None = None

    def open(self) -> None:
        self._accepting = self._edge.loop.create_task(self._accept(), name="tls accept")

    async def close(self) -> None:
        """Stop listening and give up the handshakes under way. Idempotent."""
        tasks = [*self._shaking, *([self._accepting] if self._accepting is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._accepting = None
        self._socket.close()

    async def _accept(self) -> None:
        loop = self._edge.loop
        while True:
            try:
                sock, _ = await loop.sock_accept(self._socket)
            except OSError as error:
                # of one connection that is gone already, or for want of descriptors until others close
                _log.warning("a connection could not be accepted: %s", error)
                await asyncio.sleep(_NO_DESCRIPTORS_SECS)
                continue
            if len(self._shaking) >= _MAX_AT_ONCE:
                next(iter(self._shaking)).cancel()
            task = loop.create_task(self._shake(sock), name="tls handshake")
            self._shaking[task] = None
            task.add_done_callback(self._ended)

    async def _shake(self, sock: socket.socket) -> None:
        options = self._edge.options
        counters = self._edge.counters
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._edge.loop.connect_accepted_socket(
                self._client,
                sock,
                ssl=self._tls,
                ssl_handshake_timeout=options.handshake_timeout_secs,
                ssl_shutdown_timeout=options.linger_secs,
            )
            counters.handshakes += 1
        except (OSError, TimeoutError):
            # scanners, plain HTTP, clients that do not trust the certificate: nothing that an operator must act on
            counters.handshake_failures += 1
            sock.close()
        except asyncio.CancelledError:
            counters.handshake_failures += 1
            sock.close()
            raise

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._shaking.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a TLS handshake failed unexpectedly", exc_info=error)
