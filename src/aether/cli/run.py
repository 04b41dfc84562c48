"""`aether run`: a command in a new sandbox of an app, joined to this terminal or these pipes; list and end such runs.

It exits with the command's own code, or 128 + N when signal N ended it, or 124 when its time was over. What goes
wrong before the command runs has aether's codes and a line `aether: ...` on stderr.
"""

from __future__ import annotations

import argparse
import os
import shlex

from aether.cli.arguments import add_app, add_format, seconds
from aether.cli.output import moment, table
from aether.cli.project import app_of, variables
from aether.model.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context
    from aether.client.wire import Run

EXPIRED_EXIT = 124
_SIGNALLED = 128


def configure(parser: Parser) -> None:
    parser.takes_command = True
    parser.add_argument(
        "command", nargs="*", metavar="COMMAND", help="one word is a shell's command line, several stay as they are"
    )
    add_app(parser)
    parser.add_argument(
        "--env", action="append", metavar="K=V", help="a variable of this run; K alone takes it from here"
    )
    parser.add_argument(
        "--timeout", type=seconds, default=3600, metavar="TIME", help="end it after that time, 24h at most (1h)"
    )
    parser.add_argument("--release", type=int, metavar="N", help="in this release (default: the active one)")
    parser.add_argument("--detach", action="store_true", help="do not wait; its output is in the app's logs")
    parser.add_argument(
        "--tty",
        action="store_true",
        default=argparse.SUPPRESS,
        help="with a terminal (default: if stdin and stdout are one)",
    )
    parser.add_argument(
        "--no-tty",
        dest="tty",
        action="store_false",
        default=argparse.SUPPRESS,
        help="without: stdout and stderr apart",
    )
    parser.add_argument("--list", action="store_true", help="list the app's runs")
    parser.add_argument("--stop", metavar="ID", help="end a run")
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    asked = [bool(arguments.command), bool(arguments.list), arguments.stop is not None]
    if asked.count(True) != 1:
        raise UsageError("give a command to run, --list, or --stop ID; see 'aether run --help'")
    app = app_of(arguments)
    if arguments.list:
        return _list(context, app)
    if arguments.stop is not None:
        found = context.api.stop_run(app, arguments.stop)
        context.result(found, lambda: f"run {found['id']} was ended")
        return 0
    if arguments.detach and arguments.tty:
        raise UsageError("--detach and --tty exclude each other: nobody would be at the terminal")
    if context.as_json and not arguments.detach:
        raise UsageError("--format json goes with --detach, --list and --stop: otherwise stdout is the command's")
    terminal = _terminal(arguments)
    env = variables(arguments.env or (), context.environ)
    if terminal and "TERM" not in env:
        env["TERM"] = context.environ.get("TERM") or "xterm"
    console = "" if arguments.detach else "terminal" if terminal else "pipes"
    started = context.api.start_run(
        app,
        command=command_line(arguments.command),
        env=env,
        console=console,
        timeout_secs=arguments.timeout,
        release=arguments.release,
    )
    if arguments.detach:
        context.result(started, lambda: f"{started['id']}\n'aether logs --app {app}' shows what it writes")
        return 0
    return _exit_code(context.api.attach_to_run(app, started["id"], terminal=terminal), context)


def command_line(words: list[str]) -> str:
    """What the shell in the sandbox is given: one word as it is, several so that they stay what they are."""
    return words[0] if len(words) == 1 else shlex.join(words)


def _terminal(arguments: Arguments) -> bool:
    here = os.isatty(0)
    if arguments.tty and not here:
        raise UsageError("--tty needs a terminal as stdin")
    return bool(arguments.tty) if arguments.tty is not None else here and os.isatty(1)


def _exit_code(end: dict[str, Any], context: Context) -> int:
    if end["expired"]:
        context.log.warn("the run was ended because its time was over; --timeout gives it more")
        return EXPIRED_EXIT
    if end["out_of_memory"]:
        context.log.warn("the run was ended because it used more memory than its limit")
    elif end["reason"] and end["code"] != 0:
        context.log.warn(f"the run was ended: {end['reason']}")
    return int(end["code"]) if end["code"] is not None else _SIGNALLED + int(end["signal"] or 0)


def _list(context: Context, app: str) -> int:
    from aether.client.api import pages

    found = list(pages(lambda cursor: context.api.runs(app, limit=200, cursor=cursor)))
    rows = [(r["id"], how(r), moment(r["created_at"]), r["created_by"], _short(r["command"])) for r in found]
    context.result(found, lambda: table(("ID", "STATE", "STARTED", "BY", "COMMAND"), rows) if rows else "no runs")
    return 0


def how(found: Run) -> str:
    """The state of a run in a few words."""
    if found["status"] == "running":
        return "running"
    if found["reason"]:
        return found["reason"]
    return f"signal {found['signal']}" if found["signal"] is not None else f"exit {found['exit_code']}"


def _short(command: str) -> str:
    line = " ".join(command.split())
    return line if len(line) <= 60 else line[:57] + "..."
