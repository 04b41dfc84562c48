"""A TCP relay in front of a server: it writes down what is asked, and breaks connections when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

_BLOCK = 1 << 16


class Relay:
    """`asked` holds everything that was sent to the server. `cut_after` is how many bytes of answers still pass until
    one connection is broken; None lets everything pass."""

    def __init__(self, endpoint: str) -> None:
        address = urlsplit(endpoint)
        self._host, self._port = address.hostname, address.port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.asked = bytearray()
        self.cut_after: int | None = None
        self.cuts = 0

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def requests(self) -> list[str]:
        """The heads of all requests so far, in lower case."""
        text = self.asked.decode("latin-1").lower()
        found: list[str] = []
        for method in ("get", "put", "post", "head", "delete"):
            for part in text.split(f"{method} /")[1:]:
                head = part.partition("\r\n\r\n")[0]
                if " http/1.1\r\n" in head:
                    found.append(f"{method} /{head}")
        return found

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.closing(writer), contextlib.suppress(OSError):
            there, back = await asyncio.open_connection(self._host, self._port)
            with contextlib.closing(back):
                ways = [asyncio.create_task(self._up(reader, back)), asyncio.create_task(self._down(there, writer))]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while block := await reader.read(_BLOCK):
            self.asked += block
            writer.write(block)
            await writer.drain()

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while block := await reader.read(_BLOCK):
            if self.cut_after is not None:
                passing = block[: self.cut_after]
                self.cut_after -= len(passing)
                writer.write(passing)
                if self.cut_after <= 0:
                    self.cut_after, self.cuts = None, self.cuts + 1
                    await writer.drain()
                    return
            else:
                writer.write(block)
            await writer.drain()


@asynccontextmanager
async def relay(endpoint: str) -> AsyncIterator[Relay]:
    made = Relay(endpoint)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()
