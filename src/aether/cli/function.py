"""`aether function`: make, change, look at, call and delete functions."""

from __future__ import annotations

import sys

from aether.cli.arguments import add_format, count, page_size
from aether.cli.output import escape, fields, moment, size, table
from aether.cli.project import check_variable, variables
from aether.model.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, TypeVar

    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context
    from aether.client.function_wire import Function
    from aether.client.wire import Page

    Item = TypeVar("Item")

DEFAULT_TAIL = 100
_NUMBERS = (
    ("--vcpu", "vcpu", "N", "virtual CPUs of an instance (1)"),
    ("--memory", "memory_mb", "MB", "memory of an instance in MiB (128)"),
    ("--port", "port", "N", "where the function listens; it is told as PORT (3000)"),
    ("--concurrency", "concurrency", "N", "requests that one instance is given at once (10)"),
    ("--min-instances", "min_instances", "N", "instances that are always there (0)"),
    ("--max-instances", "max_instances", "N", "instances at most (10)"),
)


def configure(parser: Parser) -> None:
    create = parser.add_action("create", "make a function")
    _add_name(create)
    create.add_argument("--team", metavar="TEAM", help="the team that owns it (default: you)")
    _add_fields(create, required=True)
    listing = parser.add_action("list", "list functions (also without an action)")
    listing.add_argument("--filter", metavar="TEXT", help="only those whose name has this in it")
    _add_pages(listing)
    _add_name(parser.add_action("show", "show a function, what runs of it, and why not"))
    update = parser.add_action("update", "change a function; what it runs is replaced without a failed request")
    _add_name(update)
    _add_fields(update, required=False)
    update.add_argument("--unset", action="append", metavar="K", help="a variable to take away")
    transfer = parser.add_action("transfer", "give a function to another owner")
    _add_name(transfer)
    transfer.add_argument("--to", metavar="OWNER", required=True, help="a team of yours; for an admin any owner")
    delete = parser.add_action("delete", "end a function and delete it with its versions and records")
    _add_name(delete)
    delete.add_argument("--yes", action="store_true", help="do not ask")
    from aether.cli import function_invoke

    invoke = parser.add_action("invoke", "call a function and print its answer")
    _add_name(invoke)
    function_invoke.configure(invoke)
    versions = parser.add_action("versions", "list what a function was")
    _add_name(versions)
    _add_pages(versions)
    rollback = parser.add_action("rollback", "make a function what it was: code, fields and variables")
    _add_name(rollback)
    rollback.add_argument("--to", metavar="N", type=count, help="the version (default: the one before with code)")
    logs = parser.add_action("logs", "print what the instances of a function wrote last")
    _add_name(logs)
    logs.add_argument("--tail", type=count, default=DEFAULT_TAIL, metavar="N", help="how many lines (100)")
    invocations = parser.add_action("invocations", "list the finished calls of a function")
    _add_name(invocations)
    _add_pages(invocations)
    from aether.cli import function_runtimes

    function_runtimes.configure(parser.add_action("runtimes", "list language runtimes, or register and remove one"))
    for action in parser.actions.values():
        add_format(action)
    add_format(parser)


def _add_name(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="the function, by its name or id")


def _add_pages(parser: Parser) -> None:
    parser.add_argument("--limit", type=page_size, metavar="N", help="entries per page, at most 500 (50)")
    parser.add_argument("--cursor", metavar="CURSOR", help="where the page before ended")
    parser.add_argument("--all", action="store_true", help="every page")


def _add_fields(parser: Parser, *, required: bool) -> None:
    parser.add_argument("--runtime", metavar="NAME", required=required, help="e.g. node or python")
    parser.add_argument("--entrypoint", metavar="PATH", required=required, help="the file of the code that is run")
    parser.add_argument("--code", metavar="DIR|FILE", help="a folder, or a .zip or .tar.gz archive")
    for flag, _, metavar, line in _NUMBERS:
        parser.add_argument(flag, type=count, metavar=metavar, help=line)
    parser.add_argument("--timeout", type=_secs, metavar="SECONDS", help="until an answer must have begun (30)")
    parser.add_argument("--env", action="append", metavar="K=V", help="a variable; K alone takes it from here")
    line = "start instances from snapshots of the function, which holds its start-up state"
    parser.add_argument("--snapshot", action="store_const", const=True, help=line)
    parser.add_argument(
        "--no-snapshot", action="store_const", const=False, dest="snapshot", help="start every instance anew (so)"
    )


