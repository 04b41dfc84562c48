"""Ctrl-C and SIGTERM while something is being changed on the server: held back for as long as one call takes."""

from __future__ import annotations

import contextlib
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from types import FrameType
    from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is treated as Ctrl-C: what was begun is undone first."""

    exit_code = 143


class Interrupts:
    """While entered, SIGTERM raises Terminated. From `hold` to `release` a first signal waits; a second does not.

    Only the main thread may use it.
    """

    def __init__(self) -> None:
        self._held = False
        self._waiting: KeyboardInterrupt | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            # an ignored signal (nohup, a job in the background) stays ignored
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        self._held = True

    def release(self) -> None:
        """Raises the signal that waited, if one did."""
        self._held = False
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            raise waiting

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        error = Terminated("terminated") if number == signal.SIGTERM else KeyboardInterrupt()
        if self._held and self._waiting is None:
            self._waiting = error
        else:
            raise error


@contextlib.contextmanager
def end_at_once() -> Generator[None]:
    """While entered, Ctrl-C and SIGTERM end the process as they end any program: nothing is left to be undone."""
    before: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
