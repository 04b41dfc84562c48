"""What is recorded of a host's certificate; the certificate itself is in a file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CertificateRow:
    """`source` is given or acme. Without a fingerprint there is none yet. Times are microseconds since the epoch."""

    host: str
    source: str
    issuer: str | None
    fingerprint: str | None
    not_before: int | None
    not_after: int | None
    failures: int
    """Attempts to get one that failed in a row."""
    next_attempt_at: int | None
    """Not to be tried again before; an attempt under way counts as failed until it has succeeded."""
    problem: str | None
