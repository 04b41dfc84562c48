"""What a folder is: its workload kind, app name, runtime and start command. Runs only `node --version`."""

import os
import re
import sys
from pathlib import Path

from aether.build import semver
from aether.build.config import (
    AetherToml,
    Table,
    read_aether_toml,
    read_json,
    read_procfile,
    read_toml,
    table_of,
    text_of,
)
from aether.build.native import machine_of
from aether.build.processes import find_processes
from aether.build.project import Options, Project
from aether.build.tools import find_tool
from aether.model.errors import BadRequest, ConfigError
from aether.model.names import app_name_from, check_app_name

NODE_LINES = (18, 20, 22, 24)
_PYTHON_RUNTIME = re.compile(r"python3\.\d{1,2}")
_PYTHON_MAINS = ("main.py", "app.py", "server.py", "wsgi.py", "asgi.py")
_NODE_MAINS = ("server.js", "server.mjs", "server.cjs")
_STATIC_SERVER = "python3 -m http.server $PORT --directory ."


def detect(root: Path, options: Options) -> Project:
    """What the project in `root` is, flags first, then aether.toml, then what lies in the folder.

    Raises ConfigError saying what to write when nothing fits.
    """
    if not root.is_dir():
        raise ConfigError(f"{root} is not a folder")
    config = read_aether_toml(root)
    package = read_json(root / "package.json")
    if config.function is not None:
        return _function(root, options, config, package)
    procfile = read_procfile(root)
    processes = find_processes(config, procfile)
    kind = _kind(root, options.runtime or config.runtime, package, config.start or processes.web)
    start = options.start or config.start or processes.web
    notes = [*config.notes, *processes.notes]
    if config.volumes and config.strategy is None:
        notes.append(
            "in a rolling deployment the old and the new release write to the volumes side by side: under [rollout] "
            'of aether.toml say strategy = "rolling" if that is fine, or "recreate" for what must be alone'
        )
    match kind:
        case "node":
            runtime = options.runtime or config.runtime or _node_runtime(package or {}, options, notes)
            start = start or _node_start(root, package or {})
        case "python":
            runtime = options.runtime or config.runtime or _python_runtime(options)
            start = start or _python_start(root)
        case "static":
            runtime = "static"
            start = start or _STATIC_SERVER
        case _:
            runtime = "binary"
            start = start or _binary_start(root)
    _check_offered(runtime, options)
    return Project(
        root=root,
        kind=kind,
        app=_app_name(root, options, config, package),
        runtime=runtime,
        start=start,
        env={**config.env, **options.env},
        health_path=config.health_path,
        processes=processes.processes,
        release_command=processes.release_command,
        volumes=config.volumes,
        strategy=config.strategy,
        rollout=config.rollout,
        notes=tuple(notes),
    )


def _function(root: Path, options: Options, config: AetherToml, package: Table | None) -> Project:
    """A function is built as an app of its language is; instead of a command it has an entrypoint."""
    from aether.build.functions import fields_of, language_of

    name = _app_name(root, options, config, package)
    wanted = options.runtime or config.runtime
    notes = list(config.notes)
    language = language_of(root, config.function or {}, wanted, package)
    if language == "python":
        kind = "python"
        runtime = wanted or _python_runtime(options)
    elif language == "node" and package is not None:
        kind = "node"
        runtime = wanted or _node_runtime(package, options, notes)
    else:
        kind, runtime = "binary", wanted or language
    fields = fields_of(root, name, language, config.function or {}, package)
    return Project(
        root=root,
        kind=kind,
        app=name,
        runtime=runtime,
        start=f"{language} {fields['entrypoint']}",
        env={**config.env, **options.env},
        health_path=None,
        function=fields,
        notes=tuple(notes),
    )


def _kind(root: Path, runtime: str | None, package: Table | None, start: str | None) -> str:
    if runtime is not None:
        if runtime in ("static", "binary"):
            return runtime
        if runtime in [f"node{line}" for line in NODE_LINES]:
            return "node"
        if _PYTHON_RUNTIME.fullmatch(runtime):
            return "python"
        raise ConfigError(
            f"runtime '{runtime}' is not known: use node20, node22, node24, python3.x, static or binary"
        )
    if package is not None:
        return "node"
    if (root / "requirements.txt").is_file() or (root / "pyproject.toml").is_file():
        return "python"
    if start:
        return "binary"
    if (root / "index.html").is_file():
        return "static"
    if _binaries(root):
        return "binary"
    raise ConfigError(
        f"nothing to deploy was found in {root}: expected package.json (Node.js), requirements.txt or pyproject.toml "
        "(Python), index.html (static files), or a Procfile with a 'web: COMMAND' line"
    )


