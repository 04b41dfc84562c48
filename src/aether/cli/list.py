"""`aether list`: the apps of a server, filtered and paged."""

from __future__ import annotations

from aether.cli.arguments import add_format, page_size
from aether.cli.output import table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context
    from aether.client.wire import App


def configure(parser: Parser) -> None:
    parser.add_argument("--filter", metavar="TEXT", help="only apps whose name contains TEXT")
    parser.add_argument("--limit", type=page_size, metavar="N", help="apps per page, at most 500 (50)")
    parser.add_argument("--cursor", metavar="CURSOR", help="where the page before ended")
    parser.add_argument("--all", action="store_true", help="every page")
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    api = context.api
    if arguments.all:
        from aether.client.api import pages

        limit = arguments.limit or 500
        items = list(pages(lambda cursor: api.apps(q=arguments.filter, limit=limit, cursor=cursor)))
        following = None
    else:
        page = api.apps(q=arguments.filter, limit=arguments.limit, cursor=arguments.cursor)
        items, following = page["items"], page["next_cursor"]
    context.result({"items": items, "next_cursor": following}, lambda: rows(items) if items else "no apps")
    if following and not context.as_json:
        context.log.info(f"there are more: --all, or --cursor {following}")
    return 0


def rows(items: list[App]) -> str:
    """A table of apps."""
    return table(
        ("NAME", "STATUS", "RELEASE", "READY", "URL"),
        (
            (
                app["name"],
                app["status"],
                f"v{app['release']['version']}" if app["release"] else "",
                f"{app['instances']['ready']}/{app['instances']['desired']}",
                app["url"],
            )
            for app in items
        ),
    )
