"""`aether apps`: list, create, show, transfer and delete apps."""

from __future__ import annotations

import sys

from aether.cli import list as listing
from aether.cli import status
from aether.cli.arguments import add_format
from aether.model.errors import UsageError
from aether.model.names import check_app_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context


def configure(parser: Parser) -> None:
    listing.configure(parser.add_action("list", "list apps (also without an action)"))
    create = parser.add_action("create", "create an app without deploying to it")
    create.add_argument("name", metavar="NAME", help="the app")
    create.add_argument("--team", metavar="TEAM", help="the team that owns it (default: you)")
    add_format(create)
    info = parser.add_action("info", "show an app")
    info.add_argument("name", metavar="NAME", help="the app")
    add_format(info)
    transfer = parser.add_action("transfer", "give an app to another owner")
    transfer.add_argument("name", metavar="NAME", help="the app")
    transfer.add_argument("--to", metavar="OWNER", required=True, help="a team of yours; for an admin any owner")
    add_format(transfer)
    delete = parser.add_action("delete", "stop an app and delete it with its releases, config, logs and volumes")
    delete.add_argument("name", metavar="NAME", help="the app")
    delete.add_argument("--yes", action="store_true", help="do not ask")
    add_format(delete)
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    if arguments.action in (None, "list"):
        return listing.run(arguments, context)
    name = check_app_name(arguments.name)
    if arguments.action == "create":
        app = context.api.create_app(name, arguments.team)
        context.result(app, lambda: f"created {name}; deploy to it with 'aether deploy --app {name}'")
    elif arguments.action == "info":
        arguments.app = name
        return status.run(arguments, context)
    elif arguments.action == "transfer":
        app = context.api.transfer_app(name, arguments.to)
        context.result(app, lambda: f"{name} belongs to {app['owner']} now")
    else:
        if not arguments.yes:
            _confirm(name)
        context.api.delete_app(name)
        context.result({"deleted": name}, lambda: f"deleted {name}")
    return 0


def _confirm(name: str) -> None:
    if not sys.stdin.isatty():
        raise UsageError(f"deleting {name} cannot be undone: add --yes")
    sys.stderr.write(
        f"This stops {name} and deletes its releases, config, logs and volumes. Type its name to go on: "
    )
    sys.stderr.flush()
    if sys.stdin.readline().strip() != name:
        raise UsageError("nothing was deleted")