def _app_name(root: Path, options: Options, config: AetherToml, package: Table | None) -> str:
    for wanted, source in ((options.app, "--app"), (config.app, "aether.toml: app")):
        if wanted is not None:
            try:
                return check_app_name(wanted)
            except BadRequest as error:
                raise ConfigError(f"{source}: {error.message}") from error
    named = text_of(package, "name", "package.json") if package else None
    for text in (named, root.resolve().name):
        name = app_name_from(text or "")
        if name:
            return name
    raise ConfigError('no name for the app could be derived from the folder; write app = "NAME" into aether.toml')


def _check_offered(runtime: str, options: Options) -> None:
    offered = options.offered_runtimes
    if offered and runtime not in offered and runtime not in ("static", "binary"):
        raise ConfigError(f"the server does not offer {runtime}; it offers {', '.join(offered)}")


def _node_start(root: Path, package: Table) -> str:
    scripts = table_of(package, "scripts", "package.json")
    if text_of(scripts, "start", "package.json scripts"):
        return "npm start"
    for name in _NODE_MAINS:
        if (root / name).is_file():
            return f"node {name}"
    main = text_of(package, "main", "package.json")
    if main and (root / main).is_file():
        return f"node {main}"
    if (root / "index.js").is_file():
        return "node index.js"
    raise ConfigError(
        'no start command was found: add "start": "node FILE" to the scripts of package.json, '
        "a line 'web: COMMAND' to a Procfile, or start = \"COMMAND\" to aether.toml"
    )


def _node_runtime(package: Table, options: Options, notes: list[str]) -> str:
    wanted = text_of(table_of(package, "engines", "package.json"), "node", "package.json engines")
    lines = NODE_LINES
    if options.offered_runtimes:
        lines = tuple(line for line in NODE_LINES if f"node{line}" in options.offered_runtimes)
    fitting = [line for line in lines if wanted is None or semver.admits(wanted, line)]
    if not fitting:
        offered = ", ".join(str(line) for line in lines) or "none"
        raise ConfigError(
            f"package.json asks for Node.js {wanted}, and what can be run is {offered}: change engines.node"
            if wanted
            else "the server offers no Node.js runtime"
        )
    node = find_tool("node")
    local = int(node.version.partition(".")[0]) if node else None
    if local in fitting:
        return f"node{local}"
    if local is not None:
        notes.append(
            f"the app will run on Node.js {fitting[-1]} and dependencies are installed with Node.js {local} "
            "of this machine: native modules may not load"
        )
    return f"node{fitting[-1]}"


def _python_runtime(options: Options) -> str:
    python = find_tool("python3")
    if python is None:
        if options.offered_runtimes:
            offered = [name for name in options.offered_runtimes if name.startswith("python")]
            if offered:
                return offered[-1]
        return f"python{sys.version_info.major}.{sys.version_info.minor}"
    return "python" + ".".join(python.version.split(".")[:2])


def _python_start(root: Path) -> str:
    for name in _PYTHON_MAINS:
        if (root / name).is_file() and name not in ("wsgi.py", "asgi.py"):
            return f"python3 {name}"
    project = table_of(read_toml(root / "pyproject.toml") or {}, "project", "pyproject.toml")
    scripts = table_of(project, "scripts", "pyproject.toml [project]")
    example = "gunicorn --bind 0.0.0.0:$PORT wsgi:application" if (root / "wsgi.py").is_file() else "python3 FILE.py"
    if (root / "manage.py").is_file():
        example = "python3 manage.py runserver --noreload 0.0.0.0:$PORT"
    hint = f" (the project has the script '{next(iter(scripts))}')" if scripts else ""
    raise ConfigError(
        f"no start command was found{hint}: write a Procfile with the line 'web: {example}', "
        f'or start = "{example}" into aether.toml'
    )


def _binaries(root: Path) -> list[str]:
    found: list[str] = []
    for item in sorted(os.scandir(root), key=lambda item: item.name):
        if item.is_file(follow_symlinks=False) and os.access(item.path, os.X_OK) and machine_of(Path(item.path)):
            found.append(item.name)
    return found


def _binary_start(root: Path) -> str:
    found = _binaries(root)
    if len(found) == 1:
        return f"./{found[0]}"
    what = "several programs are" if found else "no program is"
    raise ConfigError(
        f"{what} in the folder, so which one to start is not known: write a Procfile with the line 'web: ./PROGRAM', "
        'or start = "./PROGRAM" into aether.toml'
    )
