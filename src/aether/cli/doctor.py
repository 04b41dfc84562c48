"""`aether doctor`: is this machine, the login and the server as they should be, and if not, what to do.

Exit code 0 unless a check failed, then 10. Findings about running apps come from the server's side of the code when
it is installed here.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

from aether import __version__
from aether.cli.arguments import add_format
from aether.cli.output import escape
from aether.client.session import config_path, endpoint, read_config, read_session, session_path
from aether.model.errors import AetherError, NetworkError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context

    Finding = tuple[str, str]

TOOL_TIMEOUT_S = 10.0
_FAILED_EXIT = 10


def configure(parser: Parser) -> None:
    parser.add_argument("--client", action="store_true", help="leave out what concerns running a server here")
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    checks: list[dict[str, str]] = []

    def check(name: str, find: Callable[[], Finding]) -> None:
        try:
            status, message = find()
        except AetherError as error:
            status, message = "fail", error.message
        checks.append({"name": name, "status": status, "message": message})

    check("aether", lambda: ("ok", f"{__version__} on Python {platform.python_version()}, {platform.platform()}"))
    check("config", lambda: _config(context))
    check("session", lambda: _session(context))
    check("server", lambda: _server(context))
    if checks[-1]["status"] == "ok":
        check("login", lambda: _login(context))
    for tool in ("node", "npm"):
        check(f"{tool} for building", lambda tool=tool: _tool(tool))
    settings: dict[str, str] = {}
    if not arguments.client:
        _server_side(context, checks, settings)
    failed = any(found["status"] == "fail" for found in checks)

    def text() -> str:
        width = max(len(found["name"]) for found in checks)
        lines = [f"{found['status']:<5}{found['name']:<{width}}  {escape(found['message'])}" for found in checks]
        lines += ["", "settings:"] if settings else []
        lines += [f"  {name}={escape(value)}" for name, value in settings.items()]
        return "\n".join(lines)

    context.result({"ok": not failed, "checks": checks, "settings": settings}, text)
    return _FAILED_EXIT if failed else 0


def _server_side(context: Context, checks: list[dict[str, str]], settings: dict[str, str]) -> None:
    """Add what the server's own doctor finds; without the server's libraries say so."""
    try:
        from aether.settings import load
        from aether.topology import doctor
    except ImportError as error:
        message = f"not installed here ({error.name}); only the client can be used"
        checks.append({"name": "server side", "status": "warn", "message": message})
        return
    try:
        found = doctor(load(context.environ))
    except AetherError as error:
        checks.append({"name": "settings", "status": "fail", "message": error.message})
        return
    for item in found:
        if item.name.startswith("AETHER_"):
            settings[item.name] = item.message
        elif item.name != "python":
            checks.append({"name": item.name, "status": item.status, "message": item.message})


def _config(context: Context) -> Finding:
    path = config_path(context.environ)
    unknown = sorted(set(read_config(context.environ)) - {"api_base", "default_namespace"})
    if unknown:
        return "warn", f"{path} has settings that mean nothing: {', '.join(unknown)}"
    return "ok", path if os.path.exists(path) else f"none ({path})"


def _session(context: Context) -> Finding:
    path = session_path(context.environ)
    session = read_session(context.environ)
    if session is None:
        return "ok", "none" + (", AETHER_TOKEN is used" if context.environ.get("AETHER_TOKEN") else "")
    if os.stat(path).st_mode & 0o077:
        return "fail", f"others can read {path}: run 'aether login' again, which makes it private"
    until = session.refresh_expires_at or session.expires_at or "revoked"
    return "ok", f"{session.name} ({session.role}) at {session.api_base}, until {until}"


def _server(context: Context) -> Finding:
    found = endpoint(context.environ)
    try:
        context.api.ready()
    except NetworkError as error:
        if found.base_from != "default":
            raise
        return "warn", error.message
    return "ok", f"{found.api_base} is ready (address from {found.base_from})"


def _login(context: Context) -> Finding:
    who = context.api.whoami()
    return "ok", f"{who['name']} ({who['role']}), token from {endpoint(context.environ).token_from}"


def _tool(name: str) -> Finding:
    path = shutil.which(name)
    if path is None:
        return "warn", f"{name} was not found: install it to deploy Node.js projects"
    try:
        done = subprocess.run(
            [path, "--version"],
            capture_output=True,
            text=True,
            timeout=TOOL_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "warn", f"{path} does not run: {error}"
    if done.returncode != 0:
        return "warn", f"{path} does not run: {(done.stderr or done.stdout).strip()[:200]}"
    return "ok", f"{done.stdout.strip()} ({path})"
