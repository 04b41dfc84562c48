"""The bounded number of uploads whose bytes this server takes in at once, whichever way they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from aether.model.errors import RateLimited

TURN_SECS = 10.0


class UploadTurns:
    """`limit` 0 is no bound."""

    def __init__(self, limit: int) -> None:
        self._semaphore = asyncio.Semaphore(limit) if limit else None

    @asynccontextmanager
    async def one(self) -> AsyncGenerator[None]:
        """Raises RateLimited after TURN_SECS."""
        if self._semaphore is None:
            yield
            return
        try:
            async with asyncio.timeout(TURN_SECS):
                await self._semaphore.acquire()
        except TimeoutError:
            raise RateLimited("too many uploads at once; try again") from None
        try:
            yield
        finally:
            self._semaphore.release()
