"""What the edge must know of a custom host."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HostRule:
    """`redirect_to` is the host that its requests are sent on to."""

    app: str
    redirect_to: str | None = None
    allow_http: bool = False
    """Serve it over plain HTTP too, where requests for other hosts are sent on to HTTPS."""
    hsts_secs: int = 0
    """How long browsers are told to come back over HTTPS only; 0: not at all."""
