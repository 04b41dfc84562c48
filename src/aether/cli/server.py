"""`aether server`: one of any number of servers on one database; see docs/distributed.md.

Flags are those of `aether up`; DATABASE_URL, AETHER_STORAGE_MODE and the rest of the environment choose what is
shared.
"""

from __future__ import annotations

from aether.cli import up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context


def configure(parser: Parser) -> None:
    up.configure(parser)


def run(arguments: Arguments, context: Context) -> int:
    return up.start(arguments, context, among_others=True)
