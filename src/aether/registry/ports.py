"""What the registry needs from an object store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """A request that a client may make without a token until `expires_at` (seconds since the epoch)."""

    method: str
    url: str
    headers: Mapping[str, str]
    expires_at: int


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

    async def move(self, source: str, target: str) -> None:
        """Atomically make `source` available as `target`; idempotent when `target` already is the object."""
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
