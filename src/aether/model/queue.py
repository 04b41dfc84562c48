"""The queue port: jobs that one of many consumers does, at least once; drivers in `aether.stores.queue`.

The life of a message is that of an entry of a Redis stream with one consumer group, so that a driver for it adds no
meaning of its own: it waits, is delivered to a consumer for a time (`Limits.visibility_secs`), and is acknowledged,
or claimed by another consumer when that time is over. After `Limits.max_deliveries` it becomes a dead letter. A
message may be delivered twice, and a consumer that was overtaken finds out when it extends or acknowledges: so what a
job does must bear being begun again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from aether.model.errors import BadRequest, PayloadTooLarge

MAX_BODY_BYTES = 256 * 1024
MAX_NAME_CHARS = 200
MAX_REASON_CHARS = 2000
MAX_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class Limits:
    """Of every topic of a queue; all that use the queue must agree on them."""

    visibility_secs: float = 30.0
    """How long a delivery is its consumer's before others may claim it."""
    max_deliveries: int = 5
    max_length: int = 10_000
    """Messages of a topic that wait or are taken."""
    max_dead: int = 1000
    """Dead letters of a topic; the oldest make room for new ones."""


@dataclass(frozen=True, slots=True)
class Message:
    id: str
    """Unique for ever within the queue; means nothing else."""
    topic: str
    body: bytes
    dedupe: str
    enqueued_at: int
    """Microseconds since the epoch, for people."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message in the hands of `consumer`. `number` counts its deliveries, this one included, and tells this one
    from others of the same message."""

    message: Message
    consumer: str
    number: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    message: Message
    reason: str
    deliveries: int
    consumer: str
    """Who had it last."""
    died_at: int
    """Microseconds since the epoch, for people."""


class Enqueued(NamedTuple):
    id: str
    duplicate: bool
    """A message with this dedupe key is waiting or taken already; `id` is that one's."""


@dataclass(frozen=True, slots=True)
class Lengths:
    waiting: int
    taken: int
    dead: int


class Queue(Protocol):
    """Every method raises ServiceUnavailable when the queue does not answer in time; whether something was changed is
    then unknown."""

    @property
    def limits(self) -> Limits: ...

    async def enqueue(self, topic: str, body: bytes, *, dedupe: str = "") -> Enqueued:
        """Add a message behind all others. With a dedupe key nothing is added while one with the same key waits or is
        taken; the key is free again once that is acknowledged or a dead letter.

        Raises QueueFull, PayloadTooLarge and BadRequest.
        """
        ...

    async def take(self, topic: str, consumer: str, *, limit: int = 1, wait_secs: float = 0.0) -> Sequence[Delivery]:
        """Up to `limit` messages that nobody has taken before, the oldest first; empty when none came within
        `wait_secs`. Cancelled, it gives back what it took. What others took and left is had by `claim_stale`."""
        ...

    async def claim_stale(self, topic: str, consumer: str, *, limit: int = 1) -> Sequence[Delivery]:
        """Take over deliveries whose time is over, the oldest first. Those that were delivered `max_deliveries` times
        become dead letters instead."""
        ...

    async def extend(self, delivery: Delivery) -> None:
        """Begin the delivery's time anew. Raises DeliveryLost: then stop the work, another consumer has it."""
        ...

    async def acknowledge(self, delivery: Delivery) -> bool:
        """The work is done. False when the message was not this delivery's any more, and nothing changed."""
        ...

    async def give_back(self, delivery: Delivery) -> bool:
        """Let others claim it now. False when the message was not this delivery's any more."""
        ...

    async def bury(self, delivery: Delivery, reason: str) -> bool:
        """Make it a dead letter now: work that can never succeed. False when the message was not this delivery's any
        more."""
        ...

    async def forfeit(self, topic: str, consumer: str) -> int:
        """Let others claim now what a consumer has that is known to be dead; returns how many."""
        ...

    async def dead(self, topic: str, *, after: str = "", limit: int = 100) -> Sequence[DeadLetter]:
        """Dead letters by age of their messages, those behind the id `after`."""
        ...

    async def redrive(self, topic: str, message_id: str) -> Enqueued:
        """Enqueue the message of a dead letter anew, under a new id, as if it had never been delivered; where its
        dedupe key is in use the letter just goes. Raises NotFound and QueueFull, and leaves the letter then."""
        ...

    async def discard(self, topic: str, message_id: str) -> bool:
        """Forget a dead letter; False when there is none."""
        ...

    async def lengths(self, topic: str) -> Lengths: ...


# --- what may be asked of any driver


def check_name(name: str, what: str) -> None:
    """Raises BadRequest."""
    if not name:
        raise BadRequest(f"the {what} must not be empty")
    check_dedupe(name, what)


def check_dedupe(key: str, what: str = "dedupe key") -> None:
    """Raises BadRequest."""
    if len(key) > MAX_NAME_CHARS or not key.isprintable():
        raise BadRequest(f"a {what} has at most {MAX_NAME_CHARS} characters, all of them printable")


def check_body(body: bytes) -> None:
    """Raises PayloadTooLarge."""
    if len(body) > MAX_BODY_BYTES:
        raise PayloadTooLarge(f"the message has {len(body)} bytes; {MAX_BODY_BYTES} are the limit")


def check_limit(limit: int) -> None:
    """Raises BadRequest."""
    if not 1 <= limit <= MAX_AT_ONCE:
        raise BadRequest(f"between 1 and {MAX_AT_ONCE} can be had at once")
