"""Answers that last: an async generator served until it ends, the client leaves, or the server stops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def until_shutdown(
    items: AsyncGenerator[T],
    shutdown: asyncio.Event,
    *,
    barred: Coroutine[Any, Any, None],
    silence_secs: float | None = None,
) -> AsyncGenerator[T | None]:
    """`items` until they end, `shutdown` is set, or `barred` returns because the caller may no longer see them; with
    `silence_secs` yields None after so long without an item.

    The generator is closed in any case, also when the client has left.
    """
    endings: list[asyncio.Future[Any]] = [asyncio.ensure_future(shutdown.wait()), asyncio.ensure_future(barred)]
    following: asyncio.Task[T] | None = None
    try:
        while True:
            if following is None:
                following = asyncio.ensure_future(anext(items))  # pyright: ignore[reportAssignmentType, reportArgumentType]
            done, _ = await asyncio.wait(
                {following, *endings}, timeout=silence_secs, return_when=asyncio.FIRST_COMPLETED
            )
            if following in done:
                try:
                    item = following.result()
                except StopAsyncIteration:
                    return
                finally:
                    following = None
                yield item
            elif done:
                return
            else:
                yield None
    finally:
        for ending in endings:
            ending.cancel()
        if following is not None:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await following
        await asyncio.gather(*endings, return_exceptions=True)
        await items.aclose()
