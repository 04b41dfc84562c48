"""When a helper process that ended is started again: at once, and after longer pauses the sooner it ends again."""

from __future__ import annotations

_FIRST_SECS = 0.1
_LONGEST_SECS = 30.0
_STEADY_SECS = 60.0
"""A helper that lived this long is not held to have failed."""


class Restarts:
    """Of several helpers by name. Times are those of one clock, given by the caller."""

    def __init__(self) -> None:
        self._pause: dict[str, float] = {}
        self._begun: dict[str, float] = {}
        self._due: dict[str, float] = {}

    def begun(self, name: str, now: float) -> None:
        self._begun[name] = now

    def ended(self, name: str, now: float, at_least: float = 0.0) -> None:
        """It is due again now, or after a pause when it did not live long or has to wait `at_least` so long."""
        steady = now - self._begun.get(name, now) >= _STEADY_SECS
        pause = 0.0 if steady else self._pause.get(name, 0.0)
        self._pause[name] = min(_LONGEST_SECS, max(_FIRST_SECS, 2 * pause))
        self._due[name] = now + max(pause, at_least)

    def take(self, now: float) -> list[str]:
        """The names that are due; each is told once."""
        found = [name for name, due in self._due.items() if due <= now]
        for name in found:
            del self._due[name]
        return found

    def next(self) -> float | None:
        """When something is due next."""
        return min(self._due.values(), default=None)
