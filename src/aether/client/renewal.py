"""A new access token for the kept session, when the server refuses the one that a command has.

Several commands share one session file, and a refresh token may be used once: whoever renews holds a lock on
`session.lock`, reads the file again, and finds that another command has renewed it or does so itself. The successor
of the refresh token is drawn here and written to the file before it is sent; when the answer is lost, the same pair
is sent again, which the server takes for the repetition that it is. A session is never forgotten here: it ends when
the server says so, and stays in its file until the next login.
"""

from __future__ import annotations

import os
import time

from aether.client.session import normal_base, read_session, session_path, trusted_ca, write_session
from aether.model.errors import LocalIOError, NetworkError, Unauthorized

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aether.client.transport import OnEvent

LOCK_WAIT_S = 60.0
_POLL_S = 0.02


def renewal(environ: Mapping[str, str], base: str, *, on_event: OnEvent | None = None) -> Callable[[str], str | None]:
    """What a `Transport` to the server `base` renews the session of `environ` with."""

    def renew(refused: str) -> str | None:
        with Locked(environ):
            return _renewed(environ, base, refused, on_event)

    return renew


def _renewed(environ: Mapping[str, str], base: str, refused: str, on_event: OnEvent | None) -> str | None:
    from base64 import urlsafe_b64encode

    from aether.client.api import Api
    from aether.client.transport import Transport

    session = read_session(environ)
    if session is None or normal_base(session.api_base) != normal_base(base):
        # logged out, or logged in to another server meanwhile, whose token is none of this one's business
        return None
    if session.token != refused:
        return session.token
    if not session.refresh_token:
        return None
    if not session.next_refresh:
        session.next_refresh = "aer_" + urlsafe_b64encode(os.urandom(32)).decode().rstrip("=")
        write_session(session, environ)
    with Api(Transport(normal_base(base), on_event=on_event, ca_file=trusted_ca(environ, session))) as api:
        try:
            answer = api.refresh(session.refresh_token, session.next_refresh)
        except Unauthorized:
            return None
    session.token = answer["token"]
    session.name, session.role = answer["name"], answer["role"]
    session.expires_at = answer["expires_at"] or ""
    session.refresh_token = answer["refresh_token"] or ""
    session.refresh_expires_at = answer["refresh_expires_at"] or ""
    session.next_refresh = ""
    write_session(session, environ)
    return session.token


class Locked:
    """Holds the lock of the session file; raises NetworkError when another command holds it for too long.

    The lock is the kernel's: it ends with its holder, also with one that is killed.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._path = session_path(environ).removesuffix("session.json") + "session.lock"
        self._descriptor = -1

    def __enter__(self) -> None:
        import fcntl

        try:
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LocalIOError(f"cannot lock the session: {self._path}: {error.strerror}") from error
        deadline = time.monotonic() + LOCK_WAIT_S
        try:
            while True:
                try:
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise NetworkError(
                            "another command has been renewing the session for a minute; try again"
                        ) from None
                    time.sleep(_POLL_S)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
