"""`aether deploy`: detect, install, pack, upload, roll out, and say what came of it.

    --dry-run     lists what would be packed and what not; runs no tool, writes nothing, asks no server
    --pack-only   writes artifact, manifest and the other documents (`documents`); asks no server
    --no-upload   as --pack-only, and asks the registry whether it has this artifact already; changes nothing there

Artifacts go to --out, else to a folder for each app in the cache directory, where the newest few are kept.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from aether.cli.arguments import add_format, add_timeout, seconds
from aether.cli.artifacts import folder_of, prune
from aether.cli.documents import Documents, Wanted, make, send
from aether.cli.dry_run import dry_run
from aether.cli.output import escape, size
from aether.cli.progress import progress_for
from aether.cli.project import variables
from aether.model.errors import NetworkError, NotFound, UsageError
from aether.model.names import check_app_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from aether.build.project import Made, Options, Plan
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context
    from aether.cli.progress import Progress
    from aether.client.wire import Deployment

STRATEGIES = ("rolling", "recreate", "canary", "bluegreen")


def configure(parser: Parser) -> None:
    parser.add_argument("folder", nargs="?", default=".", metavar="DIR", help="the project (default: this folder)")
    parser.add_argument("--app", metavar="NAME", help="name of the app (default: from the project)")
    parser.add_argument(
        "--env", action="append", metavar="K=V", help="a variable of this release; K alone takes it from here"
    )
    parser.add_argument(
        "--runtime", metavar="NAME", help="e.g. node22, python3.11, static, binary (default: detected)"
    )
    parser.add_argument("--start", metavar="CMD", help="start command (default: from the project)")
    parser.add_argument(
        "--strategy", metavar="NAME", help=f"{', '.join(STRATEGIES)} (default: from aether.toml, else rolling)"
    )
    parser.add_argument(
        "--canary-steps",
        type=percentages,
        metavar="N,N,...",
        help="shares of the requests in percent (1,5,25,50,100)",
    )
    parser.add_argument("--step-time", type=seconds, metavar="SECONDS", help="longest time of a canary step (30)")
    parser.add_argument(
        "--bake-time", type=seconds, metavar="SECONDS", help="how long bluegreen can still switch back (30)"
    )
    add_timeout(parser)
    parser.add_argument("--detach", action="store_true", help="do not wait for the rollout")
    parser.add_argument("--dry-run", action="store_true", help="show what would be packed and why not; do nothing")
    parser.add_argument("--pack-only", action="store_true", help="stop when the artifact is written")
    parser.add_argument(
        "--no-upload", action="store_true", help="as --pack-only, and ask whether the registry has the artifact"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for artifact and documents (default: in the cache)")
    parser.add_argument("--compression-level", type=level, default=2, metavar="N", help="0 to 9 (2)")
    parser.add_argument("--no-cache", action="store_true", help="install dependencies anew")
    parser.add_argument("--ignore-scripts", action="store_true", help="run no install scripts of dependencies")
    parser.add_argument("--no-sbom", action="store_true", help="write no bill of materials")
    parser.add_argument(
        "--legacy-sbom", action="store_true", help="bill of materials as aether-sbom-v1, not CycloneDX"
    )
    parser.add_argument(
        "--dev-hot", action="store_true", help="swap code in running pods (not offered by this version)"
    )
    add_format(parser)


def level(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= 9:
        raise UsageError(f"--compression-level is a number from 0 to 9, not '{text}'")
    return int(text)


def percentages(text: str) -> list[int]:
    """`5,25,100` as numbers that rise to 100."""
    words = [word.strip().removesuffix("%") for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() for word in words):
        raise UsageError(f"--canary-steps is a list of percentages such as 5,25,100, not '{text}'")
    found = [int(word) for word in words]
    if found[0] < 1 or found[-1] != 100 or found != sorted(set(found)):
        raise UsageError(f"--canary-steps must rise from at least 1 to 100, not '{text}'")
    return found


def run(arguments: Arguments, context: Context) -> int:
    _check(arguments)
    started = time.monotonic()
    options = _options(arguments, context)
    wanted = Wanted(arguments, context.environ)
    with progress_for(context.log) as progress:
        from aether.build.plan import plan

        progress.begin("detect")
        root = Path(arguments.folder)
        found = plan(root, options)
        for note in found.project.notes:
            progress.note(note)
        if found.project.function is not None:
            _check_function(arguments)
        if arguments.dry_run:
            return dry_run(context, found, wanted, (time.monotonic() - started) * 1000)
        offline = arguments.pack_only or arguments.no_upload
        known = False if arguments.pack_only else _known(context, found.project.app, must_answer=not offline)
        what = "app" if found.project.function is None else "function"
        progress.end(f"{found.project.kind} project, {found.project.runtime}, {what} {found.project.app}")
        made, documents = _make(context, progress, found, arguments, wanted)
        result = _described(made, documents)
        if not offline:
            _ship(context, progress, made, documents, known, arguments, result)
        elif arguments.no_upload and context.api.has_artifact(made.packed.digest):
            result["bytes_reused"] = made.packed.size_bytes
    result["timings_ms"]["total"] = round((time.monotonic() - started) * 1000, 1)
    context.result(result, lambda: _said(result, detached=bool(arguments.detach)))
    return 0


def _check(arguments: Arguments) -> None:
    if arguments.dev_hot:
        raise UsageError("--dev-hot is not offered by this version")
    if arguments.legacy_sbom and arguments.no_sbom:
        raise UsageError("--legacy-sbom and --no-sbom exclude each other")
    for flag, value in (("--app", arguments.app), ("--start", arguments.start), ("--runtime", arguments.runtime)):
        if value is not None and not value.strip():
            raise UsageError(f"{flag} is empty")
    if arguments.strategy is not None and arguments.strategy not in STRATEGIES:
        raise UsageError(f"--strategy is one of {', '.join(STRATEGIES)}, not '{arguments.strategy}'")
    if not os.path.isdir(arguments.folder):
        raise UsageError(f"'{arguments.folder}' is not a folder")
    if arguments.app:
        check_app_name(arguments.app)


def _check_function(arguments: Arguments) -> None:
    """Raises UsageError for a flag that is for apps only."""
    for flag in ("--start", "--strategy", "--canary-steps", "--step-time", "--bake-time"):
        if getattr(arguments, flag[2:].replace("-", "_")) is not None:
            raise UsageError(f"{flag} is not for functions")


def _options(arguments: Arguments, context: Context) -> Options:
    from aether.build.project import Options

    return Options(
        app=arguments.app,
        runtime=arguments.runtime,
        start=arguments.start,
        cache=not arguments.no_cache,
        ignore_scripts=bool(arguments.ignore_scripts),
        env=variables(arguments.env or (), context.environ),
    )


def _known(context: Context, app: str, *, must_answer: bool) -> bool:
    """Whether the server has the app. Asked before the build, so that a missing login does not cost one."""
    try:
        context.api.app(app)
    except NotFound:
        return False
    except NetworkError:
        if must_answer:
            raise
        return False
    return True


def _make(
    context: Context, progress: Progress, found: Plan, arguments: Arguments, wanted: Wanted
) -> tuple[Made, Documents]:
    """Install and pack; the phases one by one, so that each line can say what really happened."""
    from aether.artifact.pack import pack
    from aether.build.plan import prepare
    from aether.build.project import Made

    out = Path(arguments.out) if arguments.out else folder_of(context, found.project.app)
    git = wanted.ask_git(found.project.root)
    try:
        progress.begin("install")
        with prepare(found, on_line=progress.output) as prepared:
            cached = "dependencies from the cache" if found.steps else "nothing to install"
            install_ms = progress.end(cached if prepared.cached else "; ".join(found.steps))
            progress.begin("pack")
            packed = pack(prepared.entries, out, level=arguments.compression_level, progress=progress.advance)
            pack_ms = progress.end(f"{packed.files} files, {size(packed.size_bytes)}, {packed.digest[:12]}")
            documents = make(context, progress, prepared, packed, wanted, git)
    finally:
        if git is not None:
            git.end()
    if not arguments.out:
        prune(out, packed.artifact)
    # what the documents of an artifact take is part of making it
    timings = {"detect": found.detect_ms, "install": install_ms, "pack": pack_ms + documents.took_ms}
    return Made(found, prepared, packed, timings), documents


def _ship(
    context: Context,
    progress: Progress,
    made: Made,
    documents: Documents,
    known: bool,
    arguments: Arguments,
    result: dict[str, Any],
) -> None:
    """Upload and roll out; fills in the rest of `result`."""
    from aether.cli.transfer import bring
    from aether.client.trace import traceparent

    app, digest = made.plan.project.app, made.packed.digest
    context.api.transport.traceparent = traceparent(context.environ)
    progress.begin("upload")
    if not known:
        _create(context, app)
    sent = bring(context, progress, made, signature=documents.signature_hex).bytes_sent
    reused = max(0, made.packed.size_bytes - sent)
    beside = send(context, app, digest, documents, known=not sent)
    what = f"{size(sent)} sent" if sent else f"nothing to send, the registry has it ({size(reused)})"
    with_documents = f", documents {size(beside)}" if beside else ""
    result["timings_ms"]["upload"] = round(progress.end(what + with_documents), 1)
    result["bytes_uploaded"], result["bytes_reused"] = sent, reused
    started = time.monotonic()
    if made.plan.project.function is not None:
        from aether.cli.function_deploy import serve

        result.update(serve(context, progress, made, arguments))
    else:
        deployment = _roll_out(context, progress, made, arguments)
        result.update(deployment_id=deployment["id"], url=deployment["url"], status=deployment["status"])
    result["timings_ms"]["rollout"] = round((time.monotonic() - started) * 1000, 1)


def _create(context: Context, app: str) -> None:
    from aether.model.errors import Conflict

    try:
        context.api.create_app(app)
    except Conflict:
        # somebody else was faster, which is as good; unless it is theirs, and then the next call says so
        context.log.debug("the app exists by now", app=app)


def _roll_out(context: Context, progress: Progress, made: Made, arguments: Arguments) -> Deployment:
    from aether.cli.rollout import roll_out
    from aether.client.api import new_key

    project = made.plan.project
    repeated = False

    def start() -> Deployment:
        nonlocal repeated
        deployment, created = context.api.create_deployment(
            project.app,
            digest=made.packed.digest,
            runtime=project.runtime,
            command=project.start,
            env={**project.env, **made.plan.options.env},
            health={"path": project.health_path, "port": None} if project.health_path else None,
            processes=project.processes,
            release_command=project.release_command,
            volumes=project.volumes,
            strategy=arguments.strategy or project.strategy or STRATEGIES[0],
            rollout=_rules(project.rollout, arguments),
            timeout_secs=arguments.timeout,
            idempotency_key=new_key(),
        )
        repeated = not created
        return deployment

    deployment = roll_out(
        context, start, timeout_s=arguments.timeout, progress=progress, detach=bool(arguments.detach)
    )
    if not arguments.detach:
        release = f"release v{deployment['release']}"
        progress.end(f"{release} was serving already" if repeated else f"{release} is serving")
    return deployment


def _rules(project: Mapping[str, Any], arguments: Arguments) -> dict[str, Any]:
    """How traffic moves: flags over the project file; nothing given is the server's choice."""
    flags = {
        "steps": arguments.canary_steps,
        "step_secs": arguments.step_time,
        "bake_secs": arguments.bake_time,
    }
    return {**project, **{name: value for name, value in flags.items() if value is not None}}


def _described(made: Made, documents: Documents) -> dict[str, Any]:
    """The result so far."""
    packed = made.packed
    timings = {name: round(took, 1) for name, took in made.timings_ms.items()}
    return {
        "artifact": str(packed.artifact.absolute()),
        "digest": packed.digest,
        "size_bytes": packed.size_bytes,
        **documents.described(),
        "app": made.plan.project.app,
        "deployment_id": None,
        "url": None,
        "status": "packed",
        "timings_ms": {**timings, "upload": None, "rollout": None, "total": None},
        "bytes_uploaded": 0,
        "bytes_reused": 0,
    }


def _said(result: dict[str, Any], *, detached: bool) -> str:
    if result["url"] is None:
        has = "\nthe registry has this artifact already" if result["bytes_reused"] else ""
        return f"{escape(result['artifact'])}\nsha256 {result['digest']}{has}"
    if detached and "function" in result:
        return f"{result['url']}\nversion {result['version']} is current"
    if detached:
        return f"{result['url']}\ndeployment {result['deployment_id']} is {result['status']}"
    return str(result["url"])
