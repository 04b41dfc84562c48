"""`aether volumes`: an app's persistent volumes with what they take, and deleting one that nothing needs."""

from __future__ import annotations

import sys

from aether.cli.arguments import add_app, add_format
from aether.cli.output import table
from aether.cli.project import app_of
from aether.model.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context


def configure(parser: Parser) -> None:
    listing = parser.add_action("list", "list the volumes of an app (also without an action)")
    add_app(listing)
    add_format(listing)
    delete = parser.add_action("delete", "delete a volume and everything in it")
    delete.add_argument("name", metavar="NAME", help="the volume")
    delete.add_argument("--yes", action="store_true", help="do not ask")
    add_app(delete)
    add_format(delete)
    add_app(parser)
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    app = app_of(arguments)
    if arguments.action in (None, "list"):
        found = context.api.volumes(app)
        rows = [
            (item["name"], item["path"], used(item["used_bytes"]), "yes" if item["in_use"] else "no")
            for item in found
        ]
        context.result(found, lambda: table(("NAME", "PATH", "USED", "IN USE"), rows) if rows else "no volumes")
        return 0
    name = arguments.name
    if not arguments.yes:
        _confirm(app, name)
    context.api.delete_volume(app, name)
    context.result({"deleted": name}, lambda: f"deleted volume {name} of {app}")
    return 0


def used(count: int | None) -> str:
    """Bytes for people, in powers of 1000."""
    if count is None:
        return "too much to count"
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def _confirm(app: str, name: str) -> None:
    if not sys.stdin.isatty():
        raise UsageError(f"deleting volume {name} of {app} cannot be undone: add --yes")
    sys.stderr.write(f"This deletes everything in volume {name} of {app}. Type its name to go on: ")
    sys.stderr.flush()
    if sys.stdin.readline().strip() != name:
        raise UsageError("nothing was deleted")
