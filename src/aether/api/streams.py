"""Answers that last: an async generator served until it ends, the client leaves, or the server stops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import TypeVar

T = TypeVar("T")


async def until_shutdown(
    items: AsyncGenerator[T], shutdown: asyncio.Event, *, silence_secs: float | None = None
) -> AsyncGenerator[T | None]:
    """`items` until they end or `shutdown` is set; with `silence_secs` yields None after so long without an item.

    The generator is closed in any case, also when the client has left.
    """
    stopping = asyncio.create_task(shutdown.wait())
    following: asyncio.Task[T] | None = None
    try:
        while True:
            if following is None:
                following = asyncio.ensure_future(anext(items))  # pyright: ignore[reportAssignmentType, reportArgumentType]
            done, _ = await asyncio.wait(
                (following, stopping), timeout=silence_secs, return_when=asyncio.FIRST_COMPLETED
            )
            if following in done:
                try:
                    item = following.result()
                except StopAsyncIteration:
                    return
                finally:
                    following = None
                yield item
            elif stopping in done:
                return
            else:
                yield None
    finally:
        stopping.cancel()
        if following is not None:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await following
        with contextlib.suppress(asyncio.CancelledError):
            await stopping
        await items.aclose()
