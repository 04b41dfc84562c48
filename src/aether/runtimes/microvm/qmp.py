"""The control line of a monitor (QMP): commands, their answers and the events between them, over one socket pair.

A monitor may be in the hands of its guest: what it says is bounded, and decides nothing but whether a start goes on.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping
from typing import Any, cast

_MAX_LINE, _MAX_EVENTS = 64 * 1024, 100


class MonitorError(Exception):
    """A monitor did not do what it was told."""


CAPABILITIES = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
"""Of both sides of a snapshot: memory stays where it is, and how far it got is reported."""


class Control:
    """A conversation on one side of a socket pair whose other side the monitor has, from its greeting on.

    A context manager; leaving it hangs up.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._events: list[tuple[str, str]] = []

    async def __aenter__(self) -> Control:
        self._streams = await asyncio.open_unix_connection(sock=self._sock, limit=_MAX_LINE)
        try:
            await self._read()
            await self.execute("qmp_capabilities")
        except BaseException:
            self._streams[1].close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._streams is not None
        self._streams[1].close()

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Do `command` and return its answer. Raises MonitorError."""
        assert self._streams is not None
        self._streams[1].write(_command(command, arguments))
        return await self._answer(command)

    async def give(self, name: str, descriptor: int) -> None:
        """Give the monitor a descriptor, which it calls `name`. Raises MonitorError."""
        try:
            socket.send_fds(self._sock, [_command("getfd", {"fdname": name})], [descriptor])
        except OSError as error:
            raise MonitorError(f"the monitor takes no descriptor: {error}") from error
        await self._answer("getfd")

    async def _answer(self, command: str) -> Any:
        while "return" not in (answer := await self._read()):
            if "error" in answer:
                raise MonitorError(f"the monitor refuses {command}: {str(answer['error'])[:300]}")
        return answer["return"]

    async def event(self, name: str, *statuses: str) -> str:
        """The status that the first event of that name reports, or the first of `statuses`, once there has been one.

        Raises MonitorError.
        """
        seen = 0
        while True:
            for event, status in self._events[seen:]:
                if event == name and (not statuses or status in statuses):
                    return status
            seen = len(self._events)
            await self._read()

    async def _read(self) -> dict[str, Any]:
        assert self._streams is not None
        try:
            text = await self._streams[0].readline()
            found = json.loads(text) if text.endswith(b"\n") else None
        except (OSError, ValueError, RecursionError) as error:
            raise MonitorError(f"the monitor's answer cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise MonitorError("the monitor has hung up")
        message = cast("dict[str, Any]", found)
        if "event" in message:
            if len(self._events) >= _MAX_EVENTS:
                raise MonitorError("the monitor reports too much")
            data = message.get("data", {})
            status = cast("dict[str, Any]", data).get("status", "") if isinstance(data, dict) else ""
            self._events.append((str(message["event"]), str(status)))
        return message


def _command(name: str, arguments: Mapping[str, Any]) -> bytes:
    return json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n"
