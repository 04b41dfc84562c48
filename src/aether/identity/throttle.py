"""How often somebody may fail to log in: a token bucket for each user name and each address.

Every attempt takes from both buckets before any work is done, so that parallel guesses count; an attempt that
succeeds gives back what it took. Buckets live in this process: several servers allow as many times as much.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from aether.model.errors import RateLimited

MAX_BUCKETS = 20_000


class Buckets:
    """`burst` attempts at once for each key, then one every `refill_secs`."""

    def __init__(self, burst: int, refill_secs: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._refill_secs = refill_secs
        self._clock = clock
        self._full_at: dict[str, float] = {}
        """For each key the moment at which its bucket is full again; full buckets need no entry."""

    def wait_secs(self, key: str) -> float:
        """Seconds until the key's bucket holds an attempt; 0 when it does."""
        return max(0.0, self._full_at.get(key, 0.0) - self._clock() - (self._burst - 1) * self._refill_secs)

    def take(self, key: str) -> None:
        now = self._clock()
        if key not in self._full_at and len(self._full_at) >= MAX_BUCKETS:
            self._make_room(now)
        self._full_at[key] = max(now, self._full_at.get(key, 0.0)) + self._refill_secs

    def give_back(self, key: str) -> None:
        if key in self._full_at:
            self._full_at[key] -= self._refill_secs

    def _make_room(self, now: float) -> None:
        """Drop the full buckets; when there are none, the half that is nearest to full."""
        kept = {key: full_at for key, full_at in self._full_at.items() if full_at > now}
        if len(kept) >= MAX_BUCKETS:
            kept = dict(sorted(kept.items(), key=lambda item: item[1])[MAX_BUCKETS // 2 :])
        self._full_at = kept


class LoginThrottle:
    """Guards one login attempt after the other."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._names = Buckets(10, 30.0, clock)
        self._addresses = Buckets(30, 6.0, clock)

    def begin(self, name: str | None, address: str) -> None:
        """Count an attempt; a login with a token has no `name`. Raises RateLimited, and counts nothing, when there
        were too many."""
        wait = max(0.0 if name is None else self._names.wait_secs(name), self._addresses.wait_secs(address))
        if wait > 0:
            secs = math.ceil(wait)
            raise RateLimited(f"too many failed logins; try again in {secs} s", {"retry_after_secs": secs})
        if name is not None:
            self._names.take(name)
        self._addresses.take(address)

    def succeeded(self, name: str | None, address: str) -> None:
        if name is not None:
            self._names.give_back(name)
        self._addresses.give_back(address)
