"""`aether gc`: take away old artifacts, failed deployments and leftovers now; for admins."""

from __future__ import annotations

from aether.cli.arguments import add_format
from aether.cli.output import escape, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context

_UNITS = ("B", "KiB", "MiB", "GiB")


def configure(parser: Parser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what would go and take nothing away")
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    from aether.model.errors import ServiceUnavailable

    done = context.api.collect_garbage(dry_run=arguments.dry_run)
    rows = done["items"]
    context.result(
        done,
        lambda: table(
            ("WHAT", "WOULD GO" if done["dry_run"] else "GONE", "FREES" if done["dry_run"] else "FREED"),
            ((row["chore"], str(row["deleted"]), _size(row["bytes"]) if row["bytes"] else "-") for row in rows),
        ),
    )
    failed = [f"{row['chore']}: {escape(row['error'])}" for row in rows if row["error"]]
    if failed:
        raise ServiceUnavailable(f"not everything could be looked at: {'; '.join(failed)}")
    return 0


def _size(count: float) -> str:
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.1f} {_UNITS[unit]}" if unit else f"{count:.0f} B"
