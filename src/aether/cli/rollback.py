"""`aether rollback`: make an earlier release the active one again and wait until it is."""

from __future__ import annotations

from aether.cli.arguments import add_app, add_format, add_timeout
from aether.cli.progress import progress_for
from aether.cli.project import app_of
from aether.cli.releases import find
from aether.model.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context
    from aether.client.wire import Deployment, Release


def configure(parser: Parser) -> None:
    parser.add_argument(
        "to",
        nargs="?",
        metavar="TO",
        help="vN, at least 7 characters of a digest, or a deployment id (default: the release before the active one)",
    )
    add_app(parser)
    add_timeout(parser)
    parser.add_argument("--detach", action="store_true", help="do not wait for the rollout")
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    from aether.cli.rollout import roll_out
    from aether.client.api import new_key, pages

    app, api = app_of(arguments), context.api
    releases = list(pages(lambda cursor: api.releases(app, limit=500, cursor=cursor)))
    target = choose(releases, arguments.to, app)

    def start() -> Deployment:
        return api.rollback(app, deployment_id=target["deployment_id"], idempotency_key=new_key())

    with progress_for(context.log) as progress:
        deployment = roll_out(
            context, start, timeout_s=arguments.timeout, progress=progress, detach=bool(arguments.detach)
        )
        if not arguments.detach:
            progress.end(f"release v{deployment['release']} is serving")
    what = f"v{target['version']} ({target['digest'][:12]})"
    said = "rolling back" if arguments.detach else "rolled back"
    now = "" if arguments.detach else f", now release v{deployment['release']}"
    context.result(
        {**deployment, "rolled_back_to": target["version"]},
        lambda: f"{said} {app} to {what}{now}\n{deployment['url']}",
    )
    return 0


def choose(releases: list[Release], to: str | None, app: str) -> Release:
    """The release to go back to. Raises UsageError, NotFound."""
    if to:
        return find(releases, to, app)
    active = next((at for at, release in enumerate(releases) if release["status"] == "active"), None)
    earlier = releases if active is None else releases[active + 1 :]
    if not earlier:
        raise UsageError(f"{app} has no earlier release to go back to")
    return earlier[0]
