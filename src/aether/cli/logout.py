"""`aether logout`: revoke the session on its server and forget it here."""

from __future__ import annotations

from aether.cli.arguments import add_format
from aether.client.session import read_session, remove_session, trusted_ca
from aether.model.errors import ConfigError, NetworkError, Unauthorized

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context


def configure(parser: Parser) -> None:
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    from aether.client.api import Api
    from aether.client.renewal import Locked, renewal
    from aether.client.transport import Transport

    try:
        session = read_session(context.environ)
    except ConfigError:
        remove_session(context.environ)
        raise
    if session is None:
        context.result({"logged_out": False}, lambda: "not logged in")
        return 0
    try:
        # an access token that has run out is renewed first: only a valid one ends its session
        renew = renewal(context.environ, session.api_base)
        trusted = trusted_ca(context.environ, session)
        with Api(Transport(session.api_base, session.token, timeout_s=10.0, renew=renew, ca_file=trusted)) as api:
            api.logout()
    except Unauthorized:
        context.log.debug("the server had ended the session already")
    except NetworkError as error:
        raise NetworkError(f"forgotten here, but not revoked on the server: {error.message}") from error
    finally:
        with Locked(context.environ):
            remove_session(context.environ)
    context.result({"logged_out": True, "api_base": session.api_base}, lambda: f"logged out of {session.api_base}")
    return 0
