"""Sessions: what a login opens. A family of short-lived access tokens and one chain of refresh tokens.

A refresh token is used once and names its successor (RFC 6819 section 5.2.2.3: rotation). A second use means that
two parties hold it, and the whole family ends.

A client whose answer got lost must not look like a thief. So it draws the successor itself, keeps it, and sends
it along as `next`: the same pair (token, next) may be repeated until the successor is used, because only the
client that drew it knows it. There is no grace by time.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.identity.roles import Principal, Role
from aether.identity.secrets import ACCESS, REFRESH, hash_token, is_refresh_token, new_token
from aether.model.database import DatabasePort
from aether.model.errors import BadRequest, Unauthorized
from aether.model.names import new_id
from aether.model.times import now_us
from aether.observability.logging import logger
from aether.stores.database.tables import refresh_tokens, sessions, tokens, users

ACCESS_SECS = 15 * 60
REFRESH_SECS = 30 * 86_400
_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Pair:
    """New tokens; the only moment at which their texts are known. `refresh_token` is None when an access token
    was exchanged: what comes of it ends with it. Times are microseconds since the epoch."""

    name: str
    role: Role
    expires_at: int
    session_id: str
    token: str = field(repr=False)
    refresh_token: str | None = field(repr=False)
    refresh_expires_at: int | None


class Replayed(Unauthorized):
    """A refresh token was used a second time; `name` is whose session was ended."""

    def __init__(self, name: str) -> None:
        super().__init__("this refresh token was used before, so its session was ended; log in again")
        self.name = name


class Sessions:
    """`credential` answers for the hash of an exchanged token who holds it now, or None when it has ended;
    `forget` is called when a session ended."""

    def __init__(
        self,
        database: DatabasePort,
        credential: Callable[[str], Awaitable[Principal | None]],
        forget: Callable[[], None],
    ) -> None:
        self._database = database
        self._credential = credential
        self._forget = forget

    async def open_for_user(self, user_id: str, name: str, role: Role) -> Pair:
        """After a password was checked. Raises Unauthorized for a user disabled meanwhile."""
        async with self._database.write() as tx:
            if not await _is_enabled(tx, user_id):
                raise Unauthorized("the user is disabled")
            return await _open(tx, {"user_id": user_id, "name": name, "role": role.label}, None)

    async def open_for_token(self, given: Principal, credential_hash: str) -> Pair:
        """Exchange a token for a session that lives no longer than it does. An access token gives another access
        token of its own family."""
        async with self._database.write() as tx:
            if given.session_id is not None:
                now = now_us()
                ends = min(now + ACCESS_SECS * 1_000_000, given.expires_at or now)
                live = sa.and_(sessions.c.id == given.session_id, sessions.c.revoked_at.is_(None))
                row = (await tx.execute(sa.select(sessions).where(live).with_for_update(read=True))).one_or_none()
                if row is None:
                    raise Unauthorized("the session of this token has ended")
                return _pair(row, await _add_access(tx, row, now, ends), ends, None, None)
            await _hold_credential(tx, credential_hash)
            values: dict[str, Any] = {
                "user_id": given.user_id,
                "name": given.name,
                "role": given.role.label,
                "apps": None if given.apps is None else json.dumps(sorted(given.apps)),
                "credential_hash": credential_hash,
            }
            return await _open(tx, values, given.expires_at)

    async def open_like(self, session_id: str | None, credential_hash: str) -> Pair:
        """A session of its own with the rights of another one, or of a token. Raises Unauthorized when that has ended
        meanwhile."""
        if session_id is None:
            given = await self._credential(credential_hash)
            if given is None:
                raise Unauthorized("the token behind this login has ended")
            return await self.open_for_token(given, credential_hash)
        async with self._database.write() as tx:
            live = sa.and_(
                sessions.c.id == session_id, sessions.c.revoked_at.is_(None), sessions.c.expires_at > now_us()
            )
            user_id = await tx.scalar(sa.select(sessions.c.user_id).where(live))
            enabled = user_id is None or await _is_enabled(tx, user_id)
            row = (await tx.execute(sa.select(sessions).where(live).with_for_update(read=True))).one_or_none()
            if row is None or not enabled:
                raise Unauthorized("the session behind this login has ended")
            bound = None if row.credential_hash is None else await _end_of(tx, row.credential_hash)
            kept: dict[str, Any] = {
                "user_id": row.user_id,
                "name": row.name,
                "role": row.role,
                "apps": row.apps,
                "credential_hash": row.credential_hash,
            }
            return await _open(tx, kept, bound)

    async def refresh(self, token: str, following: str | None = None) -> Pair:
        """A new access token and the successor of `token`: `following` when the client has drawn one.

        Raises Unauthorized when the token is unknown, expired, of an ended session, or was used before; the last
        also ends the session. Raises BadRequest for a `following` of the wrong shape.
        """
        if following is not None and (not is_refresh_token(following) or following == token):
            raise BadRequest("next must be a fresh refresh token: aer_ and 43 URL-safe base64 characters")
        hashed = hash_token(token)
        successor = following or new_token(REFRESH)
        await self._check_credential(hashed)
        replayed: str | None = None
        try:
            async with self._database.write() as tx:
                pair = await self._rotate(tx, hashed, successor)
                if pair is None:
                    replayed = await _end_if_replayed(tx, hashed)
        except IntegrityError:
            raise BadRequest("next must be a refresh token that was never used") from None
        if pair is None:
            self._forget()
            if replayed is not None:
                _log.warning("a refresh token was used twice; its session was ended", name=replayed)
                raise Replayed(replayed)
            raise Unauthorized("the session has ended; log in again with aether login")
        return pair

    async def end(self, session_id: str, why: str = "logout") -> None:
        async with self._database.write() as tx:
            await revoke_sessions(tx, now_us(), why, session_id=session_id)
        self._forget()

    async def _check_credential(self, hashed: str) -> None:
        """A session that was opened with a token ends with it."""
        query = sa.select(sessions).join(refresh_tokens, refresh_tokens.c.session_id == sessions.c.id)
        async with self._database.read() as tx:
            row = (await tx.execute(query.where(refresh_tokens.c.token_hash == hashed))).one_or_none()
        if row is None or row.credential_hash is None or row.revoked_at is not None:
            return
        holder = await self._credential(row.credential_hash)
        async with self._database.write() as tx:
            if holder is None:
                await revoke_sessions(tx, now_us(), "credential", session_id=row.id)
            elif holder.role.label != row.role:
                await tx.execute(sa.update(sessions).where(sessions.c.id == row.id).values(role=holder.role.label))

    async def _rotate(self, tx: AsyncConnection, hashed: str, successor: str) -> Pair | None:
        now = now_us()
        await _hold_family(tx, hashed)
        query = sa.select(sessions, refresh_tokens.c.successor_hash, users.c.role.label("user_role"))
        query = query.join(refresh_tokens, refresh_tokens.c.session_id == sessions.c.id)
        query = query.outerjoin(users, users.c.id == sessions.c.user_id)
        query = query.where(
            refresh_tokens.c.token_hash == hashed,
            refresh_tokens.c.expires_at > now,
            sessions.c.revoked_at.is_(None),
            sa.or_(sessions.c.user_id.is_(None), users.c.disabled_at.is_(None)),
        )
        row = (await tx.execute(query)).one_or_none()
        if row is None:
            return None
        next_hash = hash_token(successor)
        expires_at = now + REFRESH_SECS * 1_000_000
        if row.credential_hash is not None and (bound := await _end_of(tx, row.credential_hash)) is not None:
            expires_at = min(expires_at, bound)
        if row.successor_hash is not None:
            if not hmac.compare_digest(row.successor_hash, next_hash) or await _is_used(tx, next_hash):
                return None
        else:
            mine = sa.update(refresh_tokens).where(refresh_tokens.c.token_hash == hashed)
            await tx.execute(mine.values(successor_hash=next_hash))
            await _add_refresh(tx, row.id, next_hash, now, expires_at)
            await tx.execute(sa.update(sessions).where(sessions.c.id == row.id).values(expires_at=expires_at))
        await _sweep(tx, now)
        ends = min(now + ACCESS_SECS * 1_000_000, expires_at)
        access = await _add_access(tx, row, now, ends)
        return _pair(row, access, ends, successor, expires_at)


async def _is_enabled(tx: AsyncConnection, user_id: str) -> bool:
    """Whether the user may log in, until the end of the transaction."""
    enabled = sa.and_(users.c.id == user_id, users.c.disabled_at.is_(None))
    return await tx.scalar(sa.select(users.c.id).where(enabled).with_for_update(read=True)) is not None


async def _hold_credential(tx: AsyncConnection, hashed: str) -> None:
    """Keep an exchanged token from being revoked until what comes of it is on record. Raises Unauthorized."""
    query = sa.select(tokens.c.revoked_at).where(tokens.c.token_hash == hashed).with_for_update(read=True)
    row = (await tx.execute(query)).one_or_none()
    if row is not None and row.revoked_at is not None:
        raise Unauthorized("the token was revoked meanwhile")


async def _hold_family(tx: AsyncConnection, hashed: str) -> None:
    """Lock the session of a refresh token, and its user: rotations of one family follow one another."""
    query = sa.select(sessions.c.id, sessions.c.user_id)
    query = query.join(refresh_tokens, refresh_tokens.c.session_id == sessions.c.id)
    row = (await tx.execute(query.where(refresh_tokens.c.token_hash == hashed))).one_or_none()
    if row is None:
        return
    if row.user_id is not None:
        await tx.execute(sa.select(users.c.id).where(users.c.id == row.user_id).with_for_update(read=True))
    await tx.execute(sa.select(sessions.c.id).where(sessions.c.id == row.id).with_for_update())


async def revoke_sessions(
    tx: AsyncConnection,
    now: int,
    why: str,
    *,
    session_id: str | None = None,
    user_id: str | None = None,
    credential_hash: str | None = None,
) -> None:
    """End sessions, and with them every access and refresh token of theirs; exactly one selector is given."""
    for column, value in (
        (sessions.c.id, session_id), (sessions.c.user_id, user_id), (sessions.c.credential_hash, credential_hash),
    ):  # fmt: skip
        if value is not None:
            live = sa.and_(column == value, sessions.c.revoked_at.is_(None))
            await tx.execute(sa.select(sessions.c.id).where(live).order_by(sessions.c.id).with_for_update())
            await tx.execute(sa.update(sessions).where(live).values(revoked_at=now, revoked_why=why))


async def _open(tx: AsyncConnection, values: dict[str, Any], no_later_than: int | None) -> Pair:
    now = now_us()
    await _sweep(tx, now)
    expires_at = now + REFRESH_SECS * 1_000_000
    if no_later_than is not None:
        expires_at = min(expires_at, no_later_than)
    session_id = new_id()
    await tx.execute(sa.insert(sessions).values(id=session_id, created_at=now, expires_at=expires_at, **values))
    row = (await tx.execute(sa.select(sessions).where(sessions.c.id == session_id))).one()
    refresh = new_token(REFRESH)
    await _add_refresh(tx, session_id, hash_token(refresh), now, expires_at)
    ends = min(now + ACCESS_SECS * 1_000_000, expires_at)
    return _pair(row, await _add_access(tx, row, now, ends), ends, refresh, expires_at)


def _pair(row: Any, token: str, ends: int, refresh: str | None, refresh_ends: int | None) -> Pair:
    role = Role.parse(getattr(row, "user_role", None) or row.role)
    if row.credential_hash is not None:
        role = min(role, Role.parse(row.role))
    return Pair(row.name, role, ends, row.id, token, refresh, refresh_ends)


async def _add_access(tx: AsyncConnection, row: Any, now: int, ends: int) -> str:
    token = new_token(ACCESS)
    await tx.execute(
        sa.insert(tokens).values(
            id=new_id(),
            token_hash=hash_token(token),
            name=row.name,
            role=row.role,
            kind="access",
            user_id=row.user_id,
            session_id=row.id,
            apps=row.apps,
            created_at=now,
            expires_at=ends,
        )
    )
    return token


async def _add_refresh(tx: AsyncConnection, session_id: str, hashed: str, now: int, ends: int) -> None:
    await tx.execute(
        sa.insert(refresh_tokens).values(token_hash=hashed, session_id=session_id, created_at=now, expires_at=ends)
    )


async def _is_used(tx: AsyncConnection, hashed: str) -> bool:
    query = sa.select(refresh_tokens.c.successor_hash).where(refresh_tokens.c.token_hash == hashed)
    return await tx.scalar(query) is not None


async def _end_of(tx: AsyncConnection, credential_hash: str) -> int | None:
    """When the exchanged token ends, which the session must not outlive; None for never."""
    return await tx.scalar(sa.select(tokens.c.expires_at).where(tokens.c.token_hash == credential_hash))


async def _end_if_replayed(tx: AsyncConnection, hashed: str) -> str | None:
    """Whose session it was that this ended, None when the token was not a used one."""
    query = sa.select(sessions.c.id, sessions.c.name)
    query = query.join(refresh_tokens, refresh_tokens.c.session_id == sessions.c.id)
    query = query.where(refresh_tokens.c.token_hash == hashed, refresh_tokens.c.successor_hash.is_not(None))
    row = (await tx.execute(query)).one_or_none()
    if row is None:
        return None
    await revoke_sessions(tx, now_us(), "replay", session_id=row.id)
    return row.name


async def _sweep(tx: AsyncConnection, now: int) -> None:
    """Drop what nobody can use any more; refresh tokens stay as long as their session, to tell replays. What somebody
    else is dropping is left to him."""
    ended = sa.and_(tokens.c.kind.in_(("session", "access")), tokens.c.expires_at <= now)
    for table, old in ((tokens, ended), (sessions, sessions.c.expires_at <= now)):
        free = sa.select(table.c.id).where(old).with_for_update(skip_locked=True)
        await tx.execute(sa.delete(table).where(table.c.id.in_(free)))
