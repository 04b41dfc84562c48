"""`aether audit`: who changed or tried what, newest first; for admins."""

from __future__ import annotations

import itertools

from aether.cli.arguments import add_format
from aether.cli.output import moment, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context

_PAGE = 500


def configure(parser: Parser) -> None:
    parser.add_argument("--actor", metavar="NAME", help="only what this one did")
    parser.add_argument("--since", metavar="TIME", help="only from this ISO-8601 time on")
    parser.add_argument("--limit", type=int, default=50, metavar="N", help="at most so many, 0 for all (50)")
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    from aether.client.api import pages

    wanted = max(0, arguments.limit)
    size = min(_PAGE, wanted or _PAGE)
    found = pages(
        lambda cursor: context.api.audit(actor=arguments.actor, since=arguments.since, limit=size, cursor=cursor)
    )
    rows = list(itertools.islice(found, wanted or None))
    context.result(
        {"items": rows},
        lambda: (
            table(
                ("TIME", "WHO", "ACTION", "WHAT", "OUTCOME", "FROM"),
                (
                    (
                        moment(row["time"]), row["actor"], row["action"], row["target"] or "-", row["outcome"],
                        row["address"] or "-",
                    )
                    for row in rows
                ),
            )
            if rows
            else "no entries"
        ),
    )  # fmt: skip
    return 0
