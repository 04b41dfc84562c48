"""`aether team`: create, list and delete teams, and say who is in them. A team owns the apps made with `--team`."""

from __future__ import annotations

from aether.cli.arguments import add_format
from aether.cli.output import moment, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context


def configure(parser: Parser) -> None:
    create = parser.add_action("create", "create a team")
    create.add_argument("name", metavar="TEAM", help="the team")
    add_format(create)
    add_format(parser.add_action("list", "list teams and their members (also without an action)"))
    delete = parser.add_action("delete", "delete a team that owns no app")
    delete.add_argument("name", metavar="TEAM", help="the team")
    add_format(delete)
    for action, line in (("add", "put a user into a team"), ("remove", "take a user out of a team")):
        one = parser.add_action(action, line)
        one.add_argument("name", metavar="TEAM", help="the team")
        one.add_argument("user", metavar="USER", help="the user")
        add_format(one)
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    if arguments.action == "create":
        team = context.api.create_team(arguments.name)
        context.result(team, lambda: f"created {team['name']}; put users into it with 'aether team add'")
    elif arguments.action == "delete":
        context.api.delete_team(arguments.name)
        context.result({"deleted": arguments.name}, lambda: f"deleted {arguments.name}")
    elif arguments.action == "add":
        team = context.api.add_member(arguments.name, arguments.user)
        context.result(team, lambda: f"{arguments.user} is in {arguments.name}")
    elif arguments.action == "remove":
        context.api.remove_member(arguments.name, arguments.user)
        removed = {"team": arguments.name, "removed": arguments.user}
        context.result(removed, lambda: f"{arguments.user} is no longer in {arguments.name}")
    else:
        _list(context)
    return 0


def _list(context: Context) -> None:
    from aether.client.api import pages

    teams = list(pages(lambda cursor: context.api.teams(limit=500, cursor=cursor)))
    context.result(
        {"items": teams},
        lambda: (
            table(
                ("TEAM", "MEMBERS", "CREATED"),
                ((team["name"], ",".join(team["members"]), moment(team["created_at"])) for team in teams),
            )
            if teams
            else "no teams"
        ),
    )
