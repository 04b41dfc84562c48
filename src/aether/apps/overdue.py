"""What the database could not be told of instances while it was away, told as soon as it is back.

What runs matters more than its record, so nobody waits for it; but other servers route by the record, and people read
it. Of each instance only the newest status is owed.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog
from sqlalchemy.exc import IntegrityError

from aether.apps.ledger import DATABASE_PAUSE_SECS, Ledger
from aether.apps.tasks import Tasks
from aether.leases import Lease, LeaseLost
from aether.model.errors import AetherError, ServiceUnavailable

_log = structlog.stdlib.get_logger("aether.apps")


@dataclass(frozen=True, slots=True)
class Unrecorded:
    """An instance that was started without a record."""

    deployment_id: str
    restarts: int
    process: str


@dataclass(frozen=True, slots=True)
class _Owed:
    lease: Lease
    app_id: str
    status: str
    unrecorded: Unrecorded | None


class Overdue:
    def __init__(self, ledger: Ledger, tasks: Tasks) -> None:
        self._ledger = ledger
        self._tasks = tasks
        self._owed: dict[str, _Owed] = {}
        self._telling: asyncio.Task[None] | None = None

    async def record(self, lease: Lease, app_id: str, instance_id: str, status: str) -> None:
        """Record the status, now or as soon as the database can be told. Raises LeaseLost when that is known now."""
        if (before := self._owed.get(instance_id)) is None:
            try:
                await self._ledger.set_instances(lease, app_id, [instance_id], status)
                return
            except ServiceUnavailable as error:
                _log.warning("an instance's status is recorded later", instance=instance_id, error=error.message)
            except AetherError as error:
                _log.warning("an instance's status was not recorded", instance=instance_id, error=error.message)
                return
        self._owe(instance_id, _Owed(lease, app_id, status, before and before.unrecorded))

    def started(self, lease: Lease, app_id: str, instance_id: str, unrecorded: Unrecorded) -> None:
        """An instance is about to start of which the database could not be told."""
        self._owe(instance_id, _Owed(lease, app_id, "starting", unrecorded))

    def _owe(self, instance_id: str, owed: _Owed) -> None:
        self._owed[instance_id] = owed
        if self._telling is None or self._telling.done():
            self._telling = self._tasks.start(self._tell(), "statuses of instances")

    async def _tell(self) -> None:
        while self._owed:
            await asyncio.sleep(DATABASE_PAUSE_SECS)
            for instance_id, owed in list(self._owed.items()):
                try:
                    await self._tell_one(instance_id, owed)
                except ServiceUnavailable:
                    break
                except LeaseLost:
                    pass  # whoever runs the app now records what it finds
                except (AetherError, IntegrityError) as error:
                    _log.warning("an instance's status was not recorded", instance=instance_id, error=str(error))
                if self._owed[instance_id] is owed:
                    del self._owed[instance_id]

    async def _tell_one(self, instance_id: str, owed: _Owed) -> None:
        if (new := owed.unrecorded) is not None:
            await self._ledger.add_instance(
                owed.lease, instance_id, owed.app_id, new.deployment_id, new.restarts, new.process
            )
        await self._ledger.set_instances(owed.lease, owed.app_id, [instance_id], owed.status)
