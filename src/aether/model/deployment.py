"""States of a deployment and the moves between them.

    pending → verifying → rolling_out → active → superseded
                                      ↘ rolling_back → rolled_back
    pending | verifying | rolling_out → failed | cancelled
    rolling_back → failed | cancelled

A move outside the table is a programming error and is refused before anything is written.
"""

from enum import StrEnum

from aether.model.errors import Conflict


class DeploymentStatus(StrEnum):
    PENDING = "pending"
    VERIFYING = "verifying"
    ROLLING_OUT = "rolling_out"
    ACTIVE = "active"
    FAILED = "failed"
    CANCELLED = "cancelled"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    SUPERSEDED = "superseded"


_S = DeploymentStatus

MOVES: dict[DeploymentStatus, frozenset[DeploymentStatus]] = {
    _S.PENDING: frozenset({_S.VERIFYING, _S.FAILED, _S.CANCELLED}),
    _S.VERIFYING: frozenset({_S.ROLLING_OUT, _S.FAILED, _S.CANCELLED}),
    _S.ROLLING_OUT: frozenset({_S.ACTIVE, _S.FAILED, _S.CANCELLED, _S.ROLLING_BACK}),
    _S.ROLLING_BACK: frozenset({_S.ROLLED_BACK, _S.FAILED, _S.CANCELLED}),
    _S.ACTIVE: frozenset({_S.SUPERSEDED}),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
    _S.ROLLED_BACK: frozenset(),
    _S.SUPERSEDED: frozenset(),
}

UNDER_WAY = frozenset({_S.PENDING, _S.VERIFYING, _S.ROLLING_OUT, _S.ROLLING_BACK})
"""States in which somebody still has work to do."""

SETTLED = frozenset(MOVES) - UNDER_WAY
"""States that a waiting client stops at."""


def check_move(before: DeploymentStatus, after: DeploymentStatus) -> None:
    """Raise Conflict unless a deployment may go from `before` to `after`."""
    if after not in MOVES[before]:
        raise Conflict(f"a deployment cannot go from {before} to {after}")
