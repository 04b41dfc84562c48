"""How each phase is recognised from outside, and how long it may be until the strike.

A phase has begun when the record, a file or a process says so (an API client also tells which request it is sending).
The strike comes a part of the phase's length later; the lengths are measured when a series begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from support.faults.cells import Phase
from support.faults.operations import Operation
from support.faults.world import World

REACH_SECS = 15.0
_LOOK_SECS = 0.001


@dataclass
class Lengths:
    """Of phases, in seconds, on this machine at this moment."""

    create: float = 0.01
    verifying: float = 0.02
    starting: float = 0.08
    to_active: float = 0.2
    """From the instance's start to the promotion, for an app that is up at once."""
    rollout: float = 0.3
    """From the request to the promotion."""


@dataclass(frozen=True)
class Timing:
    """What a phase needs: how slow the app starts and stops, a request under way, canary steps; and its length."""

    delay_ms: int = 0
    stop_ms: int = 0
    slow_ms: int = 0
    """How long a request to the old release takes that is sent before the change."""
    canary: bool = False
    large: bool = False
    """The artifact is large enough for its upload and its hashing to take a while."""
    length: Callable[[Lengths], float] = lambda _: 0.0


TIMINGS: dict[Phase, Timing] = {
    Phase.PRESIGN: Timing(large=True, length=lambda _: 0.02),
    Phase.PUT: Timing(large=True, length=lambda _: 0.05),
    Phase.COMPLETE: Timing(large=True, length=lambda _: 0.03),
    Phase.CREATE: Timing(length=lambda t: t.create),
    Phase.VERIFYING: Timing(large=True, length=lambda t: t.verifying),
    Phase.STARTING: Timing(length=lambda t: t.starting),
    Phase.GATE: Timing(delay_ms=350, length=lambda _: 0.3),
    Phase.CANARY: Timing(canary=True, length=lambda _: 0.3),
    Phase.PROMOTE: Timing(length=lambda t: 1.3 * t.to_active),
    Phase.DRAIN: Timing(slow_ms=700, length=lambda _: 0.25),
    Phase.STOP: Timing(stop_ms=400, length=lambda _: 0.35),
    Phase.SCALE: Timing(stop_ms=100, length=lambda t: t.rollout),
    Phase.ROLLBACK: Timing(stop_ms=100, length=lambda t: 1.2 * t.rollout),
    Phase.CONFIG: Timing(stop_ms=100, length=lambda t: 1.2 * t.rollout),
    Phase.DELETE: Timing(stop_ms=100, length=lambda t: t.rollout),
}


class Watch:
    """Looks at one app until a phase of the operation has begun."""

    def __init__(self, world: World, app_id: str, operation: Operation, *, step: int) -> None:
        self._world, self._app_id, self._operation, self._step = world, app_id, operation, step
        self._uploads = len(world.rows("SELECT id FROM uploads WHERE app_id = ?", app_id))
        self._known = {row["id"] for row in world.rows("SELECT id FROM deployments WHERE app_id = ?", app_id)}

    def until(self, phase: Phase) -> bool:
        """False when the operation ended without the phase being seen: it was over too soon."""
        deadline = time.monotonic() + REACH_SECS
        while not self._reached(phase):
            if not self._operation.alive():
                return self._reached(phase)
            if time.monotonic() > deadline:
                raise AssertionError(f"the phase '{phase}' did not come in {REACH_SECS} s")
            time.sleep(_LOOK_SECS)
        return True

    def new_deployment(self) -> dict[str, object] | None:
        found = self._world.rows(
            "SELECT * FROM deployments WHERE app_id = ? ORDER BY created_at DESC, id DESC LIMIT 1", self._app_id
        )
        return found[0] if found and found[0]["id"] not in self._known else None

    def _reached(self, phase: Phase) -> bool:
        sending = self._operation.sending
        match phase:
            case Phase.PRESIGN:
                return sending["presign"].is_set() or self._count_uploads() > self._uploads
            case Phase.PUT:
                return sending["put"].is_set() or any((self._world.data / "objects" / ".parts").glob("*.part"))
            case Phase.COMPLETE:
                return sending["complete"].is_set() or self._completing()
            case Phase.CREATE:
                return sending["create"].is_set() or self.new_deployment() is not None
            case Phase.SCALE | Phase.DELETE | Phase.ROLLBACK | Phase.CONFIG:
                return sending["change"].is_set() or self._changed(phase)
        deployment = self.new_deployment()
        if deployment is None:
            return False
        match phase:
            case Phase.VERIFYING:
                return deployment["status"] != "pending"
            case Phase.STARTING:
                return self._instances(str(deployment["id"])) > 0 or self._promoted(deployment)
            case Phase.GATE | Phase.PROMOTE:
                return self._contained(str(deployment["id"])) or self._promoted(deployment)
            case Phase.CANARY:
                return int(str(deployment["rollout_step"])) >= self._step or self._promoted(deployment)
            case _:
                return self._promoted(deployment)

    def _promoted(self, deployment: dict[str, object]) -> bool:
        return deployment["status"] in ("active", "superseded", "failed", "cancelled", "rolled_back")

    def _count_uploads(self) -> int:
        return len(self._world.rows("SELECT id FROM uploads WHERE app_id = ?", self._app_id))

    def _completing(self) -> bool:
        rows = self._world.rows("SELECT status FROM uploads WHERE app_id = ?", self._app_id)
        return len(rows) > self._uploads and any(row["status"] == "completing" for row in rows)

    def _changed(self, phase: Phase) -> bool:
        match phase:
            case Phase.SCALE:
                return self._world.desired(self._app_id) != 1
            case Phase.DELETE:
                rows = self._world.rows("SELECT deleting_at FROM applications WHERE id = ?", self._app_id)
                return not rows or rows[0]["deleting_at"] is not None
            case _:
                return self.new_deployment() is not None

    def _instances(self, deployment_id: str) -> int:
        return len(self._world.rows("SELECT id FROM instances WHERE deployment_id = ?", deployment_id))

    def _contained(self, deployment_id: str) -> bool:
        return any(one.init is not None for one in self._world.look() if one.deployment == deployment_id)
