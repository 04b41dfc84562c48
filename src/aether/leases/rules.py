"""When the holder of a lease renews it or stops acting, and when another server may claim it. Pure.

Safe whatever the wall clocks do: no time of one machine is compared with a time of another. The holder counts from
before it sent its newest renewal, an observer from after it first saw that renewal, each on its own clock, which
never jumps; it was sent before it was seen, so the holder's count is the longer one. The holder stops at two thirds
of the lease, the observer waits for all of it: the difference is what an effect that was begun in time may take.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

RENEW_AFTER = 1 / 3
FENCE_AFTER = 2 / 3


class Step(StrEnum):
    HOLD = "hold"
    """Act; nothing else is due."""
    RENEW = "renew"
    """Act, and renew the lease."""
    FENCE = "fence"
    """Another server may soon act: do nothing before the lease is renewed."""
    CLAIM = "claim"
    WAIT = "wait"
    """Somebody else acts."""


@dataclass(frozen=True, slots=True)
class Held:
    """A lease as its holder knows it; `sent_at` is the holder's clock before the newest renewal was sent."""

    sent_at: float
    ttl: float


@dataclass(frozen=True, slots=True)
class Seen:
    """A lease of another server; `since` is the observer's clock after it first saw this epoch and renewal."""

    epoch: int
    renewals: int
    ttl: float
    since: float


def of_holder(held: Held, now: float) -> Step:
    age = now - held.sent_at
    if age >= held.ttl * FENCE_AFTER:
        return Step.FENCE
    return Step.RENEW if age >= held.ttl * RENEW_AFTER else Step.HOLD


def of_observer(seen: Seen, now: float) -> Step:
    return Step.CLAIM if now - seen.since >= seen.ttl else Step.WAIT


def look(before: Seen | None, epoch: int, renewals: int, ttl: float, now: float) -> Seen:
    """What an observer knows after it read a lease; a renewal or another holder starts its wait anew."""
    if before is not None and (before.epoch, before.renewals) == (epoch, renewals):
        return before
    return Seen(epoch, renewals, ttl, now)
