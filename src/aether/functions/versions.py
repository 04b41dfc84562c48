"""The newest versions of all functions as this process knows them: read again when told, and now and then."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import structlog

from aether.functions.ports import FunctionSource, FunctionVersion
from aether.model.errors import AetherError

LOOK_SECS = 5.0
_log = structlog.stdlib.get_logger("aether.functions")


class Versions:
    """The events of `subscribe` are set by every look that found something else."""

    def __init__(self, source: FunctionSource) -> None:
        self._source = source
        self._told = asyncio.Event()
        self.current: Mapping[str, FunctionVersion] = {}
        self._listening: set[asyncio.Event] = set()

    def changed(self) -> None:
        """Look now."""
        self._told.set()

    async def look(self) -> None:
        """Raises ServiceUnavailable."""
        self._told.clear()
        found = {version.function_id: version for version in await self._source.current()}
        if found != self.current:
            self.current = found
            for event in self._listening:
                event.set()

    @contextmanager
    def subscribe(self) -> Generator[asyncio.Event]:
        """An event that every change sets; its reader clears it before it looks."""
        event = asyncio.Event()
        self._listening.add(event)
        try:
            yield event
        finally:
            self._listening.discard(event)

    async def run(self) -> None:
        """Look for ever."""
        while True:
            try:
                async with asyncio.timeout(LOOK_SECS):
                    await self._told.wait()
            except TimeoutError:
                pass  # now and then without being told
            try:
                await self.look()
            except AetherError as error:
                _log.warning("the functions could not be read; what was last known stands", error=error.message)
                await asyncio.sleep(1)
