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
    from collections.abc import Callable, Iterator

    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context
    from aether.client.wire import LogLine

DEFAULT_TAIL = 100
_INTERRUPTED = 130
_MARKS = {"stderr": "!", "aether": "*"}


def configure(parser: Parser) -> None:
    add_app(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on with new lines until Ctrl-C")
    parser.add_argument(
        "--tail", type=count, metavar="N", help="how many of the newest lines (100; with --since all of them)"
    )
    parser.add_argument(
        "--since", metavar="TIME", help="only lines since then: an ISO-8601 time, 30s, 10m, 2h, 1d, or 'deployment'"
    )
    parser.add_argument("--process", metavar="NAME", help="only of this process type: web, worker, release, ...")
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    app = app_of(arguments)
    tail: int | None = arguments.tail
    if tail is None and not arguments.since:
        tail = DEFAULT_TAIL
    watched = _watched_stdout() if arguments.follow else None
    batches = context.api.log(
        app,
        tail=tail,
        since=arguments.since,
        follow=bool(arguments.follow),
        process=arguments.process,
        on_state=context.log.warn,
    )
    try:
        silent = _show(batches, _as_json if context.as_json else _as_text, watched)
    except KeyboardInterrupt:
        if not arguments.follow:
            raise
        return _INTERRUPTED  # the way to end it, so there is nothing to complain about
    if silent and not arguments.follow and tail != 0:
        who = f"{app} {arguments.process}" if arguments.process else app
        context.log.info(f"{who} has written nothing" + (f" since {arguments.since}" if arguments.since else " yet"))
    return 0


def _show(
    batches: Iterator[list[tuple[bytes, LogLine]]],
    show: Callable[[list[tuple[bytes, LogLine]], bool], str],
    watched: select.poll | None,
) -> bool:
    """Print what comes until nothing more does; returns whether nothing came. Raises BrokenPipeError."""
    terminal = sys.stdout.isatty()
    silent = True
    for batch in batches:
        if batch:
            silent = False
            sys.stdout.write(show(batch, terminal))
            # a pipe would otherwise keep lines back until its buffer is full
            sys.stdout.flush()
        elif watched is not None and watched.poll(0):
            # nothing to write, so a reader that went away is noticed only by asking
            raise BrokenPipeError
    return silent


def _as_json(batch: list[tuple[bytes, LogLine]], terminal: bool) -> str:
    """As the server wrote it; on a terminal in ASCII, for C1 control characters need no escaping in JSON."""
    if terminal:
        return "".join(json.dumps(line) + "\n" for _, line in batch)
    return b"".join([raw + b"\n" for raw, _ in batch]).decode()


def _as_text(batch: list[tuple[bytes, LogLine]], terminal: bool) -> str:
    return "".join([text(line, terminal) + "\n" for _, line in batch])


def text(line: LogLine, terminal: bool) -> str:
    """A line for people; on a terminal the app cannot steer it. `!` marks stderr, `*` what is said about the log."""
    said = escape(line["line"], keep="\t") if terminal else line["line"]
    # a rollout under way has no number yet; the end of its deployment's id tells it from others
    release = f"v{line['release']}" if line["release"] else f"~{line['deployment_id'][-8:]}"
    mark = _MARKS.get(line["stream"], "|")
    return f"{line['time']} {release} {line['process']}.{line['instance'][-8:]} {mark} {said}"


def _watched_stdout() -> select.poll | None:
    """Tells when the reader of stdout has closed its end."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return None
    poll = select.poll()
    poll.register(descriptor, 0)
    return poll
