"""Whether a cron process is due. Pure: what is known of it and the time in, what to do out.

Of the moments that passed since it was last looked at, at most the newest is run: a server that was down, or a clock
that jumped, makes up for one run and causes no storm. A clock that was set back lets moments come again; those that
are on record already are not run again (the record refuses a second run of a moment).
"""

from __future__ import annotations

from dataclasses import dataclass

from aether.model.schedule import Schedule

LATE_US = 60_000_000
"""A moment that is older than this was missed: no server looked at its time."""
SET_BACK_US = 60_000_000
"""A clock that is so far behind what was looked at last was set back."""
STILL_RUNNING = "the run before it was still under way"
MISSED = "no server looked at its time"


@dataclass(frozen=True, slots=True)
class CronState:
    """`considered` is the moment up to which everything is decided; times in microseconds since the epoch."""

    schedule: Schedule
    considered: int
    running: bool = False
    make_up: bool = True
    """Whether a moment that was missed is run late."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with the moment `scheduled_at`; None when there is none. With `skipped` it is only noted, and that
    is why."""

    considered: int
    scheduled_at: int | None = None
    skipped: str = ""


def due(state: CronState, now: int) -> Decision:
    if now < state.considered - SET_BACK_US:
        return Decision(now)
    newest = state.schedule.latest(state.considered, now)
    if newest is None:
        return Decision(state.considered)
    if now - newest > LATE_US and not state.make_up:
        return Decision(newest, newest, MISSED)
    return Decision(newest, newest, STILL_RUNNING if state.running else "")


def following(state: CronState, now: int) -> int | None:
    """The next moment to look at it."""
    return state.schedule.following(max(state.considered, now))
