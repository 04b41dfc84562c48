"""Where the client's own files are, and which server and token a call uses.

    server   AETHER_API_BASE, else the session, else `api_base` of config.toml, else http://127.0.0.1:8080
    token    AETHER_TOKEN, else the session's if it was made for this very server

It leaves talking to the server to `transport`.
"""

from __future__ import annotations

import json
import os

from aether.model.errors import ConfigError, LocalIOError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

DEFAULT_API_BASE = "http://127.0.0.1:8080"


class Session:
    """A login that is kept between commands. Times are ISO-8601.

    `next_refresh` is the refresh token that this client has drawn to follow `refresh_token`, kept before it is sent
    (see `aether.client.renewal`); empty texts are not written.
    """

    __slots__ = (
        "api_base", "ca_file", "expires_at", "name", "next_refresh", "refresh_expires_at", "refresh_token",
        "role", "token",
    )  # fmt: skip

    def __init__(
        self,
        api_base: str,
        token: str,
        name: str = "",
        role: str = "",
        expires_at: str = "",
        refresh_token: str = "",
        refresh_expires_at: str = "",
        next_refresh: str = "",
        ca_file: str = "",
    ) -> None:
        self.api_base = api_base
        self.token = token
        self.name = name
        self.role = role
        self.expires_at = expires_at
        self.refresh_token = refresh_token
        self.refresh_expires_at = refresh_expires_at
        self.next_refresh = next_refresh
        self.ca_file = ca_file


class Endpoint:
    """The server of a call: its base URL, the token (None: not logged in), where each came from, and whose
    certificates are trusted beside the system's."""

    __slots__ = ("api_base", "base_from", "ca_file", "token", "token_from")

    def __init__(self, api_base: str, token: str | None, base_from: str, token_from: str, ca_file: str = "") -> None:
        self.api_base = api_base
        self.token = token
        self.base_from = base_from
        self.token_from = token_from
        self.ca_file = ca_file


def config_path(environ: Mapping[str, str] = os.environ) -> str:
    """`${XDG_CONFIG_HOME:-~/.config}/aether/config.toml`."""
    base = environ.get("XDG_CONFIG_HOME") or os.path.join(_home(environ), ".config")
    return os.path.join(base, "aether", "config.toml")


def session_path(environ: Mapping[str, str] = os.environ) -> str:
    """`${XDG_CACHE_HOME:-~/.cache}/aether/session.json`."""
    return os.path.join(cache_dir(environ), "session.json")


def cache_dir(environ: Mapping[str, str] = os.environ) -> str:
    """`${XDG_CACHE_HOME:-~/.cache}/aether`."""
    return os.path.join(environ.get("XDG_CACHE_HOME") or os.path.join(_home(environ), ".cache"), "aether")


def _home(environ: Mapping[str, str]) -> str:
    return environ.get("HOME") or os.path.expanduser("~")


def read_config(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """config.toml as a table; empty when there is none. Raises ConfigError."""
    path = config_path(environ)
    try:
        with open(path, "rb") as file:
            import tomllib

            return tomllib.load(file)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def read_session(environ: Mapping[str, str] = os.environ) -> Session | None:
    """The kept session, or None. Raises ConfigError when its file is damaged."""
    path = session_path(environ)
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read())
        texts = {key: content[key] for key in ("api_base", "token")}
        texts.update({key: content.get(key) or "" for key in Session.__slots__ if key not in texts})
        if not all(isinstance(value, str) for value in texts.values()):
            raise TypeError
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"cannot read the session {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the session {path} is damaged: run 'aether login' again") from error
    return Session(**texts)


def write_session(session: Session, environ: Mapping[str, str] = os.environ) -> str:
    """Keep `session` in a file that only its owner can read, from its first byte on; returns its path.

    The file appears complete or not at all. Raises LocalIOError.
    """
    path = session_path(environ)
    folder = os.path.dirname(path)
    part = os.path.join(folder, f".session.{os.getpid()}.{os.urandom(6).hex()}")
    texts = {name: getattr(session, name) for name in Session.__slots__}
    content = json.dumps({name: text for name, text in texts.items() if text}).encode()
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise
    except OSError as error:
        raise LocalIOError(f"cannot keep the session in {path}: {error.strerror}") from error
    return path


def remove_session(environ: Mapping[str, str] = os.environ) -> bool:
    """Forget the session; False when there was none. Raises LocalIOError."""
    path = session_path(environ)
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise LocalIOError(f"cannot remove the session {path}: {error.strerror}") from error
    return True


def normal_base(url: str) -> str:
    """`url` as a base URL without a trailing slash; raises ConfigError unless it is http, https or unix."""
    url = url.strip().rstrip("/")
    scheme, _, rest = url.partition(":")
    if scheme == "unix" and rest.startswith("/"):
        return url
    if scheme in ("http", "https") and len(rest) > 2 and rest.startswith("//"):
        return url
    raise ConfigError(f"'{url}' is not a server address: write it as http://host:port, https://host or unix:/path")


def trusted_ca(environ: Mapping[str, str], session: Session | None) -> str:
    """Whose certificates are trusted beside the system's: AETHER_CA_FILE, else what the session was opened with."""
    return environ.get("AETHER_CA_FILE", "").strip() or ("" if session is None else session.ca_file)


def api_base(environ: Mapping[str, str] = os.environ, session: Session | None = None) -> tuple[str, str]:
    """The server's base URL and the name of the place it was found in. Raises ConfigError."""
    if value := environ.get("AETHER_API_BASE", "").strip():
        return normal_base(value), "AETHER_API_BASE"
    if session is not None:
        return normal_base(session.api_base), "session"
    configured = read_config(environ).get("api_base")
    if configured is None:
        return DEFAULT_API_BASE, "default"
    if not isinstance(configured, str):
        raise ConfigError(f"api_base in {config_path(environ)} must be a text")
    return normal_base(configured), "config.toml"


def endpoint(environ: Mapping[str, str] = os.environ) -> Endpoint:
    """The server and token of a call; a session's token is never offered to another server. Raises ConfigError."""
    session = read_session(environ)
    base, base_from = api_base(environ, session)
    mine = session is not None and normal_base(session.api_base) == base
    ca_file = trusted_ca(environ, session if mine else None)
    if token := environ.get("AETHER_TOKEN", "").strip():
        if not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError("AETHER_TOKEN holds characters that no token has")
        return Endpoint(base, token, base_from, "AETHER_TOKEN", ca_file)
    if session is not None and mine:
        return Endpoint(base, session.token, base_from, "session", ca_file)
    return Endpoint(base, None, base_from, "none", ca_file)
