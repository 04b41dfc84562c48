"""The health gate: is a freshly started instance able to answer HTTP, and if not, why not.

Knows nothing of deployments or routing; the caller gives it an instance to dial and a deadline. Only a refused
connection and a bad answer are polled; an instance's end is awaited.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from aether.model.instance import InstanceExit
from aether.rollout.machine import Reason

REFUSED_INTERVAL_SECS = 0.02
REFUSED_INTERVAL_LATER_SECS = 0.05
BAD_ANSWER_INTERVAL_SECS = 0.25
PROBE_TIMEOUT_SECS = 10.0
_EAGER_SECS = 3.0
_MAX_HEAD_BYTES = 64 * 1024
_MAX_INTERIM = 8


class Dialable(Protocol):
    """The part of an instance that the gate needs."""

    async def dial(self) -> socket.socket: ...

    async def listening_ports(self) -> Sequence[int]: ...

    async def wait(self) -> InstanceExit: ...


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """What counts as healthy. `path` None: any answer below 500 to `/`; a given path must answer 200 to 399."""

    host: str
    port: int
    path: str | None = None

    @property
    def target(self) -> str:
        return self.path or "/"

    def accepts(self, status: int) -> bool:
        return status < 500 if self.path is None else 200 <= status < 400


@dataclass(frozen=True, slots=True)
class Healthy:
    status: int


class Gate:
    """One pass of one instance through its check. `last` tells at any time why it is not through yet."""

    def __init__(self, instance: Dialable, check: HealthCheck) -> None:
        self._instance = instance
        self._check = check
        self.last = Reason(
            "never_listened",
            f"the app never listened on port {check.port}: it must listen on the port in process.env.PORT",
        )

    async def run(self) -> Healthy | InstanceExit:
        """Return when the instance answers as it should or has ended. Sets no deadline: cancel it at yours."""
        ended = asyncio.ensure_future(self._instance.wait())
        probing = asyncio.ensure_future(self._probe_until_healthy())
        try:
            await asyncio.wait((ended, probing), return_when=asyncio.FIRST_COMPLETED)
            if probing.done() and not (ended.done() and probing.exception()):
                return probing.result()
            return await ended
        finally:
            for task in (ended, probing):
                task.cancel()
            await asyncio.gather(ended, probing, return_exceptions=True)

    async def _probe_until_healthy(self) -> Healthy:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while True:
            pause = BAD_ANSWER_INTERVAL_SECS
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_SECS):
                    status = await self._probe()
            except ConnectionRefusedError:
                eager = loop.time() - begun < _EAGER_SECS
                pause = REFUSED_INTERVAL_SECS if eager else REFUSED_INTERVAL_LATER_SECS
            except TimeoutError:
                self.last = Reason(
                    "health_timeout",
                    f"the app accepted a connection on port {self._check.port} but did not answer "
                    f"GET {self._check.target} within {PROBE_TIMEOUT_SECS:.0f} s",
                )
            except (OSError, EOFError, ValueError) as error:
                detail = str(error) or type(error).__name__
                self.last = Reason(
                    "health_no_answer", f"the app did not answer GET {self._check.target} with HTTP: {detail}"
                )
            else:
                if self._check.accepts(status):
                    return Healthy(status)
                wanted = "a status below 500" if self._check.path is None else "a status from 200 to 399"
                self.last = Reason(
                    "health_bad_status",
                    f"GET {self._check.target} answered {status}; the health check wants {wanted}",
                )
            await asyncio.sleep(pause)

    async def _probe(self) -> int:
        connection = await self._instance.dial()
        if self.last.code == "never_listened":
            # known from here on, although the answer may outlast the caller's deadline
            self.last = Reason(
                "health_timeout",
                f"the app accepted a connection on port {self._check.port} but has not answered "
                f"GET {self._check.target}",
            )
        return await http_status(connection, self._check.host, self._check.target)


async def http_status(connection: socket.socket, host: str, target: str) -> int:
    """Status of one GET over a connected socket, which is closed. Raises ValueError when the answer is not HTTP/1."""
    try:
        reader, writer = await asyncio.open_connection(sock=connection, limit=_MAX_HEAD_BYTES)
    except BaseException:
        connection.close()
        raise
    try:
        request = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: aether-health\r\nAccept: */*\r\n"
        writer.write(f"{request}Connection: close\r\n\r\n".encode("latin-1"))
        for _ in range(_MAX_INTERIM):
            head = await reader.readuntil(b"\r\n\r\n")
            status = _parse_status(head)
            if status >= 200:
                return status
        raise ValueError("only interim answers")
    except asyncio.LimitOverrunError as error:
        raise ValueError("the answer's head is too long") from error
    finally:
        writer.close()
        with suppress(OSError):
            writer.transport.abort()


def _parse_status(head: bytes) -> int:
    line = head.split(b"\r\n", 1)[0]
    parts = line.split(b" ", 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or len(parts[1]) != 3 or not parts[1].isdigit():
        raise ValueError(f"unexpected answer {line[:60]!r}")
    return int(parts[1])


async def wrong_port(instance: Dialable, check: HealthCheck) -> Reason | None:
    """Name the port that the app listens on instead; None when there is none or it cannot be told."""
    ports = [port for port in await instance.listening_ports() if port != check.port]
    if not ports:
        return None
    shown = ", ".join(str(port) for port in ports[:4])
    return Reason(
        "wrong_port",
        f"the app listens on port {shown} instead of {check.port}: it must listen on the port in process.env.PORT",
    )
