"""What an object store hands out, and the bounds of an upload in parts, which are S3's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MIN_PART_BYTES = 5 * 1024**2
"""Of every part but the last."""
MAX_PART_BYTES = 5 * 1024**3
MAX_PARTS = 10_000


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """A request that a client may make without a token until `expires_at` (seconds since the epoch)."""

    method: str
    url: str
    headers: Mapping[str, str]
    expires_at: int

    def expires_in_secs(self, now: float) -> int:
        """Whole seconds that are surely left at `now` (since the epoch): for those whose clock is another."""
        return max(0, math.floor(self.expires_at - now))


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an upload that has arrived. `etag` names its content in the store's own way, without quotes."""

    number: int
    size_bytes: int
    etag: str
