"""`aether releases`: the releases of an app, and what changed between two of them."""

from __future__ import annotations

from aether.cli.arguments import add_app, add_format, page_size
from aether.cli.output import escape, moment, table
from aether.cli.project import app_of
from aether.model.errors import NotFound, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context
    from aether.client.wire import Deployment, ProcessType, Release, VariableChange

MIN_DIGEST_PREFIX = 7
_HEX = frozenset("0123456789abcdef")


def configure(parser: Parser) -> None:
    parser.add_argument("--limit", type=page_size, metavar="N", help="releases per page, at most 500 (50)")
    parser.add_argument("--cursor", metavar="CURSOR", help="where the page before ended")
    parser.add_argument("--all", action="store_true", help="every page")
    add_app(parser)
    add_format(parser)
    diff = parser.add_action("diff", "say what differs between two releases")
    diff.add_argument("a", metavar="A", help="vN, at least 7 characters of a digest, or a deployment id")
    diff.add_argument("b", metavar="B", help="the same")
    diff.add_argument("--files", action="store_true", help="download both artifacts and compare their files")
    add_app(diff)
    add_format(diff)


def run(arguments: Arguments, context: Context) -> int:
    app = app_of(arguments)
    return _diff(arguments, context, app) if arguments.action == "diff" else _list(arguments, context, app)


def _list(arguments: Arguments, context: Context, app: str) -> int:
    if arguments.all:
        items, following = every_release(context, app), None
    else:
        page = context.api.releases(app, limit=arguments.limit, cursor=arguments.cursor)
        items, following = page["items"], page["next_cursor"]

    def text() -> str:
        rows = (
            (
                f"v{release['version']}",
                release["status"],
                release["digest"][:12],
                f"config {release['config_version']}",
                moment(release["created_at"]),
                release["created_by"],
                release["description"],
            )
            for release in items
        )
        return table(("RELEASE", "STATUS", "DIGEST", "CONFIG", "CREATED", "BY", "DESCRIPTION"), rows)

    context.result({"items": items, "next_cursor": following}, lambda: text() if items else f"{app} has no releases")
    if following and not context.as_json:
        context.log.info(f"there are more: --all, or --cursor {following}")
    return 0


def every_release(context: Context, app: str) -> list[Release]:
    """All releases of an app, newest first."""
    from aether.client.api import pages

    return list(pages(lambda cursor: context.api.releases(app, limit=500, cursor=cursor)))


def find(releases: list[Release], to: str, app: str) -> Release:
    """The release that `to` names: `vN`, a digest prefix, or a deployment id. `releases` are newest first.

    Raises NotFound, and UsageError when `to` is no such name or fits several artifacts.
    """
    wanted = to.lower()
    if wanted.removeprefix("v").isdecimal() and (wanted.startswith("v") or len(wanted) < MIN_DIGEST_PREFIX):
        version = int(wanted.removeprefix("v"))
        found = [release for release in releases if release["version"] == version]
    elif "-" in wanted:
        found = [release for release in releases if release["deployment_id"] == wanted]
    elif _HEX.issuperset(wanted) and MIN_DIGEST_PREFIX <= len(wanted) <= 64:
        found = [release for release in releases if release["digest"].startswith(wanted)]
        digests = sorted({release["digest"] for release in found})
        if len(digests) > 1:
            raise UsageError(f"'{wanted}' fits {len(digests)} artifacts of {app}: give more of the digest")
    else:
        raise UsageError(
            f"'{to}' names no release: use vN, {MIN_DIGEST_PREFIX} or more characters of a digest, or a deployment id"
        )
    if not found:
        raise NotFound(f"{app} has no release {to}; 'aether releases --app {app}' lists them")
    return found[0]


def _diff(arguments: Arguments, context: Context, app: str) -> int:
    releases = every_release(context, app)
    a, b = find(releases, arguments.a, app), find(releases, arguments.b, app)
    changes = compare(a, b, context.api.deployment(a["deployment_id"]), context.api.deployment(b["deployment_id"]))
    variables = context.api.changed_variables(app, a["deployment_id"], b["deployment_id"])
    same_content = a["digest"] == b["digest"] or (
        a["content_digest"] is not None and a["content_digest"] == b["content_digest"]
    )
    files: dict[str, list[str]] | None = {"added": [], "removed": [], "changed": []} if same_content else None
    if files is None and arguments.files:
        from aether.cli.contents import compare_artifacts

        files = compare_artifacts(context.api, a["digest"], b["digest"])
    result = {
        "a": a,
        "b": b,
        "same_content": same_content,
        "changes": changes,
        "variables": variables,
        "files": files,
    }

    def text() -> str:
        rows: list[tuple[object, ...]] = [(name, change["a"], change["b"]) for name, change in changes.items()]
        rows += [(f"env {found['name']}", *_hidden(found)) for found in variables]
        lines = [table(("WHAT", f"v{a['version']}", f"v{b['version']}"), rows)] if rows else []
        if files is None:
            lines.append("the files differ (--files says which)")
        for mark, kind in (("+", "added"), ("-", "removed"), ("~", "changed")):
            lines += [f"{mark} {escape(path)}" for path in (files or {}).get(kind, ())]
        return "\n".join(lines) or f"v{a['version']} and v{b['version']} are the same"

    context.result(result, text)
    return 0


def _hidden(found: VariableChange) -> tuple[str | None, str | None]:
    """How a variable's change shows without its values."""
    kind = " (secret)" if found["secret"] else ""
    before = None if found["change"] == "added" else f"****{kind}"
    after = None if found["change"] == "removed" else f"****{kind}"
    return before, f"{after}, another value" if before and after else after


def compare(a: Release, b: Release, da: Deployment, db: Deployment) -> dict[str, dict[str, object]]:
    """What of two releases differs, by name; values of variables stay on the server."""
    types = sorted({*da["processes"], *db["processes"]})
    pairs: dict[str, tuple[object, object]] = {
        "digest": (a["digest"], b["digest"]),
        "runtime": (a["runtime"], b["runtime"]),
        "command": (da["command"], db["command"]),
        **{name: (process(da["processes"].get(name)), process(db["processes"].get(name))) for name in types},
        "release_command": (_release_command(da), _release_command(db)),
        "config_version": (a["config_version"], b["config_version"]),
        "strategy": (da["strategy"], db["strategy"]),
    }
    return {name: {"a": before, "b": after} for name, (before, after) in pairs.items() if before != after}


def process(one: ProcessType | None) -> str | None:
    """A process type in words; None when a release does not have it."""
    if one is None:
        return None
    if one["kind"] == "cron":
        zone = one.get("timezone", "UTC")
        return f"{one['command']} (at '{one.get('schedule')}' {zone}, at most {one.get('timeout_secs', 0):g} s)"
    return f"{one['command']} (settles in {one.get('settle_secs', 0):g} s)"


def _release_command(deployment: Deployment) -> str | None:
    found = deployment["release_command"]
    return f"{found['command']} (at most {found['timeout_secs']:g} s)" if found else None
