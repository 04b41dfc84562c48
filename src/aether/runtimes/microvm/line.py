"""The line between the host and /init of one guest: readiness and the end come in, the wish to stop goes out.

Text over one TCP connection that /init opens; guest/source/init.c is the other end. It begins with a secret that only
/init was given, so the function, which can reach the port too, can claim nothing.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import signal
import socket

from aether.model.instance import InstanceExit
from aether.runtimes.microvm.calls import take_calls

_MAX_LINE = 256
_HELLO_SECS = 10.0
_END = re.compile(rb"(exit|signal|memory) ([0-9]{1,3})")


class Line:
    """`up` is set once /init has called, `ready` once the function listens, `ended` when /init said how it ended.

    `parked` is set when /init has stopped a function that listens, and the line is gone without a trace."""

    def __init__(self, secret: str) -> None:
        self._hello = f"hello {secret}".encode()
        self._writer: asyncio.StreamWriter | None = None
        self.up = asyncio.Event()
        self.ready = asyncio.Event()
        self.parked = asyncio.Event()
        self.ended: InstanceExit | None = None

    def stop(self, grace_secs: float) -> bool:
        """Ask for the function's end; False when there is nobody to ask."""
        if self._writer is None or self._writer.is_closing():
            return False
        self._writer.write(b"stop %d\n" % round(max(grace_secs, 0.0) * 1000))
        return True

    async def serve(self, listener: socket.socket) -> None:
        """Wait for calls on `listener` until cancelled."""
        await take_calls(listener, self._called, _MAX_LINE)

    async def _called(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await self._is_init(reader):
            self._writer = writer
            self.up.set()
            parks = False
            while (text := await reader.readline()).endswith(b"\n"):
                if text == b"parked\n":
                    parks = True
                    writer.write_eof()  # /init closes its end then
                self._said(text[:-1])
            if parks:
                self.parked.set()

    async def _is_init(self, reader: asyncio.StreamReader) -> bool:
        if self._writer is not None:
            return False
        async with asyncio.timeout(_HELLO_SECS):
            text = await reader.readline()
        return hmac.compare_digest(text.rstrip(b"\n"), self._hello) and self._writer is None

    def _said(self, text: bytes) -> None:
        if text == b"ready":
            self.ready.set()
        elif (found := _END.fullmatch(text)) is not None:
            number = int(found[2])
            self.ended = (
                InstanceExit(number, None)
                if found[1] == b"exit"
                else InstanceExit(None, number, out_of_memory=found[1] == b"memory")
            )


KILLED = InstanceExit(code=None, signal=int(signal.SIGKILL))
"""How an instance ended whose machine went without a word."""
