"""Work that must come to its end although whoever waits for it was cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

_T = TypeVar("_T")


async def to_the_end(work: Awaitable[_T]) -> _T:
    """What `work` returns or raises; a cancellation is raised once the work has ended."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            # the caller's cancellation may arrive in the very step in which the work ends; it still counts
            cancelled = cancelled or not task.cancelled()
        except BaseException:  # noqa: BLE001 - the outcome is taken from the task below
            break
    if cancelled:
        if not task.cancelled():
            task.exception()
        raise asyncio.CancelledError
    return task.result()
