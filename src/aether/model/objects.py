"""What an object store hands out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """A request that a client may make without a token until `expires_at` (seconds since the epoch)."""

    method: str
    url: str
    headers: Mapping[str, str]
    expires_at: int
