"""The life of one function instance, from its start to the moment when nothing of it is left. Pure.

    starting → serving → draining → leaving → stopping → gone
         ↘________ends by itself, or is never ready________↗

`advance` is asked again after every change and now and then: it returns the life as it is from now on and the effects
that bring it there. Nothing is remembered outside of `Life`, and every effect may be repeated without harm, so
whoever takes over a worker goes on from what is recorded.

An instance that must go gets no new requests (`DRAIN`), finishes those it has, is taken out of the registry
(`UNREGISTER`), and is stopped once every gateway has said that it sends nothing there any more: a request that a
gateway sent before it knew is served, too. Each of these steps has a time limit, so that a gateway that is gone or a
request without an end holds nobody for ever.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class Stage(StrEnum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    LEAVING = "leaving"
    """No longer in the registry; some gateways may not know yet."""
    STOPPING = "stopping"
    GONE = "gone"


class Effect(StrEnum):
    REGISTER = "register"
    DRAIN = "drain"
    """Say in the registry that it takes no new requests."""
    UNREGISTER = "unregister"
    STOP = "stop"
    KILL = "kill"
    FORGET = "forget"
    """Take away what is left on the machine: address, interface, folders."""


@dataclass(frozen=True, slots=True)
class Limits:
    """In seconds."""

    start_secs: float = 60.0
    drain_secs: float = 30.0
    acknowledge_secs: float = 5.0
    stop_secs: float = 10.0


@dataclass(frozen=True, slots=True)
class Life:
    stage: Stage
    since: float
    """When it came to this stage."""
    reason: str = ""
    """Why it failed; empty for one that was told to go, or has not failed."""
    killed: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of the instance now."""

    wanted: bool = True
    alive: bool = True
    ready: bool = False
    """It has said so, or is answering its health checks still."""
    in_flight: int = 0
    unaware: int = 0
    """Living gateways that have not acknowledged yet that it is no longer in the registry."""
    ending: str = ""
    """How it ended, when it is not alive."""


def begun(now: float) -> Life:
    return Life(Stage.STARTING, now)


def advance(life: Life, seen: Seen, now: float, limits: Limits) -> tuple[Life, tuple[Effect, ...]]:
    """One step; ask again until there are no effects."""
    if life.stage is Stage.GONE:
        return life, ()
    if not seen.alive:
        return _ended(life, seen, now)
    age = now - life.since
    match life.stage:
        case Stage.STARTING:
            if not seen.wanted:
                return replace(life, stage=Stage.STOPPING, since=now), (Effect.STOP,)
            if seen.ready:
                return replace(life, stage=Stage.SERVING, since=now), (Effect.REGISTER,)
            if age >= limits.start_secs:
                failed = f"was not ready within {limits.start_secs:g} s"
                return Life(Stage.STOPPING, now, failed, killed=True), (Effect.KILL,)
        case Stage.SERVING:
            if not seen.wanted or not seen.ready:
                failed = "" if not seen.wanted else "stopped answering its health checks"
                return Life(Stage.DRAINING, now, failed), (Effect.DRAIN,)
        case Stage.DRAINING:
            if not seen.in_flight or age >= limits.drain_secs:
                return replace(life, stage=Stage.LEAVING, since=now), (Effect.UNREGISTER,)
        case Stage.LEAVING:
            if _may_stop(seen, age, limits):
                return replace(life, stage=Stage.STOPPING, since=now), (Effect.STOP,)
        case _:
            if age >= limits.stop_secs and not life.killed:
                return replace(life, killed=True), (Effect.KILL,)
    return life, ()


def _may_stop(seen: Seen, age: float, limits: Limits) -> bool:
    if age >= limits.acknowledge_secs + limits.drain_secs:
        return True
    told = not seen.unaware or age >= limits.acknowledge_secs
    return told and not seen.in_flight


def _ended(life: Life, seen: Seen, now: float) -> tuple[Life, tuple[Effect, ...]]:
    registered = life.stage in (Stage.SERVING, Stage.DRAINING)
    meant = life.stage in (Stage.LEAVING, Stage.STOPPING) or not seen.wanted
    reason = life.reason or ("" if meant else seen.ending or "ended by itself")
    effects = (Effect.UNREGISTER, Effect.FORGET) if registered else (Effect.FORGET,)
    return Life(Stage.GONE, now, reason, life.killed), effects
