"""How many instances a function has: `decide(state, now)` says what to start and what to drain. Pure.

The rules are those of Knative's autoscaler (KPA), with the idle rules of the function platform that Aether follows.
Wanted is the average number of requests at once (served and waiting) over the target per instance, rounded up, over a
stable window and over a panic window:

- Up at once for callers who wait: one wave of starts for all of them, and what is starting already counts.
- Up to what both windows want; in panic (the panic window wants at least twice what there is) to what the panic
  window wants. Old load alone never starts anything.
- Down to the most that was wanted within the last `idle_secs`, at most half at a tick, and never in panic. An
  instance that is idle for so long goes in any case while others remain; the last one of a function without a minimum
  after `last_idle_secs`.
- A metric that is missing holds the last size.

An instance is never stopped from here: what drains still finishes its requests (`aether.functions.instance_state`).
Instances that drain count neither as capacity nor against the maximum, so that a change of code can replace all of
them; those of old code serve until as many of the new are ready.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from aether.functions.backoff import Backoff
from aether.functions.load import Load

TICK_SECS = 1.0
_ROUNDING = 1e-6
"""An average that is a hair above what the instances bear is the arithmetic's, not a caller's."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Of one function. Times are seconds."""

    concurrency: int = 10
    """Requests that one instance serves at once; no caller is ever given to a fuller one."""
    target: float = 3.0
    """Requests that one instance should have on average."""
    min_instances: int = 0
    max_instances: int = 10
    stable_secs: float = 60.0
    panic_secs: float = 6.0
    panic_ratio: float = 2.0
    idle_secs: float = 30.0
    last_idle_secs: float = 300.0

    @property
    def per_instance(self) -> float:
        return min(self.target, float(self.concurrency))


