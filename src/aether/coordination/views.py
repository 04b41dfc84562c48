"""What is under a prefix, followed for as long as somebody looks: listed, watched, resumed and listed anew by itself.

While the store is away the last view stands; nothing is taken for deleted because nobody answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

import structlog

from aether.model.errors import Compacted, ServiceUnavailable
from aether.model.kv import KV, Batch, Change, KeyValue

PROGRESS_SECS = 0.5
_SILENT_SECS = 3.0
"""Without a batch for so long the store is taken for frozen, and asked anew."""
_AGAIN_SECS = 0.2
_log = structlog.stdlib.get_logger("aether.coordination")


@dataclass(frozen=True, slots=True)
class View:
    """Everything under the prefix at `revision`. `changed` are the keys that differ from the view before, deleted
    ones among them; all keys of the first view."""

    revision: int
    items: Mapping[str, KeyValue]
    changed: frozenset[str]


async def follow(kv: KV, prefix: str, *, progress_secs: float = PROGRESS_SECS) -> AsyncGenerator[View]:
    """The view now, and again after every change. Ends only with its consumer."""
    items: dict[str, KeyValue] = {}
    revision = 0
    """0 until there is a view; then what the newest one has reached."""
    while True:
        try:
            if not revision:
                listing = await kv.list(prefix)
                found = {kv.key: kv for kv in listing.items}
                changed = frozenset(key for key in items.keys() | found.keys() if items.get(key) != found.get(key))
                items, revision = found, listing.revision
                yield View(revision, dict(items), changed)
            async with kv.watch(prefix, from_revision=revision + 1, progress_secs=progress_secs) as watch:
                while True:
                    async with asyncio.timeout(_SILENT_SECS):
                        batch = await anext(watch)
                    revision = batch.revision
                    if batch.events:
                        changed = _apply(items, batch)
                        yield View(revision, dict(items), changed)
        except Compacted:
            revision = 0
        except (ServiceUnavailable, TimeoutError) as error:
            _log.info("the key-value store is away; what was last known stands", prefix=prefix, error=str(error))
            await asyncio.sleep(_AGAIN_SECS)


def _apply(items: dict[str, KeyValue], batch: Batch) -> frozenset[str]:
    """Returns the keys that changed."""
    for event in batch.events:
        if event.change is Change.PUT:
            items[event.kv.key] = event.kv
        else:
            items.pop(event.kv.key, None)
    return frozenset(event.kv.key for event in batch.events)
