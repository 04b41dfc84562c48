"""Time as the server keeps and shows it: microseconds since the epoch inside, ISO-8601 UTC outside."""

import time
from datetime import UTC, datetime, timedelta

from aether.model.errors import BadRequest

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def now_us() -> int:
    """The present moment in microseconds since the epoch."""
    return time.time_ns() // 1000


def to_iso(us: int) -> str:
    """`us` as `2026-01-02T03:04:05.000006Z`, always with six digits so that texts sort as times do."""
    return (_EPOCH + timedelta(microseconds=us)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def to_iso_or_none(us: int | None) -> str | None:
    return None if us is None else to_iso(us)


def from_iso(text: str) -> int:
    """Microseconds since the epoch of an ISO-8601 time; a time without offset is UTC. Raises BadRequest."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise BadRequest(f"'{text}' is not an ISO-8601 time") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // timedelta(microseconds=1)
