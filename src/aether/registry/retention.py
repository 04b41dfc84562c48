"""Which artifacts nobody needs any more. Pure: rows in, ids out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from aether.model.deployment import UNDER_WAY, DeploymentStatus

RELEASES_KEPT = 5
"""The newest releases of an app keep their artifacts, whatever the number to keep: a rollback names them."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An artifact; times in microseconds since the epoch."""

    id: str
    app_id: str
    created_at: int
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Use:
    """A deployment of an artifact."""

    artifact_id: str
    app_id: str
    status: DeploymentStatus
    release: int | None


def needed(uses: Sequence[Use]) -> set[str]:
    """Artifacts that a deployment runs, is about to run, or may be rolled back to."""
    found = {use.artifact_id for use in uses if use.status in UNDER_WAY or use.status is DeploymentStatus.ACTIVE}
    released: dict[str, list[Use]] = defaultdict(list)
    for use in uses:
        if use.release is not None:
            released[use.app_id].append(use)
    for of_app in released.values():
        newest = sorted(of_app, key=lambda use: -(use.release or 0))[:RELEASES_KEPT]
        found.update(use.artifact_id for use in newest)
    return found


def surplus(stored: Sequence[Stored], uses: Sequence[Use], *, keep: int, young_since: int) -> list[str]:
    """Ids to take away: beyond the newest `keep` of their app (0: no limit), older than `young_since`, not
    needed and not pinned.

    What is young may have been uploaded for a deployment that is only about to be asked for."""
    if not keep:
        return []
    wanted = needed(uses)
    of_app: dict[str, list[Stored]] = defaultdict(list)
    for artifact in stored:
        of_app[artifact.app_id].append(artifact)
    doomed: list[str] = []
    for artifacts in of_app.values():
        newest_first = sorted(artifacts, key=lambda artifact: (artifact.created_at, artifact.id), reverse=True)
        old = [a for a in newest_first[keep:] if a.created_at < young_since]
        doomed += [a.id for a in old if a.id not in wanted and not a.pinned]
    return sorted(doomed)
