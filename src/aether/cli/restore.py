"""`aether restore`: a data directory from a backup, verified before anything is touched."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from aether.cli.arguments import add_format
from aether.cli.passphrase import read
from aether.cli.up import DATA_DIR_HELP
from aether.model.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context


def configure(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="the backup (- is standard input)")
    parser.add_argument("--data-dir", metavar="DIR", help=DATA_DIR_HELP)
    parser.add_argument(
        "--passphrase-file", metavar="FILE", help="its first line opens the keys (default: asked on the terminal)"
    )
    parser.add_argument(
        "--force", action="store_true", help="also when the folder is not empty; it is kept under another name"
    )
    parser.add_argument("--verify", action="store_true", help="only read the backup and say whether it is whole")
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    from aether.backup.restore import keys_are_elsewhere
    from aether.settings import load
    from aether.topology import backups

    given = Path(arguments.data_dir).expanduser().absolute() if arguments.data_dir else None
    target = load(context.environ, data_dir=given).data_dir

    def passphrase() -> str:
        if (found := read(arguments.passphrase_file, new=False)) is None:
            raise UsageError("the keys in this backup are sealed: give its passphrase with --passphrase-file FILE")
        return found

    began = time.monotonic()
    with sys.stdin.buffer if arguments.file == "-" else open(arguments.file, "rb") as source:
        if arguments.verify:
            found = backups.look_at(source, target, passphrase)
        else:
            found = backups.put_back(source, target, passphrase, force=bool(arguments.force))
    seconds = round(time.monotonic() - began, 2)
    header = found.header
    result = {
        "data_dir": None if arguments.verify else str(target),
        "created_at": header["created_at"],
        "schema": header["schema"],
        "keys": header["keys"],
        "counts": header["counts"],
        "missing": sorted(header["missing"]),
        "members": found.members,
        "size_bytes": found.size_bytes,
        "before": None if found.before is None else str(found.before),
        "seconds": seconds,
    }
    if header["missing"]:
        context.log.warn(f"{len(header['missing'])} artifacts were missing already when the backup was made")
    if keys_are_elsewhere(header) and not arguments.verify:
        context.log.warn(f"the backup has no keys: put your secrets.key into {target} before 'aether up'")

    def text() -> str:
        counts = ", ".join(f"{count} {name}" for name, count in header["counts"].items())
        if arguments.verify:
            return f"the backup of {header['created_at']} is whole: {found.members} members, {counts} ({seconds} s)"
        kept = f"; the old directory is {found.before}" if found.before else ""
        return f"{target} is the server of {header['created_at']}: {counts} ({seconds} s){kept}"

    context.result(result, text)
    return 0
