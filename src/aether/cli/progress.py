"""How far a long command is: bars on a terminal, one line for each finished phase in a pipe. Always on stderr."""

from __future__ import annotations

import sys
import time

from aether.cli.output import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from aether.cli.log import Log


def progress_for(log: Log) -> Progress:
    """Bars when stderr is a terminal and nobody asked for JSON logs or silence, else lines."""
    if sys.stderr.isatty() and log.format != "json" and log.shows("info"):
        return Bars(log)
    return Progress(log)


class Progress:
    """Phases one after the other, as plain lines. Use as a context manager."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._phase = ""
        self._started = 0.0
        self._last_step = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to take down."""

    def begin(self, phase: str) -> None:
        self._phase, self._started, self._last_step = phase, time.monotonic(), ""

    def step(self, text: str) -> None:
        """Something happened within the phase."""
        if text != self._last_step:
            self._last_step = text
            self._log.info(f"{self._phase}: {text}" if self._phase else text)

    def note(self, text: str) -> None:
        """Something the user should see that belongs to no phase."""
        self._log.info(text)

    def output(self, line: str) -> None:
        """A line that a tool of the phase printed."""
        self._log.debug(f"{self._phase}: {line}")

    def advance(self, done: int, total: int) -> None:
        """Units of the phase; a pipe gets no line for each."""

    def end(self, text: str) -> float:
        """Finish the phase; returns its milliseconds."""
        took = time.monotonic() - self._started
        self._log.info(f"{self._phase}: {text} ({took:.1f} s)")
        return took * 1000


class Bars(Progress):
    """The same on a terminal, drawn by rich. Lines from tools show under `--log-level debug`."""

    def __init__(self, log: Log) -> None:
        super().__init__(log)
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._bars: RichProgress = RichProgress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        self._bars.start()
        self._log.sink = self._above
        return self

    def __exit__(self, *_: object) -> None:
        self._log.sink = None
        self._bars.stop()

    def _above(self, line: str) -> None:
        """A finished line above the bars: written past rich, it would be overdrawn by their next frame."""
        self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def begin(self, phase: str) -> None:
        super().begin(phase)
        self._task = self._bars.add_task(phase, total=None, text="")

    def note(self, text: str) -> None:
        self._above(escape(text))

    def step(self, text: str) -> None:
        if self._task is None:
            self.note(text)
        else:
            self._bars.update(self._task, text=escape(text))

    def output(self, line: str) -> None:
        if self._log.shows("debug"):
            self._bars.console.print(f"  {escape(line)}", markup=False, highlight=False, style="dim")
        elif self._task is not None:
            self._bars.update(self._task, text=escape(line)[:60])

    def advance(self, done: int, total: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=max(total, 1))

    def end(self, text: str) -> float:
        if self._task is not None:
            self._bars.update(self._task, completed=1, total=1, text=escape(text))
            self._task = None
        return (time.monotonic() - self._started) * 1000