class Phase(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    """On its way out, however far."""


@dataclass(frozen=True, slots=True)
class InstanceView:
    id: str
    phase: Phase
    in_flight: int = 0
    idle_since: float | None = None
    """Since when it has had no request; None while it has one."""
    outdated: bool = False
    """It runs code, variables or a runtime that the function has no more."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What one tick tells the next."""

    size: int = 0
    """Instances that were wanted at last."""
    panicked_at: float | None = None
    """When there was last reason to panic."""
    wanted: tuple[tuple[float, int], ...] = ()
    """The highest wants of the last `idle_secs`, oldest and highest first: each with its time."""


@dataclass(frozen=True, slots=True)
class State:
    rules: Rules
    instances: Sequence[InstanceView] = ()
    waiting: int = 0
    """Callers in the buffers of all gateways now."""
    load: Load = field(default_factory=Load)
    backoff: Backoff = field(default_factory=Backoff)
    memory: Memory = field(default_factory=Memory)


@dataclass(frozen=True, slots=True)
class Start:
    """Ask for so many instances, as one wave."""

    count: int


@dataclass(frozen=True, slots=True)
class Drain:
    id: str


@dataclass(frozen=True, slots=True)
class Decision:
    actions: tuple[Start | Drain, ...]
    memory: Memory
    in_panic: bool = False
    backing_off: bool = False
    """More instances are wanted, and not started because the last ones failed."""


def wave(waiting: int, free: int, starting: int, concurrency: int) -> int:
    """How many more instances callers who wait need: one wave for all of them, whatever their number.

    `free` is how many of them ready instances can take, `starting` what has been asked for and is not ready yet."""
    return max(0, math.ceil(max(0, waiting - free) / concurrency) - starting)


def decide(state: State, now: float) -> Decision:
    """`now` is a clock that never jumps, the one of all times in `state`."""
    rules = state.rules
    fresh = [it for it in state.instances if it.phase is not Phase.DRAINING and not it.outdated]
    starting = sum(it.phase is Phase.STARTING for it in fresh)
    seen = _look(state, now, len(fresh))

    size = _clamped(seen.up, rules)
    size = max(size, min(rules.max_instances, len(fresh) + _called_for(state, fresh, starting)))
    needed = max(0, size - len(fresh))
    allowed = state.backoff.most_starts(now, starting)
    starts = needed if allowed is None else min(needed, allowed)

    leaving = _leaving(state, now, fresh, seen) if not needed else []
    leaving += _replaced(state, fresh, size)
    actions: list[Start | Drain] = [Start(starts)] if starts else []
    actions += [Drain(it.id) for it in leaving]
    left = len(fresh) - sum(not it.outdated for it in leaving)
    held = seen.memory.size if seen.missing else 0
    memory = replace(seen.memory, size=max(held, left, size if needed else 0))
    return Decision(tuple(actions), memory, seen.in_panic, starts < needed)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the load says. `up` is the least size, `down` the size to come down to, `recent` what is wanted now."""

    up: int
    down: int
    recent: int
    memory: Memory
    in_panic: bool = False
    missing: bool = False


def _look(state: State, now: float, current: int) -> _Seen:
    ready = sum(it.phase is Phase.READY for it in state.instances)
    rules, memory = state.rules, state.memory
    stable, recent = (_wanted(state, now, secs) for secs in (rules.stable_secs, rules.panic_secs))
    if stable is None or recent is None:
        held = max(memory.size, current)
        return _Seen(memory.size, held, held, memory, missing=True)
    if recent >= rules.panic_ratio * max(1, ready):
        memory = replace(memory, panicked_at=now)
    in_panic = memory.panicked_at is not None and now - memory.panicked_at < rules.stable_secs
    if not in_panic:
        memory = replace(memory, panicked_at=None)
    memory = replace(memory, wanted=_with(memory.wanted, now, max(stable, recent), rules.idle_secs))
    up = max(recent, current) if in_panic else min(stable, recent)
    return _Seen(up, max(want for _, want in memory.wanted), recent, memory, in_panic)


def _wanted(state: State, now: float, window_secs: float) -> int | None:
    average = state.load.average(now, window_secs)
    return None if average is None else math.ceil(average / state.rules.per_instance - _ROUNDING)


def _with(
    wanted: tuple[tuple[float, int], ...], now: float, want: int, keep_secs: float
) -> tuple[tuple[float, int], ...]:
    kept = tuple((at, other) for at, other in wanted if now - at < keep_secs and other > want)
    return (*kept, (now, want))


def _called_for(state: State, fresh: Sequence[InstanceView], starting: int) -> int:
    """The wave for callers who wait; instances of old code serve them, too."""
    concurrency = state.rules.concurrency
    ready = [it for it in state.instances if it.phase is Phase.READY]
    free = sum(max(0, concurrency - it.in_flight) for it in ready)
    return wave(state.waiting, free, starting, concurrency)


def _leaving(state: State, now: float, fresh: Sequence[InstanceView], seen: _Seen) -> list[InstanceView]:
    """Those that load or idleness let go; what is starting goes first, then the longest idle, then the least busy."""
    rules = state.rules
    if seen.in_panic or seen.missing or state.waiting:
        return []
    order = sorted(
        fresh,
        key=lambda it: (
            it.phase is not Phase.STARTING, it.in_flight, now if it.idle_since is None else it.idle_since, it.id,
        ),
    )  # fmt: skip
    if len(fresh) == 1:
        last = fresh[0]
        goes = not rules.min_instances and not seen.recent and _idle(last, now, rules.last_idle_secs)
        return [last] if goes else []
    floor = max(rules.min_instances, 1)
    by_load = len(fresh) - min(max(seen.down, floor), rules.max_instances)
    idle = sum(_idle(it, now, rules.idle_secs) for it in fresh)
    by_idleness = min(idle, len(fresh) - max(seen.recent, floor))
    return order[: max(0, min(max(by_load, by_idleness), len(fresh) // 2))]


def _idle(it: InstanceView, now: float, secs: float) -> bool:
    return it.phase is Phase.READY and not it.in_flight and it.idle_since is not None and now - it.idle_since > secs


def _replaced(state: State, fresh: Sequence[InstanceView], size: int) -> list[InstanceView]:
    """Instances of old code, as far as those of the new can serve in their place; those still starting at once."""
    old = [it for it in state.instances if it.outdated and it.phase is not Phase.DRAINING]
    serving = sorted((it for it in old if it.phase is Phase.READY), key=lambda it: (it.in_flight, it.id))
    ready = sum(it.phase is Phase.READY for it in fresh)
    spare = max(0, ready + len(serving) - max(size, len(fresh)))
    return [it for it in old if it.phase is Phase.STARTING] + serving[:spare]


def _clamped(size: int, rules: Rules) -> int:
    return min(max(size, rules.min_instances), rules.max_instances)
