"""`aether deploy --dry-run`: what would be run, packed and written, what is left out and why.

Writes nothing, builds nothing and asks no server. Digests, and the paths that carry them, are null: nobody knows them
before something is built. Where provenance is to be made, git is asked, within its time.
"""

from __future__ import annotations

from aether.cli.output import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from aether.build.project import Plan
    from aether.cli.context import Context
    from aether.cli.documents import Wanted


def dry_run(context: Context, found: Plan, wanted: Wanted, detect_ms: float) -> int:
    """Print the plan `found`; returns the exit code."""
    from aether.artifact.tree import DIRECTORY, show

    project = found.project
    would = sorted(show(entry.name) + ("/" if entry.kind == DIRECTORY else "") for entry in found.entries)
    result: dict[str, Any] = dict.fromkeys(
        ("artifact", "digest", "size_bytes", "manifest", "sbom", "signature", "provenance")
    )
    result.update(app=project.app, deployment_id=None, url=None, status="dry_run")
    phases = dict.fromkeys(("detect", "install", "pack", "upload", "rollout", "total"))
    result["timings_ms"] = {**phases, "detect": round(detect_ms, 1), "total": round(detect_ms, 1)}
    result.update(bytes_uploaded=0, bytes_reused=0, runtime=project.runtime, start=project.start)
    result.update(processes=dict(project.processes), release_command=project.release_command)
    if project.function is not None:
        result["function"] = dict(project.function)
    result["steps"] = list(found.steps)
    result["would_pack"] = would
    result["excluded"] = [{"path": item.path, "reason": item.reason} for item in found.excluded]
    names, more = wanted.foreseen(project.root)
    result["would_write"] = names
    result.update(more)

    def text() -> str:
        what = "app" if project.function is None else "function"
        lines = [
            f"{what} {project.app}: {project.kind} project, {project.runtime}, started by '{escape(project.start)}'"
        ]
        for name, process in sorted(project.processes.items()):
            when = f"cron '{process['schedule']}'" if "schedule" in process else "worker"
            lines.append(f"{name}: {when}, started by '{escape(process['command'])}'")
        if project.release_command:
            lines.append(f"release command '{escape(project.release_command['command'])}'")
        lines += [f"would run    {escape(step)}" for step in found.steps]
        lines += [f"would pack   {name}" for name in would]
        lines += [f"would write  {name}" for name in names]
        lines += [f"leaves out   {escape(item.path)}  ({escape(item.reason)})" for item in found.excluded]
        if "note" in more:
            lines.append("no provenance: git did not answer in time")
        return "\n".join(lines)

    context.result(result, text)
    return 0
