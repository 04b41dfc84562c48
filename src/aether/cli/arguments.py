"""Command lines: an argparse parser that fails as the rest of the product does and can tell its own options.

Flags shared by verbs (`--app`, `--format`, ...) are spelled here once.
"""

from __future__ import annotations

import argparse
import os

from aether.cli.main import LOG_FORMATS, LOG_LEVELS
from aether.model.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn


class Arguments(argparse.Namespace):
    """What was given. A flag that the verb does not have, or that was not given, reads as None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


class _Formatter(argparse.HelpFormatter):
    """argparse makes one for every argument, and without a width each loads shutil and its compressors."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_width() - 2)


def _width() -> int:
    try:
        return max(40, int(os.environ.get("COLUMNS") or os.get_terminal_size(1).columns))
    except (OSError, ValueError):
        return 100


class Parser(argparse.ArgumentParser):
    """A verb's parser. `options` holds every argument in order; `actions` the parsers of its sub-commands."""

    def __init__(self, **settings: Any) -> None:
        self.options: list[argparse.Action] = []
        self.actions: dict[str, Parser] = {}
        self._group: Any = None
        self.takes_command = False
        """Everything from the first word on that is no flag belongs to the positional `command`."""
        settings.setdefault("allow_abbrev", False)
        settings.setdefault("formatter_class", _Formatter)
        super().__init__(**settings)
        # SUPPRESS: a sub-command's parser must not overwrite what its parent has read
        self.add_argument("--log-level", choices=LOG_LEVELS, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.add_argument("--log-format", choices=LOG_FORMATS, default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        action = super().add_argument(*names, **settings)
        self.options.append(action)
        return action

    def add_action(self, name: str, line: str) -> Parser:
        """A sub-command; its name is read into `action`."""
        if self._group is None:
            self._group = self.add_subparsers(dest="action", metavar="ACTION", title="actions")
        parser: Parser = self._group.add_parser(name, help=line, description=f"{line[0].upper()}{line[1:]}.")
        self.actions[name] = parser
        return parser

    def read(self, words: list[str]) -> Arguments:
        """Raises UsageError."""
        # argparse asks its namespace what is missing, and Arguments would answer that nothing is
        if self.takes_command:
            flags, command = self._split(words)
            found = self.parse_args(flags)
            found.command = command
        else:
            found = self.parse_args(words) if self.actions else self.parse_intermixed_args(words)
        return Arguments(**vars(found))

    def _split(self, words: list[str]) -> tuple[list[str], list[str]]:
        """Flags with their values, and the command that follows."""
        at = 0
        while at < len(words) and words[at].startswith("-") and words[at] != "-":
            if words[at] == "--":
                return words[:at], words[at + 1 :]
            flag, has_value, _ = words[at].partition("=")
            action = next((option for option in self.options if flag in option.option_strings), None)
            takes_value = action is not None and action.nargs is None
            at += 2 if takes_value and not has_value else 1
        return words[:at], words[at:]

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see '{self.prog} --help'")


def add_format(parser: Parser) -> None:
    parser.add_argument(
        "--format", choices=("text", "json"), default=argparse.SUPPRESS, help="how the result is printed (text)"
    )


def add_app(parser: Parser) -> None:
    parser.add_argument(
        "--app",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="the app (default: the one that aether.toml or package.json in this folder names)",
    )


def add_timeout(parser: Parser) -> None:
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=120,
        metavar="SECONDS",
        help="time the new release has to become healthy; past it the rollout is undone (120)",
    )


def seconds(text: str) -> int:
    """A whole number of seconds, also written `90s`, `5m` or `1h`."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    number = text[:-1] if unit else text
    if not number.isdecimal() or not 1 <= int(number) * (unit or 1) <= 86_400:
        raise argparse.ArgumentTypeError(f"'{text}' is not a time between 1 s and 24 h")
    return int(number) * (unit or 1)


def count(text: str) -> int:
    """A number of zero or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of zero or more")
    return int(text)


def page_size(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 500:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number between 1 and 500")
    return int(text)
