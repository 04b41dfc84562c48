"""`aether function runtimes`: what functions can be written for, and root file systems that admins register."""

from __future__ import annotations

import os

from aether.cli.output import moment, size, table
from aether.model.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context
    from aether.client.function_wire import Runtime


def configure(parser: Parser) -> None:
    parser.add_argument(
        "step", nargs="?", choices=("list", "add", "remove"), help="what to do (list); the others are for admins"
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the runtime that is added or removed")
    parser.add_argument("--rootfs", metavar="FILE", help="add: a squashfs image, the machines' root file system")
    parser.add_argument(
        "--init", metavar="COMMAND", help="add: what is put before the entrypoint, e.g. '/usr/bin/deno run'"
    )


def run(arguments: Arguments, context: Context) -> int:
    step, name = arguments.step or "list", arguments.name
    if step != "list" and name is None:
        raise UsageError(f"which runtime? Write 'aether function runtimes {step} NAME'")
    if step != "add" and (arguments.rootfs is not None or arguments.init is not None):
        raise UsageError("--rootfs and --init are of 'aether function runtimes add'")
    if step == "add":
        return _add(arguments, context)
    if step == "remove":
        context.api.functions.remove_runtime(name)
        context.result({"removed": name}, lambda: f"removed {name}")
        return 0
    if name is not None:
        raise UsageError("'aether function runtimes list' takes no NAME")
    found = context.api.functions.runtimes()
    context.result({"items": found}, lambda: _text(found))
    return 0


def _add(arguments: Arguments, context: Context) -> int:
    import shlex

    from aether.client.upload import FilePart, SourceFile

    if arguments.rootfs is None or arguments.init is None:
        raise UsageError("a runtime needs --rootfs FILE and --init COMMAND")
    try:
        init = shlex.split(arguments.init)
    except ValueError as error:
        raise UsageError(f"--init cannot be read as words: {error}") from None
    if not os.path.isfile(arguments.rootfs):
        raise UsageError(f"--rootfs: there is no file '{arguments.rootfs}'")
    with SourceFile(arguments.rootfs) as source:
        body = FilePart(source, 0, source.size, lambda _: None)
        made = context.api.functions.add_runtime(arguments.name, init, body)
    context.result(made, lambda: f"added {made['name']}, {(made['digest'] or '')[:12]}")
    return 0


def _text(items: list[Runtime]) -> str:
    rows = (
        (
            one["name"],
            "shipped" if one["shipped"] else (one["digest"] or "")[:12],
            "" if one["size_bytes"] is None else size(one["size_bytes"]),
            " ".join(one["init"] or ()),
            "" if one["created_at"] is None else moment(one["created_at"]),
            one["created_by"] or "",
        )
        for one in items
    )
    return table(("NAME", "IMAGE", "SIZE", "COMMAND", "CREATED", "BY"), rows)
