"""The server's end of a run's standard streams: one connection to the run's keeper (see `shim.console`)."""

from __future__ import annotations

import asyncio
import socket

from aether.runtimes.process.shim.console import READ_BYTES

_ATTACH_SECS = 10.0


class Attached:
    """Somebody's standard streams. Closing it, or losing the process that holds it, ends the run."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    async def read(self) -> tuple[int, bytes] | None:
        """Output with its stream, 1 or 2; None when the run has ended and everything was read."""
        try:
            message = await self._loop.sock_recv(self._sock, READ_BYTES + 1)
        except ConnectionError:
            return None
        return (int(message[:1]), message[1:]) if message else None

    async def write(self, data: bytes) -> None:
        """Returns when the run's keeper has taken `data`, which it does as fast as the command reads."""
        for at in range(0, len(data), READ_BYTES):
            await self._send(b"i" + data[at : at + READ_BYTES])

    async def end_input(self) -> None:
        await self._send(b"e")

    def close(self) -> None:
        self._sock.close()

    async def _send(self, message: bytes) -> None:
        try:
            await self._loop.sock_sendall(self._sock, message)
        except (ConnectionError, BrokenPipeError):
            return  # the run has ended; whoever reads learns it


async def attach(sock: socket.socket) -> Attached:
    """Attach over a fresh connection to a keeper. Raises ConnectionRefusedError when somebody is attached already."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_ATTACH_SECS):
            await loop.sock_sendall(sock, b"attach")
            if await loop.sock_recv(sock, 16) != b"ok":
                raise ConnectionRefusedError("nobody can attach to this instance, or somebody has")
    except BaseException:
        sock.close()
        raise
    return Attached(sock)
