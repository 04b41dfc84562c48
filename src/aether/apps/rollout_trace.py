"""A deployment as one trace: a span over its whole life, and below it one for each state and step of its rollout.

The trace is the one of the request that made the deployment; it is kept with the record, and the id of the root span
follows from the deployment's, so a server that takes a rollout over goes on in the same trace.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from aether.apps.records import DeploymentRow
from aether.model.deployment import SETTLED, DeploymentStatus
from aether.observability import tracing

_T = TypeVar("_T")
_GOOD = frozenset({DeploymentStatus.ACTIVE, DeploymentStatus.SUPERSEDED})


class RolloutTrace:
    def __init__(self, row: DeploymentRow) -> None:
        self._row = row
        self._state: tracing.Span | None = None
        self._over = False

    def enter(self) -> None:
        """From now on the current task, and what it starts, works in the deployment's trace."""
        tracing.resume(self._row.trace_id, tracing.span_id_of(self._row.id))
        if self._row.status not in SETTLED and self._row.status is not DeploymentStatus.PENDING:
            self.moved(self._row.status)  # taken over from another server

    def moved(self, status: DeploymentStatus, why: str | None = None) -> None:
        """The deployment is in `status` now; `why` it failed."""
        if self._state is not None:
            self._state.end(why)
            self._state = None
        if status in SETTLED or status is DeploymentStatus.ACTIVE:
            self._end(status, why)
        else:
            self._state = tracing.begin(status.value, {"aether.deployment_id": self._row.id})

    def _end(self, status: DeploymentStatus, why: str | None) -> None:
        if self._over:
            return
        self._over = True
        row = self._row
        root = tracing.begin(
            "deployment",
            {
                "aether.app": row.app,
                "aether.deployment_id": row.id,
                "aether.artifact_digest": row.digest,
                "aether.strategy": row.strategy,
                "aether.status": status.value,
            },
            start_ns=row.created_at * 1000,
            span_id=tracing.span_id_of(row.id),
            root=True,
        )
        if root is not None:
            root.end(why or (None if status in _GOOD else status.value))


async def traced(name: str, work: Awaitable[_T], attributes: dict[str, tracing.Value]) -> _T:
    """Await `work` as one span."""
    with tracing.span(name, attributes):
        return await work
