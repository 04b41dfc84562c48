"""`aether open`: the address of an app, in a browser where there is one."""

from __future__ import annotations

import sys

from aether.cli.arguments import add_app, add_format
from aether.cli.project import app_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context


def configure(parser: Parser) -> None:
    add_app(parser)
    parser.add_argument("--print", action="store_true", help="print the address and open nothing")
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    app = context.api.app(app_of(arguments))
    url = app["url"]
    context.result({"app": app["name"], "url": url}, lambda: url)
    if not arguments.print and sys.stdout.isatty() and _has_display(context):
        import webbrowser

        sys.stdout.flush()
        if not webbrowser.open(url):
            context.log.warn("no browser could be started")
    return 0


def _has_display(context: Context) -> bool:
    return sys.platform == "darwin" or any(context.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
