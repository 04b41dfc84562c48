"""A run's streams over a WebSocket: bytes both ways, each side bounded by what the other says it has used.

Binary messages from the client are stdin; those from the server begin with a byte 1 (stdout) or 2 (stderr). Text
messages are JSON objects by `type`: `ready` (the client's first, with `rows` and `columns` of a terminal), `eof`,
`resize`, `signal` (with `number`), `ack` (with `bytes`) and `alive` (both, both ways), and the server's last: `end`.
Nobody may have more than WINDOW_BYTES on the way, so that neither a stopped reader nor a command that reads nothing
keeps anything else from being heard.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

import msgspec
from litestar import WebSocket
from litestar.exceptions import WebSocketDisconnect

from aether.apps.runs import SERVER_STOPPED, Session
from aether.model.errors import BadRequest

WINDOW_BYTES = 256 * 1024
ALIVE_SECS = 15.0
SILENCE_SECS = 60.0
"""How long a client may say nothing, not even that it is alive, before it is taken for gone."""
FAREWELL_SECS = 5.0
_SIGNALS = frozenset({1, 2, 3, 10, 12, 15, 28})
"""What a caller's terminal or job control may send: HUP, INT, QUIT, USR1, USR2, TERM, WINCH."""
_Socket = WebSocket[Any, Any, Any]


class Gone(Exception):
    """The client left, fell silent, or broke the rules."""


class Relay:
    """One attached client; `serve` returns when the run has ended or the client is gone."""

    def __init__(
        self, socket: _Socket, session: Session, shutdown: asyncio.Event, barred: Coroutine[Any, Any, None]
    ) -> None:
        self._socket = socket
        self._session = session
        self._shutdown = shutdown
        self._barred = barred
        self._input: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._queued = 0
        self._on_the_way = 0
        self._room = asyncio.Event()
        self._ready = asyncio.Event()
        """The client has spoken: it misses nothing that is sent from now on."""
        self._sending = asyncio.Lock()

    async def serve(self) -> bool:
        """Whether the client was there to the end."""
        loops = [self._hear(), self._feed(), self._stay_alive(), self._obey_shutdown(), self._obey_bar()]
        tasks = [asyncio.create_task(loop) for loop in loops]
        speaking = asyncio.create_task(self._speak())
        try:
            await asyncio.wait([speaking, tasks[0], tasks[2]], return_when=asyncio.FIRST_COMPLETED)
            if not speaking.done():
                return False
            speaking.result()
            # the client leaves when it has heard how the run ended; cut before, it would not know
            await asyncio.wait([tasks[0]], timeout=FAREWELL_SECS)
            return True
        except (Gone, WebSocketDisconnect):
            return False
        finally:
            for task in (*tasks, speaking):
                task.cancel()
            for outcome in await asyncio.gather(*tasks, speaking, return_exceptions=True):
                if isinstance(outcome, Exception) and not isinstance(outcome, Gone | WebSocketDisconnect):
                    raise outcome

    async def _hear(self) -> None:
        while True:
            try:
                async with asyncio.timeout(SILENCE_SECS):
                    message = await self._socket.receive()
            except TimeoutError:
                raise Gone from None
            if message["type"] != "websocket.receive":
                raise Gone
            if (data := message.get("bytes")) is not None:
                self._queued += len(data)
                if self._queued > 2 * WINDOW_BYTES:
                    raise Gone
                self._input.put_nowait(data)
            else:
                self._obey(_decoded(message.get("text") or ""))

    def _obey(self, message: Mapping[str, Any]) -> None:
        match message.get("type"):
            case "eof":
                self._input.put_nowait(None)
            case "ack":
                self._on_the_way -= _number(message, "bytes")
                self._room.set()
            case "resize" | "ready":
                self._ready.set()
                rows, columns = _number(message, "rows"), _number(message, "columns")
                if rows and columns:
                    self._session.instance.resize(min(rows, 10_000), min(columns, 10_000))
            case "signal" if (number := _number(message, "number")) in _SIGNALS:
                self._session.instance.signal(number)
            case _:
                return  # alive, or what a newer client says

    async def _feed(self) -> None:
        """Bring stdin to the command as fast as it reads."""
        while True:
            data = await self._input.get()
            if data is None:
                await self._session.attached.end_input()
                continue
            await self._session.attached.write(data)
            self._queued -= len(data)
            await self._tell({"type": "ack", "bytes": len(data)})

    async def _speak(self) -> None:
        """Bring output to the client as fast as it reads, and at last how the run ended."""
        await self._ready.wait()
        while (piece := await self._session.attached.read()) is not None:
            stream, data = piece
            while self._on_the_way >= WINDOW_BYTES:
                self._room.clear()
                await self._room.wait()
            self._on_the_way += len(data)
            async with self._sending:
                await self._socket.send_bytes(bytes((stream,)) + data)
        ended, reason = await self._session.ended()
        await self._tell(
            {
                "type": "end",
                "code": ended.code,
                "signal": ended.signal,
                "out_of_memory": ended.out_of_memory,
                "expired": ended.expired,
                "reason": reason,
            }
        )

    async def _stay_alive(self) -> None:
        while True:
            await asyncio.sleep(ALIVE_SECS)
            await self._tell({"type": "alive"})

    async def _obey_shutdown(self) -> None:
        await self._shutdown.wait()
        await self._session.stop(SERVER_STOPPED)

    async def _obey_bar(self) -> None:
        await self._barred
        await self._session.stop("its caller lost the right to it")

    async def _tell(self, message: Mapping[str, Any]) -> None:
        async with self._sending:
            await self._socket.send_text(msgspec.json.encode(message).decode())


def _decoded(text: str) -> Mapping[str, Any]:
    try:
        found: Any = msgspec.json.decode(text)
    except msgspec.DecodeError:
        raise Gone from None
    if not isinstance(found, dict):
        raise Gone
    return found  # pyright: ignore[reportUnknownVariableType]


def _number(message: Mapping[str, Any], name: str) -> int:
    value = message.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadRequest(f"'{name}' must be a number")
    return value
