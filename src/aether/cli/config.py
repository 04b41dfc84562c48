"""`aether config`: the environment of an app. A change makes a new release of the same code."""

from __future__ import annotations

import sys

from aether.cli.arguments import add_app, add_format, add_timeout
from aether.cli.output import escape, fields
from aether.cli.progress import progress_for
from aether.cli.project import app_of, check_variable
from aether.model.errors import NotFound, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context
    from aether.client.wire import ConfigChange, Deployment

MASK = "****"


class _NothingToRollOut(Exception):
    """The change was kept, and no deployment came of it."""


def configure(parser: Parser) -> None:
    _shared(parser)
    parser.add_argument("--show", action="store_true", help="show the values")
    get = parser.add_action("get", "print the value of one variable")
    get.add_argument("name", metavar="NAME", help="the variable")
    _shared(get)
    for verb, metavar, line in (
        ("set", "NAME=VALUE", "set variables; NAME alone reads its value from the terminal or standard input"),
        ("unset", "NAME", "remove variables"),
    ):
        change = parser.add_action(verb, line)
        change.add_argument("names", nargs="+", metavar=metavar, help="one or more")
        change.add_argument("--detach", action="store_true", help="do not wait for the rollout")
        add_timeout(change)
        _shared(change)


def _shared(parser: Parser) -> None:
    add_app(parser)
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    app = app_of(arguments)
    if arguments.action == "set":
        return _change(arguments, context, app, set_=_given(arguments.names))
    if arguments.action == "unset":
        return _change(arguments, context, app, unset=[check_variable(name) for name in arguments.names])
    config = context.api.config(app)
    if arguments.action == "get":
        name = check_variable(arguments.name)
        if name not in config["env"]:
            raise NotFound(f"{app} has no variable {name}")
        value = config["env"][name]
        context.result({"name": name, "value": value}, lambda: _shown(value))
        return 0
    env = config["env"] if arguments.show else masked(config["env"])
    context.result(
        {"version": config["version"], "env": env}, lambda: fields(sorted(env.items())) or f"{app} has no variables"
    )
    return 0


def masked(env: Mapping[str, str]) -> dict[str, str]:
    """The names with every value hidden, also its length."""
    return dict.fromkeys(env, MASK)


def _shown(value: str) -> str:
    return escape(value, keep="\n\t") if sys.stdout.isatty() else value


def _given(texts: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, has_value, value = text.partition("=")
        check_variable(name)
        if not has_value:
            if len([other for other in texts if "=" not in other]) > 1 and not sys.stdin.isatty():
                raise UsageError("only one value can be read from standard input")
            value = _read(name)
        if "\0" in value:
            raise UsageError(f"the value of {name} holds a zero byte")
        found[name] = value
    return found


def _read(name: str) -> str:
    if sys.stdin.isatty():
        from getpass import getpass

        return getpass(f"{name}: ")
    return sys.stdin.read().removesuffix("\n")


def _change(
    arguments: Arguments,
    context: Context,
    app: str,
    *,
    set_: Mapping[str, str] | None = None,
    unset: list[str] | None = None,
) -> int:
    from aether.cli.rollout import roll_out

    api = context.api
    changed: ConfigChange | None = None
    deployment: Deployment | None = None

    def start() -> Deployment:
        nonlocal changed
        changed = api.change_config(app, set_=set_, unset=unset or ())
        if changed["deployment_id"] is None:
            raise _NothingToRollOut
        return api.deployment(changed["deployment_id"])

    with progress_for(context.log) as progress:
        try:
            deployment = roll_out(
                context, start, timeout_s=arguments.timeout, progress=progress, detach=bool(arguments.detach)
            )
            if not arguments.detach:
                progress.end(f"release v{deployment['release']} is serving")
        except _NothingToRollOut:
            context.log.debug("no release is active, or nothing changed")
    assert changed is not None
    result = {
        "version": changed["version"],
        "env": masked(changed["env"]),
        "deployment_id": changed["deployment_id"],
        "status": deployment["status"] if deployment else None,
    }

    def text() -> str:
        names = ", ".join([*(set_ or ()), *(unset or ())])
        said = f"{'set' if set_ else 'unset'} {names}; config version {result['version']}"
        if deployment is None:
            return f"{said}; nothing to roll out now"
        if arguments.detach:
            return f"{said}, deployment {deployment['id']} is {deployment['status']}"
        return f"{said}, release v{deployment['release']}"

    context.result(result, text)
    return 0
