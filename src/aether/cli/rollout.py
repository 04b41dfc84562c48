"""Waiting for a rollout the way every verb that starts one does.

Whatever ends the wait early (Ctrl-C, SIGTERM, the client's own deadline) cancels the rollout on the server and waits
for its word; a second Ctrl-C leaves at once. What runs in the end is said, never guessed.
"""

from __future__ import annotations

import time

from aether.cli.interrupts import Interrupts
from aether.cli.output import escape
from aether.model.errors import AetherError, Conflict, NotFound, RolloutFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from aether.cli.context import Context
    from aether.cli.progress import Progress
    from aether.client.wire import Deployment, DeploymentEvent

GRACE_S = 15.0
"""The server ends a rollout by its own deadline; only when it has not by then does the client cancel."""
CANCEL_WAIT_S = 30.0
SETTLED = frozenset({"active", "failed", "cancelled", "rolled_back", "superseded"})


def roll_out(
    context: Context, start: Callable[[], Deployment], *, timeout_s: float, progress: Progress, detach: bool = False
) -> Deployment:
    """Start a rollout and wait for the end of it; returns a deployment that is active (any, with `detach`).

    Raises RolloutFailed when the new release does not serve, and KeyboardInterrupt after a cancellation.
    """
    deployment: Deployment | None = None
    said: dict[str, str] = {}
    with Interrupts() as interrupts:
        try:
            # an interrupt must not fall between the server's creating the deployment and our learning its id
            interrupts.hold()
            deployment = start()
            interrupts.release()
            if detach:
                return deployment
            progress.begin("rollout")
            deployment = _watch(context, deployment, timeout_s, progress, said)
        except KeyboardInterrupt as interrupt:
            if deployment is None or detach:
                raise
            outcome = _after_cancel(context, deployment, progress)
            raise type(interrupt)(f"interrupted: {outcome}") from None
    if deployment["status"] != "active":
        raise _failure(context, deployment, said.get(deployment["status"], ""))
    return deployment


def _watch(
    context: Context, deployment: Deployment, timeout_s: float, progress: Progress, said: dict[str, str]
) -> Deployment:
    """Wait for the end; `said` gets the newest message of each phase."""
    if deployment["status"] in SETTLED:
        return deployment

    def on_event(event: DeploymentEvent) -> None:
        said[event["phase"]] = event["message"]
        progress.step(f"{event['phase']}: {event['message']}" if event["message"] else event["phase"])

    # a server of an earlier minor version does not tell, and has no rollouts that take longer
    longest = max(timeout_s, deployment.get("longest_secs", 0.0))
    try:
        return context.api.watch_deployment(
            deployment["id"], on_event, deadline=time.monotonic() + longest + GRACE_S, on_state=context.log.warn
        )
    except TimeoutError:
        outcome = _after_cancel(context, deployment, progress)
        raise RolloutFailed(f"the rollout did not end within {longest:g} s: {outcome}") from None


def _after_cancel(context: Context, deployment: Deployment, progress: Progress) -> str:
    """Cancel, wait for the server's word and put it in a sentence."""
    progress.step("cancelling (interrupt again to leave at once)")
    try:
        settled = _cancel(context, deployment)
    except AetherError as error:
        return f"the rollout could not be cancelled ({error.message}); see 'aether status --app {deployment['app']}'"
    except TimeoutError:
        return f"the server has not ended the rollout yet; see 'aether status --app {deployment['app']}'"
    if settled["status"] == "active":
        return f"too late to cancel, release v{settled['release']} is serving"
    return f"the rollout is {settled['status'].replace('_', ' ')}; {serving(context, deployment['app'])}"


def _cancel(context: Context, deployment: Deployment) -> Deployment:
    api = context.api
    try:
        settled = api.cancel_deployment(deployment["id"])
    except Conflict:
        settled = api.deployment(deployment["id"])
    if settled["status"] in SETTLED:
        return settled
    return api.watch_deployment(deployment["id"], _ignore, deadline=time.monotonic() + CANCEL_WAIT_S)


def _ignore(_event: DeploymentEvent) -> None:
    """The way to a cancelled state is of no interest."""


def _failure(context: Context, deployment: Deployment, message: str) -> RolloutFailed:
    """Show the app's own last lines and say what went wrong and what serves now."""
    app, error = deployment["app"], deployment["error"]
    if deployment["status"] == "superseded":
        why = "was replaced by a later deployment"
    elif error is not None:
        why = error["message"].rstrip(".")
    else:
        why = f"the rollout was {deployment['status'].replace('_', ' ')}" + (f": {message}" if message else "")
    if error is not None and error["log_tail"]:
        context.log.line(f"last lines of {app}:")
        for line in error["log_tail"]:
            context.log.line(f"  | {escape(line)}")
    return RolloutFailed(f"{app}: {why}; {serving(context, app)}")


def serving(context: Context, app: str) -> str:
    """Which release of `app` serves, in words."""
    try:
        now = context.api.app(app)
    except NotFound:
        return "the app does not exist any more"
    except AetherError as error:
        return f"what serves now is unknown ({error.message})"
    if now["release"] is None:
        return "nothing serves"
    version = f"release v{now['release']['version']}"
    return (
        f"{version} keeps serving" if now["instances"]["ready"] else f"{version} is active but has no ready instance"
    )
