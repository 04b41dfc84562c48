"""A key-value store of each kind, for tests that hold for all of them; `open` gives another client of the same store,
as another process would have."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aether.model.kv import KV
from aether.stores.kv.sqlite import SqliteKV

KINDS = ["sqlite"]


class Stores:
    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.path = folder / "kv.db"
        self._opened: list[SqliteKV] = []

    async def open(self) -> KV:
        store = SqliteKV(self.path)
        await store.open()
        self._opened.append(store)
        return store

    async def close(self) -> None:
        for store in self._opened:
            await store.close()


@asynccontextmanager
async def stores(kind: str, folder: Path) -> AsyncIterator[Stores]:
    made = Stores(kind, folder)
    try:
        yield made
    finally:
        await made.close()
