"""How long a function whose instances keep failing is left alone. Pure.

An instance that ends by itself before it has run well is a failure; each one doubles the pause before the next start,
up to a cap. After the pause one instance is tried at a time. One that runs well for a while ends it.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_SECS = 1.0
CAP_SECS = 300.0
GOOD_RUN_SECS = 60.0


@dataclass(frozen=True, slots=True)
class Backoff:
    failures: int = 0
    """In a row."""
    until: float = 0.0
    """No instance is started before."""

    def failed(self, now: float) -> Backoff:
        """Failures of instances that were started together count once: the pause of the first covers them all."""
        if now < self.until:
            return self
        pause = min(CAP_SECS, FIRST_SECS * 2 ** min(self.failures, 60))
        return Backoff(self.failures + 1, now + pause)

    def ran(self, secs: float) -> Backoff:
        """An instance has run for so long, and still does or was stopped by us."""
        return Backoff() if secs >= GOOD_RUN_SECS else self

    def most_starts(self, now: float, starting: int) -> int | None:
        """How many instances may be started now; None for any number."""
        if not self.failures:
            return None
        return 0 if now < self.until or starting else 1
