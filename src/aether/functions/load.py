"""How many requests a function had at once, second by second, and its averages over a window. Pure.

A second that nobody measured is no second without load: an average is over what was measured, and there is none when
the newest measurement is too old.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FRESH_SECS = 3.0
"""A metric that is older is missing: three that did not come."""


@dataclass(frozen=True, slots=True)
class Load:
    """Seconds, oldest first, with the average number of requests in each: those being served and those that wait."""

    seconds: tuple[tuple[int, float], ...] = ()

    def measured(self, now: float, requests: float, keep_secs: float = 60.0) -> Load:
        """With a measurement of the second that `now` is in; another one of the same second replaces it."""
        second = math.floor(now)
        kept = tuple(entry for entry in self.seconds if second - keep_secs < entry[0] < second)
        return Load((*kept, (second, requests)))

    def is_fresh(self, now: float) -> bool:
        return bool(self.seconds) and now - self.seconds[-1][0] < FRESH_SECS + 1

    def average(self, now: float, window_secs: float) -> float | None:
        """Over the last `window_secs`, as far as they were measured; None when the metric is missing."""
        if not self.is_fresh(now):
            return None
        found = [requests for second, requests in self.seconds if now - window_secs - 1 < second]
        return math.fsum(found) / len(found) if found else None
