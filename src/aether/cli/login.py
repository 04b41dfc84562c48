"""`aether login`: open a session with a token, with a user's password, or let in by somebody else, and keep it.

Neither has to be typed on a command line: a token is read from --token-file, from the data directory of a server on
this machine, from a prompt, or from standard input; a password (--username without a token) from a prompt or from
standard input.
"""

from __future__ import annotations

import json
import os
import sys
from urllib.parse import urlsplit

from aether.cli.arguments import add_format
from aether.client.session import Session, api_base, normal_base, read_session, write_session
from aether.model.errors import ConfigError, LocalIOError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context
    from aether.client.dial import Origin


def configure(parser: Parser) -> None:
    parser.add_argument(
        "--api-base", metavar="URL", help="the server (default: AETHER_API_BASE, session, config.toml)"
    )
    parser.add_argument("--token", metavar="TOKEN", help="the token; '-' reads it from standard input")
    parser.add_argument("--token-file", metavar="FILE", help="a file that holds the token")
    parser.add_argument(
        "--username", metavar="NAME", help="log in with this user's password; with a token: insist on being this user"
    )
    parser.add_argument("--data-dir", metavar="DIR", help="data directory of a server on this machine")
    parser.add_argument("--device", action="store_true", help="show a code that somebody who is logged in approves")
    parser.add_argument("--approve", metavar="CODE", help="let in the machine that shows this code, as you")
    parser.add_argument("--yes", action="store_true", help="with --approve: do not ask")
    parser.add_argument("--ca-file", metavar="FILE", help="trust the certificates of this authority too (PEM)")
    parser.add_argument("--insecure-http", action="store_true", help="send the token over plain HTTP to another host")
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    from aether.client.api import Api
    from aether.client.dial import Origin
    from aether.client.renewal import Locked
    from aether.client.transport import Transport

    if arguments.approve:
        from aether.cli.device import approve

        return approve(arguments.approve, context, sure=arguments.yes)
    base = _base(arguments, context)
    origin = Origin(base)
    if origin.scheme == "http" and not origin.is_loopback and not arguments.insecure_http:
        raise UsageError(
            f"{base} is plain HTTP on another host: use https, or --insecure-http to send the token anyway"
        )
    on_event = context.note if context.log.shows("debug") else None
    ca_file = _ca_file(arguments, context, origin)
    with Api(Transport(base, on_event=on_event, ca_file=ca_file)) as api:
        # a server that is not there is said before anybody types a token
        api.alive()
        if arguments.device:
            from aether.cli.device import log_in

            answer = log_in(api, context)
        elif arguments.username and not arguments.token and not arguments.token_file:
            answer = api.login_with_password(arguments.username, _password(arguments.username, origin))
        else:
            answer = api.login(_token(arguments, context, origin))
        if arguments.username and answer["name"] != arguments.username:
            api.transport.token = answer["token"]
            api.logout()
            raise ConfigError(f"this token belongs to {answer['name']}, not to {arguments.username}")
    session = Session(
        base,
        answer["token"],
        answer["name"],
        answer["role"],
        answer["expires_at"] or "",
        answer.get("refresh_token") or "",
        answer.get("refresh_expires_at") or "",
        ca_file=ca_file,
    )
    with Locked(context.environ):
        path = write_session(session, context.environ)
    # the access token is renewed by itself; what ends the session is the refresh token
    until = session.refresh_expires_at or session.expires_at or None
    shown = {"api_base": base, "name": session.name, "role": session.role, "expires_at": until}
    context.result({**shown, "session": path}, lambda: f"logged in to {base} as {session.name} ({session.role})")
    if context.environ.get("AETHER_TOKEN"):
        context.log.warn("AETHER_TOKEN is set and wins over this session")
    return 0


def _base(arguments: Arguments, context: Context) -> str:
    if arguments.api_base:
        return normal_base(arguments.api_base)
    try:
        session = read_session(context.environ)
    except ConfigError:
        # a damaged session is what a new login repairs
        session = None
    base, found_in = api_base(context.environ, session)
    if arguments.data_dir or found_in == "default":
        return _announced(_data_dir(arguments)) or base
    return base


def _data_dir(arguments: Arguments) -> str:
    from aether.settings import default_data_dir

    return arguments.data_dir or os.environ.get("AETHER_DATA_DIR") or str(default_data_dir())


def _announced(folder: str) -> str | None:
    """Where the server of that data directory says it listens, if it runs on this machine's loopback."""
    from aether.client.dial import Origin

    try:
        with open(os.path.join(folder, "up.json"), "rb") as file:
            base = normal_base(str(json.loads(file.read())["api"]))
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None
    return base if Origin(base).is_loopback else None


def _ca_file(arguments: Arguments, context: Context, origin: Origin) -> str:
    """The authority to trust beside the system's: the one named, else that of the server on this machine."""
    if named := arguments.ca_file or context.environ.get("AETHER_CA_FILE", "").strip():
        return os.path.abspath(os.path.expanduser(named))
    if origin.scheme != "https" or not origin.is_loopback:
        return ""
    try:
        with open(os.path.join(_data_dir(arguments), "up.json"), "rb") as file:
            known = json.loads(file.read())
        # another program's port must not be believed with this server's authority
        return str(known.get("ca", "")) if urlsplit(str(known["api"])).port == origin.port else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


def _token(arguments: Arguments, context: Context, origin: Origin) -> str:
    if arguments.token and arguments.token != "-":
        return _checked(arguments.token)
    if arguments.token_file:
        return _checked(_read(arguments.token_file))
    if arguments.token is None and origin.is_loopback:
        found = _local_token(arguments, origin)
        if found:
            return found
    if sys.stdin.isatty():
        from getpass import getpass

        return _checked(getpass(f"Token for {origin}: "))
    return _checked(sys.stdin.readline())


def _password(username: str, origin: Origin) -> str:
    if sys.stdin.isatty():
        from getpass import getpass

        password = getpass(f"Password of {username} for {origin}: ")
    else:
        password = sys.stdin.readline().rstrip("\n")
    if not password:
        raise UsageError("no password given: type it at the prompt, or give it on standard input")
    return password


def _checked(text: str) -> str:
    token = text.strip()
    if not token:
        raise UsageError("no token given: use --token-file FILE, --token -, or type it at the prompt")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError("the token holds characters that no token has")
    return token


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise LocalIOError(f"cannot read the token from {path}: {getattr(error, 'strerror', 'not text')}") from error


def _local_token(arguments: Arguments, origin: Origin) -> str | None:
    """The credential that `aether up` left for its own user, if `origin` is the server of that data directory."""
    folder = _data_dir(arguments)
    try:
        with open(os.path.join(folder, "up.json"), "rb") as file:
            listens = urlsplit(str(json.loads(file.read())["api"]))
        # another program's port must not be handed this server's credential
        if not origin.path and listens.port and listens.port != origin.port:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        if not arguments.data_dir and not os.path.exists(os.path.join(folder, "admin-token")):
            return None
    try:
        with open(os.path.join(folder, "admin-token"), encoding="ascii") as file:
            return file.read().strip() or None
    except (OSError, UnicodeDecodeError) as error:
        if arguments.data_dir:
            raise LocalIOError(f"cannot read the admin token in {folder}: {error}") from error
        return None
