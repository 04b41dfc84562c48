"""The client's own messages on stderr, by `--log-level` and `--log-format`; cheaper to load than `logging`."""

from __future__ import annotations

import sys

from aether.cli.output import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_LEVELS = {"trace": 0, "debug": 1, "info": 2, "warn": 3, "error": 4}


class Log:
    """Writes messages of `level` and above. Format `auto` is text: the reader of a command is a person."""

    def __init__(self, level: str = "info", log_format: str = "auto") -> None:
        self.level = level
        self.format = log_format
        self._least = _LEVELS[level]
        self.sink: Callable[[str], None] | None = None
        """Takes the lines while something is drawn on the terminal that plain writing would tear apart."""

    def shows(self, level: str) -> bool:
        return _LEVELS[level] >= self._least

    def debug(self, message: str, **fields: object) -> None:
        self.write("debug", message, fields)

    def info(self, message: str, **fields: object) -> None:
        self.write("info", message, fields)

    def warn(self, message: str, **fields: object) -> None:
        self.write("warn", message, fields)

    def write(self, level: str, message: str, fields: dict[str, object]) -> None:
        if not self.shows(level):
            return
        if self.format == "json":
            import json

            from aether.model.times import now_us, to_iso

            line = json.dumps({"time": to_iso(now_us()), "level": level, "message": message, **fields}, default=str)
        else:
            mark = {"warn": "warning: ", "error": "error: "}.get(level, "")
            line = escape(mark + message + "".join(f" {name}={value}" for name, value in fields.items()), keep="\n")
        self.line(line)

    def line(self, text: str) -> None:
        """A line of its own on stderr, whatever the level: part of what a command has to say."""
        if self.sink is not None:
            self.sink(text)
            return
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
