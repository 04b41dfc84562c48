"""The end of `aether deploy` for a function: code and fields as one version, and the wait for its first instance.

A version of which no instance comes to serve is undone as a failed rollout is: the one before is current again.
"""

from __future__ import annotations

import time

from aether.cli.interrupts import Interrupts
from aether.cli.output import escape
from aether.model.errors import AetherError, Conflict, NotFound, RolloutFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from aether.build.project import Made
    from aether.cli.arguments import Arguments
    from aether.cli.context import Context
    from aether.cli.progress import Progress
    from aether.client.function_wire import Function, FunctionFailure

_FIRST_LOOK_S, _LAST_LOOK_S = 0.05, 0.5
_PACKAGES = b".aether/python"


def serve(context: Context, progress: Progress, made: Made, arguments: Arguments) -> dict[str, Any]:
    """Give the function the artifact that was uploaded and wait until an instance serves; returns what the result
    says of it. Raises RolloutFailed, and KeyboardInterrupt after undoing."""
    name = made.plan.project.app
    functions = context.api.functions
    before = _before(context, made)
    values = _values(made, before)
    now: Function | None = None
    with Interrupts() as interrupts:
        try:
            # an interrupt must not fall between the server's change and our learning of it
            interrupts.hold()
            now = functions.put_artifact(name, made.packed.digest, app=name, values=values)
            interrupts.release()
            if not arguments.detach:
                progress.begin("rollout")
                functions.warm(name)
                _until_serving(context, progress, now, before, arguments.timeout)
        except KeyboardInterrupt as interrupt:
            if now is None or arguments.detach:
                raise
            raise type(interrupt)(f"interrupted: {_undo(context, now, before)}") from None
        except RolloutFailed as error:
            assert now is not None
            raise RolloutFailed(f"{name}: {error.message}; {_undo(context, now, before)}") from None
    if not arguments.detach:
        repeated = now["version"] == before["version"]
        progress.end(f"version {now['version']} {'was there already and ' if repeated else ''}serves")
    url = context.api.base.rstrip("/") + now["url"]
    return {
        "function": name,
        "version": now["version"],
        "url": url,
        "status": "deployed" if arguments.detach else "active",
    }


def _before(context: Context, made: Made) -> Function:
    """The function as it is; made if there is none."""
    functions, project = context.api.functions, made.plan.project
    try:
        return functions.get(project.app)
    except NotFound:
        try:
            return functions.create({"name": project.app, **(project.function or {}), "env_vars": dict(project.env)})
        except Conflict:
            # somebody else was faster, which is as good; unless it is theirs, and then this says so
            return functions.get(project.app)


def _values(made: Made, before: Function) -> dict[str, Any]:
    """The fields that the project names; variables are added to those that there are."""
    project = made.plan.project
    env = {**before["env_vars"], **project.env, **made.plan.options.env}
    if any(entry.name == _PACKAGES for entry in made.prepared.entries):
        env.setdefault("PYTHONPATH", f"/app/{_PACKAGES.decode()}")
    return {**(project.function or {}), "env_vars": env}


def _until_serving(
    context: Context, progress: Progress, now: Function, before: Function, timeout_s: float
) -> None:  # fmt: skip
    """Returns when an instance of the version serves. Raises RolloutFailed, with the log shown, when one failed or
    the time is over."""
    name, version = now["name"], now["version"]
    known = before["state"]["last_failure"]
    deadline = time.monotonic() + timeout_s
    pause = _FIRST_LOOK_S
    while True:
        found = context.api.functions.get(name)
        state = found["state"]
        if found["version"] != version:
            raise RolloutFailed(f"version {version} was replaced by version {found['version']}")
        stages = [one["stage"] for one in state["instances"] if one["version"] == version]
        if "serving" in stages:
            return
        failed = state["last_failure"]
        if failed is not None and failed != known and failed["version"] == version:
            _show(context, name, failed)
            raise RolloutFailed(f"an instance of version {version} failed: {failed['reason'].rstrip('.')}")
        if time.monotonic() >= deadline:
            raise RolloutFailed(f"no instance of version {version} served within {timeout_s:g} s")
        progress.step(stages[0] if stages else "waiting for an instance")
        time.sleep(pause)  # the state is not streamed
        pause = min(pause * 1.5, _LAST_LOOK_S)


def _show(context: Context, name: str, failed: FunctionFailure) -> None:
    if failed["log"]:
        context.log.line(f"last lines of {name}:")
        for line in failed["log"]:
            context.log.line(f"  | {escape(line)}")


def _undo(context: Context, now: Function, before: Function) -> str:
    """Make the version before current again, if there was one that could run; what is so now, in words."""
    if now["version"] == before["version"] or before["code"] is None:
        return "nothing was undone: there is no version before that could serve"
    try:
        current = context.api.functions.get(now["name"])
        if current["version"] != now["version"]:
            return f"version {current['version']} is current"
        undone = context.api.functions.rollback(now["name"], before["version"])
    except AetherError as error:
        return f"the version before is not current again ({error.message}); see 'aether function show {now['name']}'"
    return f"version {before['version']} is current again, as version {undone['version']}"
