"""Logging in without a credential at hand: this machine shows a code, and somebody who is logged in lets it in.

Both halves of `aether login`: `--device` on the machine that wants in, `--approve CODE` where somebody is logged in.
"""

from __future__ import annotations

import os
import sys

from aether.cli.output import escape
from aether.model.errors import Forbidden, NotFound, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.context import Context
    from aether.client.api import Api
    from aether.client.wire import Login

_WAIT_SECS = 25.0


def log_in(api: Api, context: Context) -> Login:
    """Show the code and wait until it was approved. Raises Forbidden when it was turned away, NotFound when nobody
    came in time."""
    begun = api.begin_device(_name())
    code, secret = begun["user_code"], begun.get("device_code", "")
    context.log.info(f"to let this machine in, run where you are logged in to {api.base}:")
    context.log.info(f"  aether login --approve {code}")
    context.log.info("waiting for up to ten minutes; Ctrl-C gives up")
    while True:
        try:
            answer = api.redeem_device(secret, _WAIT_SECS)
        except Forbidden:
            raise Forbidden(f"the login with the code {code} was turned away") from None
        except NotFound:
            raise NotFound(f"nobody approved the code {code} in time; begin again") from None
        if answer is not None:
            return answer


def approve(code: str, context: Context, *, sure: bool) -> int:
    """Let in, after a question, the device that shows `code`."""
    device = context.api.device(code)
    who = escape(device["client"]) or "a device without a name"
    if not sure:
        if not sys.stdin.isatty():
            raise UsageError("nobody is there to ask whether the device may come in: add --yes")
        me = context.api.whoami()
        sys.stderr.write(
            f"{who} at {device['address'] or 'an unknown address'} will act as {me['name']} ({me['role']}).\n"
            "Let it in only if it shows this code to you now. Let it in? [y/N] "
        )
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            context.api.decide_device(code, approve=False)
            context.result({"turned_away": device["client"]}, lambda: f"turned away {who}")
            return 0
    context.api.decide_device(code, approve=True)
    context.result({"let_in": device["client"]}, lambda: f"let in {who}")
    return 0


def _name() -> str:
    import socket
    from getpass import getuser

    try:
        user = getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user} on {socket.gethostname()}"[:100]
