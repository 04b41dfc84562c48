"""What one server has changed, told to the others at once over PostgreSQL's LISTEN and NOTIFY.

A signal is a topic, and says only "look again". One that is lost with a connection does no harm: whoever connects
again is told that anything may have changed, and everybody who is told looks at the record by himself now and then.

Signals are sent by themselves after the change is committed, not within it: PostgreSQL makes all transactions that
notify commit one after the other, which those that change something must not have to wait for.
"""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import asyncpg
import structlog

from aether.model.errors import AetherError
from aether.stores.database.postgresql import Address

CHANNEL = "aether"
_AT_ONCE = 100
"""Topics of one notification, which has room for 8000 bytes."""
_CONNECT_SECS = 5.0
_AGAIN_SECS = 0.5
_ALIVE_SECS = 10.0
"""How soon a connection that has silently gone is noticed."""
_log = structlog.stdlib.get_logger("aether.database")


class Signals:
    """`heard` is called in the event loop with topics that others have told, or with None for "anything"."""

    def __init__(self, address: Address, heard: Callable[[Sequence[str] | None], None]) -> None:
        self._address = address
        self._heard = heard
        self._name = secrets.token_hex(6)
        self._untold: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="signals")

    async def close(self) -> None:
        """Tell what is left to tell, if that can be done at once."""
        if self._task is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_AGAIN_SECS):
                while self._untold:
                    await asyncio.sleep(0.01)
        self._task.cancel()
        await asyncio.wait((self._task,))

    def tell(self, topics: Sequence[str]) -> None:
        """Tell the other servers; returns at once. A topic has no spaces."""
        self._untold.update(dict.fromkeys(topics))
        self._wake.set()

    async def _run(self) -> None:
        told = False
        while True:
            try:
                await self._serve()
            except (AetherError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
                if not told:
                    _log.warning("other servers are not told of changes for now", error=str(error))
                told = True
            else:
                told = False
            await asyncio.sleep(_AGAIN_SECS)

    async def _serve(self) -> None:
        """Listen and tell over one connection until it is lost."""
        connection = await self._address.connect(_CONNECT_SECS)
        try:
            lost = asyncio.Event()

            def on_end(_: object) -> None:
                lost.set()
                self._wake.set()

            connection.add_termination_listener(on_end)
            await connection.add_listener(CHANNEL, self._hear)
            self._heard(None)
            while not lost.is_set():
                self._wake.clear()
                if self._untold:
                    await self._send(connection)
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_ALIVE_SECS):
                        await self._wake.wait()
                        continue
                await connection.execute("SELECT 1")
        finally:
            connection.terminate()

    async def _send(self, connection: Any) -> None:
        batch = list(islice(self._untold, _AT_ONCE))
        await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, " ".join([self._name, *batch]))
        for topic in batch:
            self._untold.pop(topic, None)

    def _hear(self, _connection: object, _pid: object, _channel: object, payload: object) -> None:
        sender, *topics = str(payload).split(" ")
        if sender != self._name:
            self._heard(topics)
