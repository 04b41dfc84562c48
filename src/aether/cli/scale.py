"""`aether scale`: show or change how many instances of an app run, and wait until they do."""

from __future__ import annotations

import time

from aether.cli.arguments import add_app, add_format, add_timeout
from aether.cli.progress import progress_for
from aether.cli.project import app_of
from aether.model.errors import RolloutFailed, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context
    from aether.cli.progress import Progress
    from aether.client.wire import App, Process

MAX_INSTANCES = 50
_POLL_S = 0.2


def configure(parser: Parser) -> None:
    parser.add_argument(
        "sizes", nargs="*", metavar="TYPE=N", help=f"e.g. web=3 worker=1; 0 to {MAX_INSTANCES}, 0 stops"
    )
    add_app(parser)
    add_timeout(parser)
    parser.add_argument("--detach", action="store_true", help="do not wait for the instances")
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    sizes = sizes_of(arguments.sizes)
    name = app_of(arguments)
    if not sizes:
        app = context.api.app(name)
        context.result(app, lambda: said(app))
        return 0
    app = context.api.scale(name, sizes)
    if not arguments.detach and app["release"] is not None:
        with progress_for(context.log) as progress:
            progress.begin("scale")
            app = _settle(context, app, arguments.timeout, progress)
            progress.end(said(app))
    context.result(app, lambda: said(app))
    return 0


def sizes_of(words: Iterable[str]) -> dict[str, int]:
    """`web=3` texts as a mapping; a bare number means web. Raises UsageError."""
    found: dict[str, int] = {}
    for word in words:
        process, equals, number = word.rpartition("=")
        process = process if equals else "web"
        if not process or not number.isascii() or not number.isdecimal():
            raise UsageError(f"'{word}' is not TYPE=NUMBER, as in web=3")
        if process in found:
            raise UsageError(f"{process} is given twice")
        if int(number) > MAX_INSTANCES:
            raise UsageError(f"{process} can be 0 to {MAX_INSTANCES}, not {number}")
        found[process] = int(number)
    return found


def said(app: App) -> str:
    """How many run, in words."""
    if not app["processes"]:
        return f"{app['name']}: nothing runs yet, there is no release"
    return f"{app['name']}: " + ", ".join(f"{process['name']} {count(process)}" for process in app["processes"])


def count(process: Process) -> str:
    """How many of a process type run, in words."""
    if process["kind"] == "cron":
        return "paused" if not process["desired"] else "running" if process["ready"] else "waiting for its time"
    if not process["desired"]:
        return "0 (stopped)"
    return f"{process['ready']} of {process['desired']} ready"


def _settle(context: Context, app: App, timeout_s: float, progress: Progress) -> App:
    """Wait until as many are ready as are wanted. Raises RolloutFailed past `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while any(p["kind"] != "cron" and p["ready"] != p["desired"] for p in app["processes"]):
        if time.monotonic() >= deadline:
            raise RolloutFailed(f"{said(app)} after {timeout_s:g} s; see 'aether logs --app {app['name']}'")
        progress.step(said(app))
        time.sleep(_POLL_S)
        app = context.api.app(app["name"])
    return app
