"""When a host's certificate is due from the certificate authority, and when a pending host is looked at again; pure.

    no certificate           at once, or when the pause after the last failure is over
    one from the authority   after two thirds of its life, less a part that differs from host to host
    one of the owner's own   never

Pauses double from a minute to a day. An attempt is recorded as failed before it begins, so that a server that dies in
the middle of it pauses as well and can run into no limit of the authority.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from aether.hosts.names import is_reserved
from aether.model.certificates import CertificateRow

MINUTE_US = 60_000_000
DAY_US = 1440 * MINUTE_US
HOUR_US = 60 * MINUTE_US
CHECKED_FOR_US = 7 * DAY_US
"""How long after its claim a pending host is looked at without being asked."""
_LONGEST_CHECK_PAUSE_US = 6 * HOUR_US
_SPREAD = 20
"""Renewals are spread over one part in so many of a certificate's life."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`due` in the order of their time; `next_at` is when the next of the others is."""

    due: tuple[str, ...]
    next_at: int | None


def plan(hosts: Iterable[str], known: Mapping[str, CertificateRow], now: int) -> Plan:
    """What to order now for these verified hosts. Times are microseconds since the epoch."""
    times = {host: due_at(host, known.get(host)) for host in hosts}
    due = sorted((at, host) for host, at in times.items() if at is not None and at <= now)
    later = [at for at in times.values() if at is not None and at > now]
    return Plan(tuple(host for _, host in due), min(later, default=None))


def due_at(host: str, row: CertificateRow | None) -> int | None:
    """None: never."""
    if is_reserved(host) or (row is not None and row.source == "given"):
        return None
    if row is None:
        return 0
    wanted = 0
    if row.not_before is not None and row.not_after is not None:
        life = row.not_after - row.not_before
        wanted = row.not_before + life * 2 // 3 - _share(host, life // _SPREAD)
    return max(wanted, row.next_attempt_at or 0)


def pause_us(failures: int, *, limited: bool = False) -> int:
    """How long after the last of so many failures in a row; `limited` when the authority asked for less."""
    pause = min(DAY_US, MINUTE_US << min(max(failures - 1, 0), 11))
    return max(pause, HOUR_US) if limited else pause


def next_check(created_at: int, checked_at: int | None) -> int | None:
    """When the proof of a pending host is looked for again; None: only when somebody asks.

    Each pause is as long as the claim is old, a minute at least and six hours at most: they double."""
    checked = created_at if checked_at is None else max(checked_at, created_at)
    at = checked + min(max(checked - created_at, MINUTE_US), _LONGEST_CHECK_PAUSE_US)
    return at if at <= created_at + CHECKED_FOR_US else None


def _share(host: str, most: int) -> int:
    """Always the same for a host, evenly spread over hosts."""
    return int.from_bytes(hashlib.sha256(host.encode()).digest()[:8], "big") % (most + 1)
