"""The facade the CLI calls: plan (nothing runs), prepare (install and build), make (all of it, timed).

    planned = plan(root, Options(app="shop"))
    made = make(planned, out_dir, on_line=print)

How each kind of project is installed is in `nodejs` and `python`; what is packed is in `ignore`.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from aether.build.cache import locked
from aether.build.detect import detect
from aether.build.ignore import Selection, select
from aether.build.native import check_binary, check_native_modules
from aether.build.project import Made, OnLine, Options, Plan, Prepared, Progress, Project
from aether.build.tools import cache_home


def plan(root: Path, options: Options | None = None) -> Plan:
    """Detect the project in `root` and list what would be packed and what not; runs nothing but version questions.

    Raises ConfigError saying what to write or install, LocalIOError when a file or folder cannot be read.
    """
    started = time.perf_counter()
    options = options or Options()
    root = Path(os.path.abspath(root))
    project = detect(root, options)
    steps: list[str] = []
    if project.kind == "node":
        from aether.build import nodejs
        from aether.build.node_project import notes_of, read_project

        node = read_project(root, options)
        steps = nodejs.steps_of(node, options)
        project = replace(project, notes=(*project.notes, *notes_of(node)))
        replaced = [os.fsencode(name) for name in node.module_folders] if node.depends else []
        found = select(root, replaced=replaced)
    elif project.kind == "python":
        from aether.build import python

        steps = python.steps_of(python.read_project(root))
        found = python.select_own(root)
    else:
        found = select(root)
    spent = (time.perf_counter() - started) * 1000
    return Plan(project, options, tuple(steps), tuple(found.entries), tuple(found.excluded), spent)


@contextmanager
def prepare(plan: Plan, *, on_line: OnLine | None = None) -> Generator[Prepared]:
    """Install dependencies and build; what is to be packed may be read until the context ends.

    Raises BuildFailed with the tool's last lines, ConfigError (a tool or a fitting native module is missing),
    LocalIOError. The project's own folder is not written to.
    """
    project, options = plan.project, plan.options
    with _scratch(project, on_line) as scratch:
        cached, described = True, None
        if project.kind == "node":
            from aether.build import nodejs
            from aether.build.node_project import read_project

            target = options.target or nodejs.default_target()
            described = node = read_project(project.root, options)
            found, cached = nodejs.install(node, options, target, scratch, on_line)
            check_native_modules(found.entries, target)
        elif project.kind == "python":
            from aether.build import python

            described = python.read_project(project.root)
            found, cached = python.install(described, options, on_line)
        else:
            found = select(project.root)
            _check_programs(project, options, found)
        yield Prepared(plan, tuple(found.entries), tuple(found.excluded), cached, described)


def make(
    plan: Plan,
    out_dir: Path,
    *,
    level: int = 2,
    on_line: OnLine | None = None,
    progress: Progress | None = None,
) -> Made:
    """`prepare`, then pack into `out_dir`; raises what they raise."""
    from aether.artifact.pack import pack

    started = time.perf_counter()
    with prepare(plan, on_line=on_line) as prepared:
        installed = time.perf_counter()
        packed = pack(prepared.entries, out_dir, level=level, progress=progress)
        timings = {
            "detect": plan.detect_ms,
            "install": (installed - started) * 1000,
            "pack": (time.perf_counter() - installed) * 1000,
        }
    return Made(plan, prepared, packed, timings)


@contextmanager
def _scratch(project: Project, on_line: OnLine | None) -> Generator[Path]:
    """The place of the project's staging copy: always the same, for builds write it into what they make."""
    name = hashlib.sha256(os.fsencode(project.root)).hexdigest()[:16]
    home = cache_home() / "builds"

    def waiting() -> None:
        if on_line is not None:
            on_line("waiting for another deploy of this project on this machine")

    with locked(home / f"{name}.lock", waiting):
        folder = home / name
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _check_programs(project: Project, options: Options, found: Selection) -> None:
    from aether.build.nodejs import default_target

    first = project.start.split()[0].removeprefix("./") if project.start else ""
    if project.kind == "binary" and any(entry.name == os.fsencode(first) for entry in found.entries):
        check_binary(project.root / first, options.target or default_target())
