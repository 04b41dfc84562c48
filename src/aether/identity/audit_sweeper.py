"""The chore that lets audit rows go when they are old."""

from __future__ import annotations

import time
from collections.abc import Callable

from aether.identity.audit import AuditLog
from aether.retention import Swept

_BATCH = 1000


class AuditSweeper:
    """The chore `audit`. `clock` returns seconds since the epoch; a `ttl_secs` of 0 keeps everything."""

    name = "audit"

    def __init__(self, audit: AuditLog, ttl_secs: float, clock: Callable[[], float] = time.time) -> None:
        self._audit = audit
        self._ttl = ttl_secs
        self._clock = clock

    async def sweep(self, *, dry_run: bool) -> Swept:
        if not self._ttl:
            return Swept()
        before = int((self._clock() - self._ttl) * 1_000_000)
        if dry_run:
            return Swept(await self._audit.count(before))
        gone = 0
        # a transaction each, so that whoever else writes gets a turn
        while dropped := await self._audit.prune(before, _BATCH):
            gone += dropped
        return Swept(gone)
