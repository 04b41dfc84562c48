"""How traffic moves to a new release in steps, and whether what it has answered lets it have more. Pure.

A step ends when enough was answered well, or when its time is over and nothing was bad: an app without visitors is
not held up. An error rate is judged as soon as it cannot come out well any more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from typing import Any

from aether.model.errors import BadRequest
from aether.model.traffic import Traffic
from aether.rollout.machine import Reason, Strategy

LATENCY_NOISE_SECS = 0.005
"""A difference below this is never held against a release."""
MAX_STEPS = 20
MAX_STEP_SECS = 3600.0


@dataclass(frozen=True, slots=True)
class Shift:
    """`steps` are percentages of the requests, rising to 100; `step_secs` the longest that one lasts."""

    steps: tuple[int, ...] = (1, 5, 25, 50, 100)
    step_secs: float = 30.0
    bake_secs: float = 30.0
    """How long a bluegreen rollout can still switch back."""
    min_requests: int = 100
    """Answers of the new release that a step needs to end before its time."""
    max_error_rate: float = 0.01
    max_latency_ratio: float = 1.5
    """Against the old release's mean."""
    early: bool = True
    """Whether a step may end before its time."""

    def for_strategy(self, strategy: Strategy) -> Shift | None:
        """What applies to a strategy: bluegreen is one step, to everything, of a fixed time."""
        if strategy is Strategy.CANARY:
            return self
        if strategy is Strategy.BLUEGREEN:
            return replace(self, steps=(100,), step_secs=self.bake_secs, early=False)
        return None

    @property
    def total_secs(self) -> float:
        return self.step_secs * len(self.steps)

    def to_json(self) -> str:
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(values, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Shift:
        values: dict[str, Any] = json.loads(text)
        if "steps" in values:
            values["steps"] = tuple(values["steps"])
        return Shift(**values)


def check_shift(shift: Shift) -> None:
    """Raise BadRequest naming the field that is wrong."""
    steps = shift.steps
    rising = all(a < b for a, b in pairwise(steps))
    if not steps or len(steps) > MAX_STEPS or steps[0] < 1 or steps[-1] != 100 or not rising:
        raise BadRequest(
            f"rollout.steps must rise from at least 1 to 100 in at most {MAX_STEPS} steps", {"field": "rollout.steps"}
        )
    for name, low, high in (
        ("step_secs", 1, MAX_STEP_SECS),
        ("bake_secs", 1, MAX_STEP_SECS),
        ("min_requests", 1, 1_000_000),
        ("max_error_rate", 0, 1),
        ("max_latency_ratio", 1, 1000),
    ):
        if not low <= getattr(shift, name) <= high:
            raise BadRequest(f"rollout.{name} must be {low:g} to {high:g}", {"field": f"rollout.{name}"})


class Verdict(Enum):
    WAIT = "wait"
    GOOD = "good"


def judge(shift: Shift, new: Traffic, old: Traffic) -> Verdict | Reason:
    """Judge a step by what the new release answered in it and the old one since the first; a Reason is a refusal.

    A release that fails no more often than the one it replaces is not refused for it."""
    enough = shift.min_requests
    allowed = shift.max_error_rate
    if old.answers >= enough:
        allowed = max(allowed, old.error_rate)
    # at least `enough` answers are looked at: so many errors are too many however the missing ones come out
    if new.errors > allowed * max(new.answers, enough):
        return Reason(
            "error_rate",
            f"{new.errors} of {new.answers} answers of the new release were errors ({new.error_rate:.1%}); "
            f"{allowed:.1%} are allowed",
        )
    if new.answers < enough:
        return Verdict.WAIT
    slower = new.latency - old.latency
    if old.answers and slower > LATENCY_NOISE_SECS and new.latency > shift.max_latency_ratio * old.latency:
        return Reason(
            "latency",
            f"the new release takes {new.latency * 1000:.1f} ms to answer, the old one {old.latency * 1000:.1f} ms; "
            f"{shift.max_latency_ratio:g} times that is allowed",
        )
    return Verdict.GOOD if shift.early else Verdict.WAIT


def told(new: Traffic, old: Traffic) -> str:
    """What was counted, in words."""
    if not new.answers:
        return "no requests"
    compared = f", the old one {old.latency * 1000:.1f} ms" if old.answers else ""
    return f"{new.answers} answers, {new.errors} errors; the new release takes {new.latency * 1000:.1f} ms{compared}"
