"""How much an app may have stored: a number of artifacts, and their bytes.

What counts is what is stored and not marked to go. A new artifact that does not fit first makes the app give up what
retention would take away anyway. The check that counts is made in the transaction that stores the artifact, under the
lock of the app; one without a lock before an upload only saves the bytes a journey.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.model.errors import QuotaExceeded
from aether.model.times import now_us
from aether.registry.tombstones import Doomed, Keep, bury, surplus_of
from aether.stores.database.tables import artifacts


@dataclass(frozen=True, slots=True)
class Usage:
    artifacts: int
    total_bytes: int

    def without(self, doomed: list[Doomed]) -> Usage:
        return Usage(self.artifacts - len(doomed), self.total_bytes - sum(one.size_bytes for one in doomed))


@dataclass(frozen=True, slots=True)
class Quota:
    """What each app may have; 0 is no limit."""

    artifacts: int = 0
    total_bytes: int = 0

    def refusal(self, usage: Usage, size_bytes: int) -> str | None:
        """Why one more artifact of `size_bytes` does not fit, None when it does."""
        if self.artifacts and usage.artifacts + 1 > self.artifacts:
            return (
                f"the app has {usage.artifacts} artifacts and may have {self.artifacts} "
                "(AETHER_MAX_ARTIFACTS_PER_APP)"
            )
        if self.total_bytes and usage.total_bytes + size_bytes > self.total_bytes:
            return (
                f"the app's artifacts take {usage.total_bytes} bytes; with {size_bytes} more they would take more "
                f"than {self.total_bytes} (AETHER_MAX_TOTAL_BYTES_PER_APP)"
            )
        return None


class Quotas:
    """Judges one app at a time, and has retention make room."""

    def __init__(self, quota: Quota, keep: Keep) -> None:
        self._quota = quota
        self._keep = keep

    @property
    def limited(self) -> bool:
        """Whether judging an app means counting all that it has."""
        return bool(self._quota.artifacts or self._quota.total_bytes)

    async def check(self, tx: AsyncConnection, app_id: str, size_bytes: int) -> None:
        """Raises QuotaExceeded when the artifact would not fit now."""
        if await self._refusal(tx, app_id, size_bytes) is not None:
            due = list(await surplus_of(tx, app_id, self._keep, now_us()))
            usage = (await _usage(tx, app_id)).without(due)
            self._raise(self._quota.refusal(usage, size_bytes), usage)

    async def admit(self, tx: AsyncConnection, app_id: str, size_bytes: int) -> int:
        """Make room if there must be; the caller holds the app. Returns how many artifacts were marked to go.
        Raises QuotaExceeded."""
        if await self._refusal(tx, app_id, size_bytes) is None:
            return 0
        now = now_us()
        due = await surplus_of(tx, app_id, self._keep, now, lock=True)
        usage = (await _usage(tx, app_id)).without(list(due))
        self._raise(self._quota.refusal(usage, size_bytes), usage)
        await bury(tx, due, now, "to make room for a newer one")
        return len(due)

    async def _refusal(self, tx: AsyncConnection, app_id: str, size_bytes: int) -> str | None:
        if not self.limited:
            return None
        return self._quota.refusal(await _usage(tx, app_id), size_bytes)

    def _raise(self, refusal: str | None, usage: Usage) -> None:
        if refusal is None:
            return
        raise QuotaExceeded(
            f"{refusal}; unpin or stop using old ones, or ask the operator for more",
            {"artifacts": usage.artifacts, "total_bytes": usage.total_bytes},
        )


async def _usage(tx: AsyncConnection, app_id: str) -> Usage:
    query = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(artifacts.c.size_bytes), 0))
    row = (await tx.execute(query.where(artifacts.c.app_id == app_id, artifacts.c.status == "stored"))).one()
    return Usage(int(row[0]), int(row[1]))
