"""`aether config`: the environment of an app. A change makes a new release of the same code.

A secret is given to the server once and never shown again; its value never has to be on a command line.
"""

from __future__ import annotations

import sys

from aether.cli.arguments import add_app, add_format, add_timeout
from aether.cli.output import escape, fields
from aether.cli.progress import progress_for
from aether.cli.project import app_of, check_variable
from aether.model.errors import Forbidden, NotFound, UsageError

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
    put = parser.add_action("set", "set variables")
    put.add_argument(
        "names",
        nargs="*",
        metavar="NAME=VALUE",
        help="NAME alone asks for its value on the terminal, or reads it from standard input",
    )
    put.add_argument(
        "--secret", action="store_true", help="what is set here is secret: never shown again, not even to you"
    )
    put.add_argument(
        "--from-file", action="append", metavar="NAME=PATH", help="the value is the content of a file (- is stdin)"
    )
    put.add_argument("--env-file", metavar="PATH", help="a file of NAME=value lines (- is standard input)")
    unset = parser.add_action("unset", "remove variables")
    unset.add_argument("names", nargs="+", metavar="NAME", help="one or more")
    for change in (put, unset):
        change.add_argument("--detach", action="store_true", help="do not wait for the rollout")
        add_timeout(change)
        _shared(change)


def _shared(parser: Parser) -> None:
    add_app(parser)
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    app = app_of(arguments)
    if arguments.action == "set":
        given = _given(arguments)
        if arguments.secret:
            return _change(arguments, context, app, secrets=given)
        return _change(arguments, context, app, set_=given)
    if arguments.action == "unset":
        return _change(arguments, context, app, unset=[check_variable(name) for name in arguments.names])
    config = context.api.config(app)
    if arguments.action == "get":
        name = check_variable(arguments.name)
        if name not in config["env"]:
            raise NotFound(f"{app} has no variable {name}")
        if name in config["secrets"]:
            raise Forbidden(f"{name} is a secret of {app}: its value can be replaced, but is never shown again")
        value = config["env"][name]
        context.result({"name": name, "value": value}, lambda: _shown(value))
        return 0
    env = config["env"] if arguments.show else masked(config["env"])
    secrets = config["secrets"]
    context.result(
        {"version": config["version"], "env": env, "secrets": secrets},
        lambda: (
            fields((name, f"{value}  (secret)" if name in secrets else value) for name, value in sorted(env.items()))
            or f"{app} has no variables"
        ),
    )
    return 0


def masked(env: Mapping[str, str]) -> dict[str, str]:
    """The names with every value hidden, also its length."""
    return dict.fromkeys(env, MASK)


def _shown(value: str) -> str:
    return escape(value, keep="\n\t") if sys.stdout.isatty() else value


def _given(arguments: Arguments) -> dict[str, str]:
    """What to set: the env file, over it --from-file, over it the words. Raises UsageError, OSError."""
    words: list[str] = arguments.names
    files = [_split(text) for text in arguments.from_file or ()]
    readers = len([word for word in words if "=" not in word])
    readers += len([path for _, path in files if path == "-"]) + (arguments.env_file == "-")
    if readers > 1 and not sys.stdin.isatty():
        raise UsageError("only one value can be read from standard input; --env-file takes several from one file")
    found: dict[str, str] = {}
    if arguments.env_file:
        from aether.cli.envfile import parse

        found |= parse(_content(arguments.env_file), arguments.env_file)
    for name, path in files:
        found[check_variable(name)] = _content(path)
    for word in words:
        name, has_value, value = word.partition("=")
        check_variable(name)
        if has_value and arguments.secret:
            raise UsageError(
                f"a secret does not belong on a command line, where others can read it: give {name} alone and type "
                f"or pipe its value, or use --from-file {name}=PATH or --env-file PATH"
            )
        found[name] = value if has_value else _read(name)
    for name, value in found.items():
        if "\0" in value:
            raise UsageError(f"the value of {name} holds a zero byte")
    if not found:
        raise UsageError("nothing to set: give NAME=VALUE, NAME, --from-file or --env-file")
    return found


def _split(text: str) -> tuple[str, str]:
    name, has_path, path = text.partition("=")
    if not has_path or not path:
        raise UsageError(f"--from-file takes NAME=PATH, not '{name}'")
    return name, path


def _content(path: str) -> str:
    try:
        if path == "-":
            return sys.stdin.read()
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text, which is all that a variable can hold") from None


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
    secrets: Mapping[str, str] | None = None,
    unset: list[str] | None = None,
) -> int:
    from aether.cli.rollout import roll_out

    api = context.api
    changed: ConfigChange | None = None
    deployment: Deployment | None = None

    def start() -> Deployment:
        nonlocal changed
        changed = api.change_config(app, set_=set_, secrets=secrets, unset=unset or ())
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
    absent = [name for name in unset or () if name not in changed["changed"]]
    if absent and len(absent) == len(unset or ()):
        raise NotFound(f"{app} has no variable {', '.join(absent)}")
    if absent:
        context.log.warn(f"{app} had no variable {', '.join(absent)}")
    result = {
        "version": changed["version"],
        "env": masked(changed["env"]),
        "secrets": changed["secrets"],
        "deployment_id": changed["deployment_id"],
        "status": deployment["status"] if deployment else None,
    }

    def text() -> str:
        names = ", ".join(name for name in [*(set_ or ()), *(secrets or ()), *(unset or ())] if name not in absent)
        did = "unset" if unset else "set secret" if secrets else "set"
        said = f"{did} {names}; config version {result['version']}"
        if deployment is None:
            return f"{said}; nothing to roll out now"
        if arguments.detach:
            return f"{said}, deployment {deployment['id']} is {deployment['status']}"
        return f"{said}, release v{deployment['release']}"

    context.result(result, text)
    return 0
