"""`aether user`: create, list, disable and enable users, and make, list and revoke tokens for machines.

A password is read from a prompt or from standard input, never from the command line. The text of a new token is the
only thing printed on stdout, so that `aether user token ... | secret-store` works.
"""

from __future__ import annotations

import argparse
import sys

from aether.cli.arguments import add_format
from aether.cli.output import moment, table
from aether.model.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context
    from aether.client.wire import User

ROLES = ("admin", "deployer", "reader")


def configure(parser: Parser) -> None:
    create = parser.add_action("create", "create a user; its password is asked for, or read from standard input")
    create.add_argument("name", metavar="NAME", help="the user")
    create.add_argument("--role", choices=ROLES, default="deployer", help="what the user may do (deployer)")
    create.add_argument("--email", metavar="ADDRESS", help="the user's e-mail address")
    create.add_argument("--no-password", action="store_true", help="nobody logs in as this user; tokens only")
    listing = parser.add_action("list", "list users (also without an action)")
    passwd = parser.add_action("password", "give a user a new password and end its sessions; your own by default")
    passwd.add_argument("name", metavar="NAME", nargs="?", help="the user (default: you)")
    disable = parser.add_action("disable", "end a user's sessions and tokens and let it in no more")
    disable.add_argument("name", metavar="NAME", help="the user")
    enable = parser.add_action("enable", "let a disabled user in again")
    enable.add_argument("name", metavar="NAME", help="the user")
    role = parser.add_action("role", "give a user another role")
    role.add_argument("name", metavar="NAME", help="the user")
    role.add_argument("role", choices=ROLES, help="what the user may do from now on")
    token = parser.add_action("token", "make a token for a machine that acts for a user")
    token.add_argument("name", metavar="NAME", nargs="?", help="the user (default: you)")
    token.add_argument("--label", metavar="TEXT", default="ci", help="what the token is for (ci)")
    token.add_argument("--role", choices=ROLES, help="less than the user's own role, if wanted")
    token.add_argument("--app", action="append", metavar="APP", help="bind it to this app (may be repeated)")
    token.add_argument("--expires", type=lifetime, default=90 * 86_400, metavar="TIME", help="like 12h or 30d (90d)")
    tokens = parser.add_action("tokens", "list the tokens that work")
    tokens.add_argument("name", metavar="NAME", nargs="?", help="only this user's")
    revoke = parser.add_action("revoke", "end a token at once")
    revoke.add_argument("id", metavar="TOKEN_ID", help="as 'aether user tokens' shows it")
    for one in (create, listing, passwd, disable, enable, role, token, tokens, revoke, parser):
        add_format(one)


def run(arguments: Arguments, context: Context) -> int:
    action = arguments.action or "list"
    {
        "create": _create, "list": _list, "password": _password, "disable": _disable, "enable": _enable,
        "role": _role, "token": _token, "tokens": _tokens, "revoke": _revoke,
    }[action](arguments, context)  # fmt: skip
    return 0


def _create(arguments: Arguments, context: Context) -> None:
    password = None if arguments.no_password else read_password(f"Password for {arguments.name}: ", twice=True)
    user = context.api.create_user(arguments.name, arguments.role, password, arguments.email)
    context.result(user, lambda: f"created {user['name']} ({user['role']})")


def _list(_: Arguments, context: Context) -> None:
    from aether.client.api import pages

    users = list(pages(lambda cursor: context.api.users(limit=500, cursor=cursor)))
    context.result(
        {"items": users},
        lambda: (
            table(
                ("NAME", "ROLE", "STATE", "TEAMS", "CREATED"),
                map(_row, users),
            )
            if users
            else "no users"
        ),
    )


def _row(user: User) -> tuple[str, ...]:
    state = "disabled" if user["disabled"] else ""
    return user["name"], user["role"], state, ",".join(user["teams"]), moment(user["created_at"])


def _password(arguments: Arguments, context: Context) -> None:
    me = context.api.whoami()["name"]
    name = arguments.name or me
    change: dict[str, str] = {}
    if name == me:
        change["current_password"] = read_password("Present password: ")
    change["password"] = read_password(f"New password for {name}: ", twice=True)
    user = context.api.change_user(name, **change)
    context.result(user, lambda: f"{name} has a new password; log in again")


def _disable(arguments: Arguments, context: Context) -> None:
    user = context.api.change_user(arguments.name, disabled=True)
    context.result(user, lambda: f"disabled {user['name']}; its sessions and tokens have ended")


def _enable(arguments: Arguments, context: Context) -> None:
    user = context.api.change_user(arguments.name, disabled=False)
    context.result(user, lambda: f"enabled {user['name']}")


def _role(arguments: Arguments, context: Context) -> None:
    user = context.api.change_user(arguments.name, role=arguments.role)
    context.result(user, lambda: f"{user['name']} is {user['role']} now")


def _token(arguments: Arguments, context: Context) -> None:
    made = context.api.create_token(
        arguments.label,
        user=arguments.name,
        role=arguments.role,
        apps=arguments.app,
        expires_in_secs=arguments.expires,
    )
    scope = "on " + ", ".join(made["apps"]) if made["apps"] else f"on every app of {made['user']}"
    context.log.info(f"a token for {made['user']} ({made['role']}) {scope} until {moment(made['expires_at'])}")
    context.result(made, lambda: made.get("token", ""))


def _tokens(arguments: Arguments, context: Context) -> None:
    from aether.client.api import pages

    tokens = list(pages(lambda cursor: context.api.tokens(user=arguments.name, limit=500, cursor=cursor)))
    context.result(
        {"items": tokens},
        lambda: (
            table(
                ("ID", "LABEL", "USER", "ROLE", "APPS", "EXPIRES"),
                (
                    (t["id"], t["name"], t["user"], t["role"], ",".join(t["apps"] or ()), moment(t["expires_at"]))
                    for t in tokens
                ),
            )
            if tokens
            else "no tokens"
        ),
    )


def _revoke(arguments: Arguments, context: Context) -> None:
    context.api.revoke_token(arguments.id)
    context.result({"revoked": arguments.id}, lambda: f"revoked {arguments.id}")


def read_password(prompt: str, *, twice: bool = False) -> str:
    """From the terminal without echo, else a line of standard input. Raises UsageError."""
    if sys.stdin.isatty():
        from getpass import getpass

        password = getpass(prompt)
        if twice and getpass("Once more: ") != password:
            raise UsageError("the two passwords differ")
    else:
        password = sys.stdin.readline().rstrip("\n")
    if not password:
        raise UsageError("no password given: type it at the prompt, or give it on standard input")
    return password


def lifetime(text: str) -> int:
    """Seconds of `90s`, `5m`, `12h` or `30d`."""
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86_400}.get(text[-1:], 0)
    if not unit or not text[:-1].isdecimal() or not 60 <= int(text[:-1]) * unit <= 366 * 86_400:
        raise argparse.ArgumentTypeError(f"'{text}' is not a time between 1 minute and 366 days, like 12h or 30d")
    return int(text[:-1]) * unit
