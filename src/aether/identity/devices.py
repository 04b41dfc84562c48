"""Logins of devices: a machine without credentials shows a short code, and somebody who is logged in elsewhere lets
it in with a session of their own (RFC 8628, with the approval as an API call instead of a page).

The device proves itself with a secret that only it knows; the code that people read and type names the request and
grants nothing. What is granted is written down first and turned into a session when the device comes for it, once, so
that the session's tokens are known to the device only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from aether.identity.roles import Principal
from aether.identity.secrets import DEVICE, hash_token, new_token
from aether.identity.sessions import Pair, Sessions
from aether.model.database import DatabasePort
from aether.model.errors import BadRequest, Conflict, Forbidden, NotFound, RateLimited
from aether.model.names import new_id
from aether.model.times import now_us
from aether.stores.database.tables import device_logins

LIFE_SECS = 600
MAX_WAITING = 500
_ALPHABET = "BCDFGHJKLMNPQRSTVWXZ"
"""No vowels, so that no words come out, and nothing that reads like something else (RFC 8628 section 6.1)."""
_HALF = 4
_LOOK_AGAIN_SECS = 2.0
"""How soon an approval that another server process took is noticed."""


@dataclass(frozen=True, slots=True)
class DeviceLogin:
    """A device that waits to be let in; times are microseconds since the epoch."""

    user_code: str
    client: str
    address: str
    created_at: int
    expires_at: int
    status: str
    """pending, approved, denied or used."""


class Devices:
    def __init__(self, database: DatabasePort, sessions: Sessions) -> None:
        self._database = database
        self._sessions = sessions
        self._decided = asyncio.Event()

    async def begin(self, client: str, address: str) -> tuple[str, DeviceLogin]:
        """A new request and the device's secret. Raises RateLimited when too many wait already."""
        now = now_us()
        secret = new_token(DEVICE)
        for _ in range(5):
            made = DeviceLogin(new_code(), client[:100], address[:64], now, now + LIFE_SECS * 1_000_000, "pending")
            row = {"id": new_id(), "device_hash": hash_token(secret), **asdict(made)}
            try:
                async with self._database.write() as tx:
                    old = sa.select(device_logins.c.id).where(device_logins.c.expires_at <= now)
                    old = old.with_for_update(skip_locked=True)
                    await tx.execute(sa.delete(device_logins).where(device_logins.c.id.in_(old)))
                    waiting = await tx.scalar(sa.select(sa.func.count()).select_from(device_logins))
                    if (waiting or 0) >= MAX_WAITING:
                        wait = {"retry_after_secs": 60}
                        raise RateLimited("too many devices wait to be let in; try again in a minute", wait)
                    await tx.execute(sa.insert(device_logins).values(row))
            except IntegrityError:
                continue  # the code is taken
            return secret, made
        raise Conflict("no code was free; try again")

    async def find(self, user_code: str) -> DeviceLogin:
        """Raises NotFound for a code that is unknown or has expired."""
        async with self._database.read() as tx:
            query = sa.select(device_logins).where(_alive(), device_logins.c.user_code == plain_code(user_code))
            row = (await tx.execute(query)).one_or_none()
        if row is None:
            raise NotFound("no device waits with this code: it may be mistyped or older than ten minutes")
        return _login(row)

    async def decide(self, user_code: str, caller: Principal, *, approve: bool) -> DeviceLogin:
        """Let the device in as `caller`, or not. Raises NotFound, Conflict when it was decided already, Forbidden for
        a caller that has no identity to lend."""
        found = await self.find(user_code)
        if caller.token_hash is None:
            raise Forbidden("this server asks nobody for a token, so there is no login to give to a device")
        grant = json.dumps({"session": caller.session_id, "credential": caller.token_hash})
        mine = sa.and_(_alive(), device_logins.c.user_code == found.user_code, device_logins.c.status == "pending")
        values = {"status": "approved", "grant": grant} if approve else {"status": "denied"}
        async with self._database.write() as tx:
            if not (await tx.execute(sa.update(device_logins).where(mine).values(values))).rowcount:
                raise Conflict("this device was let in or turned away already")
        self._decided.set()
        self._decided = asyncio.Event()
        return await self.find(user_code)

    async def redeem(self, secret: str, wait_secs: float) -> Pair | None:
        """The device's session, None when nobody has decided within `wait_secs`.

        Raises NotFound when the request is unknown, has expired or was used, Forbidden when it was turned away, and
        Unauthorized when whoever approved may not log in any more.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_secs
        while True:
            decided = self._decided
            grant = await self._taken(hash_token(secret))
            if grant is not None:
                return await self._sessions.open_like(grant["session"], grant["credential"])
            if (left := deadline - loop.time()) <= 0:
                return None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, _LOOK_AGAIN_SECS)):
                    await decided.wait()

    async def _taken(self, device_hash: str) -> dict[str, Any] | None:
        """What was granted, marked as used; None while nobody has decided."""
        mine = sa.and_(_alive(), device_logins.c.device_hash == device_hash)
        async with self._database.read() as tx:
            row = (await tx.execute(sa.select(device_logins).where(mine))).one_or_none()
        if row is None or row.status == "used":
            raise NotFound("this login has expired or was used; begin again")
        if row.status == "denied":
            raise Forbidden("the login was turned away")
        if row.status == "pending":
            return None
        async with self._database.write() as tx:
            first = sa.update(device_logins).where(mine, device_logins.c.status == "approved")
            if not (await tx.execute(first.values(status="used", grant=None))).rowcount:
                raise NotFound("this login was used; begin again")
        return json.loads(row.grant)


def new_code() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(2 * _HALF))


def plain_code(text: str) -> str:
    """A code as it is stored, from what somebody typed. Raises BadRequest for what cannot be one."""
    code = text.upper().replace("-", "").replace(" ", "")
    if len(code) != 2 * _HALF or not set(_ALPHABET).issuperset(code):
        raise BadRequest("the code is eight letters, like BCDF-GHJK", {"field": "user_code"})
    return code


def shown_code(code: str) -> str:
    return f"{code[:_HALF]}-{code[_HALF:]}"


def _alive() -> sa.ColumnElement[bool]:
    return device_logins.c.expires_at > now_us()


def _login(row: Any) -> DeviceLogin:
    return DeviceLogin(row.user_code, row.client, row.address, row.created_at, row.expires_at, row.status)
