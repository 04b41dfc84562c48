"""What the registry needs from an object store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from aether.model.objects import Part, SignedRequest


class Sealer(Protocol):
    """Authenticated encryption under keys that are not in the database."""

    def seal(self, plain: bytes, about: str) -> str: ...

    def unseal(self, text: str, about: str) -> bytes:
        """Raises ServiceUnavailable when the key is missing, or the text altered or made for something else."""
        ...


class ObjectStore(Protocol):
    """Two-phase object storage: clients PUT under a pending key, the registry verifies and moves.

    Keys are relative, `/`-separated. `pending/<upload>` is the only place that a signed URL can write. Methods raise
    NotFound for a missing object and ServiceUnavailable when the store cannot answer.
    """

    # --- signed requests of clients

    async def sign_put(
        self, key: str, size_bytes: int, expires_secs: int, *, sha256: str | None = None
    ) -> SignedRequest:
        """A PUT of exactly `size_bytes`; of bytes with this SHA-256 (hex) too, where the store enforces that."""
        ...

    async def sign_get(self, key: str, expires_secs: int, filename: str) -> SignedRequest: ...

    # --- uploads in parts: numbers from 1 to MAX_PARTS, MIN_PART_BYTES each but the last

    async def begin_multipart(self, key: str) -> str:
        """Returns the store's own id of the upload."""
        ...

    async def sign_part(
        self, key: str, multipart_id: str, number: int, size_bytes: int, expires_secs: int
    ) -> SignedRequest:
        """A PUT of exactly `size_bytes`, answered with the part's ETag. Sent again it replaces the part."""
        ...

    async def parts(self, key: str, multipart_id: str) -> list[Part]:
        """What has arrived, by number. Raises NotFound once the upload is finished or aborted."""
        ...

    async def finish_multipart(self, key: str, multipart_id: str, parts: Sequence[tuple[int, str]]) -> None:
        """Make the object at `key` of these (number, etag), durably; repeated after success, or after the object was
        claimed, it does nothing.

        Raises BadRequest for a part that has not arrived or has another etag, parts out of order and parts that are
        too small, and may then be tried with others; NotFound for an upload that was aborted or never begun.
        """
        ...

    async def abort_multipart(self, key: str, multipart_id: str) -> None:
        """Drop an upload and its parts; one that is over already is not an error."""
        ...

    def multipart_uploads(self, prefix: str) -> AsyncIterator[tuple[str, str, float]]:
        """Yield (key, multipart id, begun at in seconds since the epoch) of what is neither finished nor aborted."""
        ...

    # --- the registry's own

    async def put(self, key: str, body: AsyncIterator[bytes], size_bytes: int | None = None) -> None:
        """Write an object, durably and whole or not at all, replacing what is there. Raises BadRequest when it has
        not `size_bytes`."""
        ...

    async def size(self, key: str) -> int: ...

    def read(self, key: str, chunk_bytes: int = 1 << 20, start: int = 0) -> AsyncIterator[bytes]:
        """Blocks of `chunk_bytes` from byte `start` on."""
        ...

    async def sha256(self, key: str) -> tuple[str, int]:
        """Hash the whole object off the event loop; returns (hex digest, size in bytes)."""
        ...

    async def kept_sha256(self, key: str) -> str | None:
        """The SHA-256 (hex) of all bytes that the store itself keeps; None where it keeps none."""
        ...

    async def claim(self, key: str) -> str:
        """Take a pending object out of reach of every signed URL and return the key it is found at from now on.

        What is hashed afterwards is what `move` makes final. The key is `claimed/<upload>`, or one below it where the
        store can only copy. Claiming again returns the same key, or that of another copy when several claim at once.
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
