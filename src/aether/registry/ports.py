"""What the registry needs from an object store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from aether.model.objects import SignedRequest


class ObjectStore(Protocol):
    """Two-phase object storage: clients PUT under a pending key, the registry verifies and moves.

    Keys are relative, `/`-separated. Methods raise NotFound for a missing object and ServiceUnavailable when
    the store cannot answer.
    """

    def sign_put(self, key: str, size_bytes: int, expires_secs: int) -> SignedRequest: ...

    def sign_get(self, key: str, expires_secs: int, filename: str) -> SignedRequest: ...

    async def size(self, key: str) -> int: ...

    def read(self, key: str, chunk_bytes: int = 1 << 20) -> AsyncIterator[bytes]: ...

    async def sha256(self, key: str) -> tuple[str, int]:
        """Hash the whole object off the event loop; returns (hex digest, size in bytes)."""
        ...

    async def claim(self, key: str) -> str:
        """Take a pending object out of reach of every signed URL and return the key it is found at from now on.

        What is hashed afterwards is what `move` makes final. Claiming again returns the same key.
        """
        ...

    async def move(self, source: str, target: str) -> None:
        """Atomically and durably make `source` available as `target`, replacing what is there; done already
        when `source` is gone and `target` is there."""
        ...

    async def delete(self, key: str) -> None:
        """Delete; a missing key is not an error."""
        ...

    def local_path(self, key: str) -> str | None:
        """A path to the object on this machine, or None when the store is remote."""
        ...

    def list(self, prefix: str) -> AsyncIterator[tuple[str, int, float]]:
        """Yield (key, size in bytes, modified at in seconds since the epoch)."""
        ...
