"""What /objects needs from an object store that has no HTTP server of its own."""

from __future__ import annotations

from typing import Protocol


class Grant(Protocol):
    """A signed URL that was checked: what may be done to which object."""

    @property
    def key(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def filename(self) -> str: ...
    @property
    def multipart_id(self) -> str:
        """Of the upload that it is a part of, or empty."""
        ...

    @property
    def part(self) -> int: ...


class Upload(Protocol):
    """An object that is being received; invisible until `finish`."""

    async def add(self, block: memoryview) -> None:
        """Append; the caller may reuse the memory afterwards. Raises ServiceUnavailable when the disk is full."""
        ...

    async def finish(self) -> str:
        """Publish, replacing an earlier upload under the same key or part number; returns the ETag. Raises BadRequest
        unless the size is exact."""
        ...

    async def abort(self) -> None:
        """Leave nothing behind; allowed after `finish`, where it does nothing."""
        ...


class ObjectTransfer(Protocol):
    """The store's side of a signed PUT and GET."""

    def authorize(self, method: str, key: str, query: str) -> Grant:
        """Raises Forbidden when the URL was altered or has expired."""
        ...

    async def receive(self, grant: Grant) -> Upload: ...

    def local_path(self, key: str) -> str | None: ...
