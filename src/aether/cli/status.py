"""`aether status`: how an app is doing, and how its newest deployment went when that is another one."""

from __future__ import annotations

from aether.cli.arguments import add_app, add_format
from aether.cli.output import escape, fields, moment
from aether.cli.project import app_of
from aether.cli.scale import count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context
    from aether.client.wire import App, Deployment, Process


def configure(parser: Parser) -> None:
    add_app(parser)
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    name = app_of(arguments)
    app = context.api.app(name)
    newest = context.api.app_deployments(name, limit=1)["items"]
    last = newest[0] if newest else None
    context.result({**app, "last_deployment": last}, lambda: text(app, last))
    return 0


def text(app: App, last: Deployment | None) -> str:
    """The state of an app as aligned lines."""
    release = app["release"]
    lines = fields(
        (
            ("app", app["name"]),
            ("status", app["status"]),
            ("url", app["url"]),
            ("release", f"v{release['version']} since {moment(release['created_at'])}" if release else "none"),
            ("digest", release["digest"] if release else ""),
            *((process["name"], _process(process)) for process in app["processes"]),
            ("owner", app["owner"]),
        )
    )
    if last is None or (release is not None and last["id"] == release["deployment_id"]):
        return lines
    said = f"\nlast deployment {last['id']} is {last['status'].replace('_', ' ')} ({moment(last['created_at'])})"
    if (step := last.get("step")) is not None:  # a server of an earlier version names none
        said += f": step {step['number']} of {step['of']}, {step['percent']}% of the requests go to it"
    if last["error"] is not None:
        said += f": {escape(last['error']['message'])}"
        said += "".join(f"\n  | {escape(line)}" for line in last["error"]["log_tail"])
    return lines + said


def _process(process: Process) -> str:
    """One process type in words."""
    said = count(process)
    if process["schedule"] is not None:
        said += f"; at '{process['schedule']}' {process['timezone']}"
    if process["next_run"] is not None:
        said += f", next {moment(process['next_run'])}"
    last = process["last_run"]
    if last is not None:
        why = f" ({escape(last['message'])})" if last["message"] and last["status"] != "succeeded" else ""
        said += f"; last {moment(last['scheduled_at'])} {last['status'].replace('_', ' ')}{why}"
    return said
