"""Identity as the API is given it: logins, sessions, devices, users and teams, machine tokens, ownership, audit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from aether.identity.accounts import Accounts
from aether.identity.audit import AuditLog
from aether.identity.devices import Devices
from aether.identity.machine_tokens import MachineTokens
from aether.identity.ownership import Ownership
from aether.identity.passwords import Passwords
from aether.identity.roles import Principal
from aether.identity.secrets import hash_token
from aether.identity.sessions import Pair, Sessions
from aether.identity.throttle import LoginThrottle
from aether.identity.tokens import StaticTokenLike, TokenService
from aether.model.database import DatabasePort
from aether.model.errors import NotFound, ServiceUnavailable, Unauthorized
from aether.observability.logging import logger

RECHECK_SECS = 15.0
_log = logger(__name__)


class Identity:
    """One for each server process."""

    def __init__(
        self,
        database: DatabasePort,
        static: Sequence[StaticTokenLike] = (),
        *,
        required: bool = True,
        passwords: Passwords | None = None,
        throttle: LoginThrottle | None = None,
    ) -> None:
        self.tokens = TokenService(database, static, required=required)
        self.sessions = Sessions(database, self.tokens.holder, self.tokens.forget)
        self.devices = Devices(database, self.sessions)
        self.accounts = Accounts(database, passwords or Passwords(), self.tokens.forget)
        self.machine_tokens = MachineTokens(database, self.tokens.forget)
        self.ownership = Ownership(database)
        self.audit = AuditLog(database)
        self.throttle = throttle or LoginThrottle()

    async def login_with_password(self, name: str, password: str, address: str) -> Pair:
        """Raises Unauthorized, with the same words for every reason, and RateLimited."""
        self.throttle.begin(name, address)
        user = await self.accounts.check_password(name, password)
        if user is None:
            raise Unauthorized("the user name or the password is wrong, or the user is disabled")
        self.throttle.succeeded(name, address)
        return await self.sessions.open_for_user(user.id, user.name, user.role)

    async def login_with_token(self, token: str, address: str) -> Pair:
        """Exchange a token for a session that ends no later than it. Raises Unauthorized and RateLimited."""
        self.throttle.begin(None, address)
        given = await self.tokens.authenticate(token or None)
        if given.kind == "anonymous":
            raise Unauthorized("this token is unknown; this server needs none")
        self.throttle.succeeded(None, address)
        return await self.sessions.open_for_token(given, hash_token(token))

    async def until_barred(self, caller: Principal, app: str) -> None:
        """Return once the caller of a request that lasts would no longer be let in or shown the app.

        What this server revokes is noticed at once, what another one revokes within `RECHECK_SECS`.
        """
        while True:
            changed = self.tokens.changed
            try:
                if not await self._may_still_see(caller, app):
                    return
            except ServiceUnavailable:
                # a database that is away for a moment takes nothing from anybody
                _log.debug("a stream's caller could not be checked again", caller=caller.name)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECHECK_SECS):
                    await changed.wait()

    async def _may_still_see(self, caller: Principal, app: str) -> bool:
        now = await self.tokens.again(caller)
        if now is None:
            return False
        try:
            await self.ownership.check_app(now, app)
        except NotFound:
            return False
        return True

    async def logout(self, token: str | None, session_id: str | None) -> None:
        """End the session of an access token with all its tokens; credentials of other kinds stay as they are,
        because they are not the caller's to end."""
        if session_id is not None:
            await self.sessions.end(session_id)
        elif token:
            await self.tokens.end_old_session(token)
