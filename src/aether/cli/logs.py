"""`aether logs`: what the instances of an app wrote, and what they write now."""

from __future__ import annotations

import json
import select
import sys

from aether.cli.arguments import add_app, add_format, count
from aether.cli.output import escape
from aether.cli.project import app_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context
    from aether.client.wire import LogLine


def configure(parser: Parser) -> None:
    add_app(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on with new lines until Ctrl-C")
    parser.add_argument("--tail", type=count, default=100, metavar="N", help="how many of the newest lines (100)")
    parser.add_argument(
        "--since", metavar="TIME", help="only lines since then: an ISO-8601 time, or 30s, 10m, 2h, 1d"
    )
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    app = app_of(arguments)
    terminal = sys.stdout.isatty()
    watched = _watched_stdout() if arguments.follow else None
    batches = context.api.log(
        app,
        tail=arguments.tail,
        since=arguments.since,
        follow=bool(arguments.follow),
        on_state=context.log.warn,
    )
    silent = True
    for batch in batches:
        if batch:
            silent = False
            shown = (
                json.dumps(line, ensure_ascii=False) if context.as_json else text(line, terminal) for line in batch
            )
            sys.stdout.write("\n".join(shown) + "\n")
            # a pipe would otherwise keep lines back until its buffer is full
            sys.stdout.flush()
        elif watched is not None and watched.poll(0):
            # nothing to write, so a reader that went away is noticed only by asking
            raise BrokenPipeError
    if silent and not arguments.follow and arguments.tail:
        context.log.info(f"{app} has written nothing" + (f" since {arguments.since}" if arguments.since else " yet"))
    return 0


def text(line: LogLine, terminal: bool) -> str:
    """A line for people; on a terminal the app cannot steer it."""
    said = escape(line["line"], keep="\t") if terminal else line["line"]
    release = f"v{line['release']}" if line["release"] else "-"
    mark = "!" if line["stream"] == "stderr" else "|"
    return f"{line['time']} {release} {line['instance'][-8:]} {mark} {said}"


def _watched_stdout() -> select.poll | None:
    """Tells when the reader of stdout has closed its end."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return None
    poll = select.poll()
    poll.register(descriptor, 0)
    return poll