def _secs(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--timeout is a number of seconds, not '{text}'") from None


def run(arguments: Arguments, context: Context) -> int:
    actions: dict[str, Callable[[Arguments, Context], int]] = {
        "create": _create,
        "show": _show,
        "update": _update,
        "transfer": _transfer,
        "delete": _delete,
        "versions": _versions,
        "rollback": _rollback,
        "logs": _logs,
        "invocations": _invocations,
    }
    if arguments.action == "invoke":
        from aether.cli import function_invoke

        return function_invoke.run(arguments, context)
    if arguments.action == "runtimes":
        from aether.cli import function_runtimes

        return function_runtimes.run(arguments, context)
    return actions.get(arguments.action or "", _list)(arguments, context)


def _given(arguments: Arguments, env: dict[str, str] | None) -> dict[str, Any]:
    """The fields that were given."""
    values = {name: getattr(arguments, flag[2:].replace("-", "_")) for flag, name, _, _ in _NUMBERS}
    values |= {"runtime": arguments.runtime, "entrypoint": arguments.entrypoint, "env_vars": env}
    values |= {"timeout_secs": arguments.timeout, "snapshot": arguments.snapshot}
    return {name: value for name, value in values.items() if value is not None}


def _create(arguments: Arguments, context: Context) -> int:
    from aether.cli.function_code import archive

    env = variables(arguments.env, context.environ) if arguments.env else None
    values = {"name": arguments.name, **_given(arguments, env)}
    functions = context.api.functions
    with archive(arguments.code) as body:  # before anything is made: a folder that is not there makes no function
        made = functions.create(values, arguments.team)
        if body is not None:
            made = functions.put_archive(arguments.name, body)
    hint = "" if made["code"] else f"; give it code with 'aether function update {arguments.name} --code DIR'"
    context.result(made, lambda: f"created {made['name']}{hint}\n{_address(context, made)}")
    return 0


def _update(arguments: Arguments, context: Context) -> int:
    from aether.cli.function_code import archive

    functions = context.api.functions
    env: dict[str, str] | None = None
    unset = [check_variable(name) for name in arguments.unset or ()]
    if arguments.env or unset:
        given = variables(arguments.env or (), context.environ)
        if both := sorted(given.keys() & set(unset)):
            raise UsageError(f"{both[0]} is to be set and unset")
        now = functions.get(arguments.name)["env_vars"]
        env = {name: value for name, value in {**now, **given}.items() if name not in unset}
    values = _given(arguments, env)
    if not values and arguments.code is None:
        raise UsageError("nothing to change: give --code, --env or another field")
    with archive(arguments.code) as body:
        # what is run of the code changes with the code, or an instance would look for it in the old one
        beside = {} if body is None else {name: values.pop(name, None) for name in ("entrypoint", "runtime")}
        changed = functions.update(arguments.name, values) if values else functions.get(arguments.name)
        if body is not None:
            changed = functions.put_archive(arguments.name, body, **beside)
    context.result(changed, lambda: f"{changed['name']} is at version {changed['version']}")
    return 0


def _list(arguments: Arguments, context: Context) -> int:
    functions = context.api.functions

    def text(items: Sequence[Function]) -> str:
        rows = (
            (
                one["name"], one["status"], f"v{one['version']}", one["runtime"], len(one["state"]["instances"]),
                f"{one['memory_mb']} MB", one["owner"], moment(one["updated_at"]),
            )
            for one in items
        )  # fmt: skip
        return table(("NAME", "STATUS", "VERSION", "RUNTIME", "INSTANCES", "MEMORY", "OWNER", "CHANGED"), rows)

    def page(limit: int | None, cursor: str | None) -> Page[Function]:
        return functions.page(q=arguments.filter, limit=limit, cursor=cursor)

    return _paged(arguments, context, page, text, "no functions")


def _show(arguments: Arguments, context: Context) -> int:
    found = context.api.functions.get(arguments.name)
    context.result(found, lambda: _described(context, found))
    return 0


def _described(context: Context, one: Function) -> str:
    code, state, failed = one["code"], one["state"], one["state"]["last_failure"]
    env = " ".join(f"{name}={value}" for name, value in sorted(one["env_vars"].items()))
    what = f"{code['form']} {code['digest'][:12]}, {size(code['size_bytes'])}" if code else "none yet"
    parts = [
        fields(
            (
                ("name", one["name"]),
                ("status", one["status"]),
                ("url", _address(context, one)),
                ("version", f"v{one['version']}, by {one['updated_by']} at {moment(one['updated_at'])}"),
                ("code", what),
                ("runtime", f"{one['runtime']}, {one['entrypoint']}"),
                ("size", f"{one['vcpu']} vCPU, {one['memory_mb']} MB"),
                ("port", one["port"]),
                ("timeout", f"{one['timeout_secs']:g} s"),
                ("concurrency", one["concurrency"]),
                ("instances", f"{one['min_instances']} to {one['max_instances']}"),
                ("snapshot", "used" if one["snapshot"] else ""),
                ("env", env),
                ("owner", one["owner"]),
                ("waiting", state["waiting"] or ""),
            )
        )
    ]
    if state["instances"]:
        rows = (
            (each["id"], f"v{each['version']}", each["stage"], each["in_flight"], moment(each["since"]))
            for each in state["instances"]
        )
        parts.append(table(("INSTANCE", "VERSION", "STAGE", "REQUESTS", "SINCE"), rows))
    if failed is not None:
        again = f"; tried again at {moment(state['retry_at'])}" if state["retry_at"] else ""
        lines = [f"last failure, v{failed['version']} at {moment(failed['at'])}: {escape(failed['reason'])}{again}"]
        parts.append("\n".join([*lines, *(f"  | {escape(line)}" for line in failed["log"])]))
    return "\n\n".join(parts)


def _transfer(arguments: Arguments, context: Context) -> int:
    changed = context.api.functions.transfer(arguments.name, arguments.to)
    context.result(changed, lambda: f"{changed['name']} belongs to {changed['owner']} now")
    return 0


def _delete(arguments: Arguments, context: Context) -> int:
    name = arguments.name
    if not arguments.yes:
        if not sys.stdin.isatty():
            raise UsageError(f"deleting {name} cannot be undone: add --yes")
        sys.stderr.write(f"This ends {name} and deletes its versions and records. Type its name to go on: ")
        sys.stderr.flush()
        if sys.stdin.readline().strip() != name:
            raise UsageError("nothing was deleted")
    context.api.functions.delete(name)
    context.result({"deleted": name}, lambda: f"deleted {name}")
    return 0


def _versions(arguments: Arguments, context: Context) -> int:
    def text(items: Sequence[Any]) -> str:
        rows = (
            (
                f"v{one['version']}{' *' if one['current'] else ''}",
                one["code"]["digest"][:12] if one["code"] else None,
                f"{one['runtime']} {one['entrypoint']}", f"{one['memory_mb']} MB", moment(one["created_at"]),
                one["created_by"], f"as v{one['rollback_of']}" if one["rollback_of"] else "",
            )
            for one in items
        )  # fmt: skip
        return table(("VERSION", "CODE", "RUNS", "MEMORY", "CREATED", "BY", "ROLLBACK"), rows)

    functions = context.api.functions
    return _paged(
        arguments,
        context,
        lambda limit, cursor: functions.versions(arguments.name, limit=limit, cursor=cursor),
        text,
        "no versions",
    )


def _rollback(arguments: Arguments, context: Context) -> int:
    changed = context.api.functions.rollback(arguments.name, arguments.to)
    context.result(changed, lambda: f"{changed['name']} is at version {changed['version']}")
    return 0


def _logs(arguments: Arguments, context: Context) -> int:
    lines = context.api.functions.logs(arguments.name, arguments.tail)
    terminal = sys.stdout.isatty()

    def text() -> str:
        return "\n".join(
            f"{line['time']} {line['instance'][-8:]} {'!' if line['stream'] == 'stderr' else '|'} "
            + (escape(line["line"], keep="\t") if terminal else line["line"])
            for line in lines
        )

    context.result({"items": lines}, text)
    if not lines and not context.as_json:
        context.log.info(f"{arguments.name} has written nothing, or nothing of it is left")
    return 0


def _invocations(arguments: Arguments, context: Context) -> int:
    def text(items: Sequence[Any]) -> str:
        rows = (
            (
                moment(one["started_at"]), one["status"], f"{one['duration_ms']:.1f} ms", one["start"],
                f"v{one['version']}", one["instance"][-8:], one["method"], one["path"],
            )
            for one in items
        )  # fmt: skip
        return table(("STARTED", "STATUS", "TOOK", "START", "VERSION", "INSTANCE", "METHOD", "PATH"), rows)

    functions = context.api.functions
    return _paged(
        arguments,
        context,
        lambda limit, cursor: functions.invocations(arguments.name, limit=limit, cursor=cursor),
        text,
        "no calls yet",
    )


def _paged(
    arguments: Arguments,
    context: Context,
    fetch: Callable[[int | None, str | None], Page[Item]],
    text: Callable[[Sequence[Item]], str],
    nothing: str,
) -> int:
    """Print one page, or all of them with --all."""
    from aether.client.api import pages

    if arguments.all:
        items, following = list(pages(lambda cursor: fetch(500, cursor))), None
    else:
        page = fetch(arguments.limit, arguments.cursor)
        items, following = page["items"], page["next_cursor"]
    context.result({"items": items, "next_cursor": following}, lambda: text(items) if items else nothing)
    if following and not context.as_json:
        context.log.info(f"there are more: --all, or --cursor {following}")
    return 0


def _address(context: Context, one: Function) -> str:
    return context.api.base.rstrip("/") + one["url"]
