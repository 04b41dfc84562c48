"""Serve an ASGI app with uvicorn inside the caller's event loop, on sockets that the caller chose."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import uvicorn

_TICK_SECS = 1.0


class ApiServer:
    """One running HTTP server. `start` returns when it accepts connections; signals stay the caller's."""

    def __init__(self, app: Callable[..., Any], sock: socket.socket, *, grace_secs: float = 10.0) -> None:
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="websockets-sansio",
            lifespan="off",
            log_config=None,
            access_log=False,
            # uvicorn would believe X-Forwarded-For from loopback; the API reads the field itself, from the edge only
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=max(1, round(grace_secs)),
            ws_max_size=1 << 20,
        )
        self._server = _Server(config)
        self._socket = sock
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises OSError when the socket cannot be served."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="api-server")
        ready = asyncio.create_task(self._server.ready.wait())
        await asyncio.wait([self._task, ready], return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._task.done():
            await self._task
            raise OSError("the API server ended while it was starting")

    async def stop(self) -> None:
        """Take no new connections, wait for requests under way up to the grace, then cut them."""
        if self._task is None:
            return
        self._server.should_exit = True
        self._server.asked.set()
        await self._task
        self._socket.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()
        self.asked = asyncio.Event()

    async def main_loop(self) -> None:
        """As uvicorn's, which looks ten times a second whether it should end; here only the Date header ticks."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_SECS):
                    await self.asked.wait()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def unix_socket(path: Path) -> socket.socket:
    """A listening-to-be socket at `path` that only this user may connect to; a stale one is replaced."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The mode must be right from the first moment on, and only the umask can do that for a socket.
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(before)
    sock.setblocking(False)
    return sock


def loopback_socket(port: int = 0) -> tuple[socket.socket, int]:
    """A socket bound to 127.0.0.1 and its port (0 chooses a free one)."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    sock.setblocking(False)
    return sock, cast("tuple[str, int]", sock.getsockname())[1]
