"""The custom hosts of apps: claimed, verified, listed and given up; and what the edge is told of them.

A claim gives nothing until it is verified: several apps may claim a host, and the first to prove it has it. The
record comes first and the edge is told from the record, so that a server that dies between the two tells it when it
starts again.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError

from aether.hosts.names import canonical, check_free, is_reserved
from aether.hosts.proof import CHALLENGE_PATH, Prover, Unproven, expected
from aether.model.database import DatabasePort
from aether.model.errors import BadRequest, Conflict, NotFound
from aether.model.hosts import HostRule
from aether.model.names import new_id
from aether.model.times import now_us
from aether.stores.database.tables import applications, hosts

MAX_HOSTS = 100
"""Of one app."""
MAX_HSTS_SECS = 63_072_000
_log = structlog.stdlib.get_logger("aether.hosts")


class HostRouter(Protocol):
    """The edge, as far as hosts go."""

    def set_hosts(self, rules: Mapping[str, HostRule]) -> None:
        """From now on exactly these custom hosts lead to apps."""
        ...

    def set_answers(self, answers: Mapping[str, Mapping[str, str]]) -> None:
        """From now on the edge itself answers these paths of these hosts with these texts."""
        ...


@dataclass(frozen=True, slots=True)
class HostRow:
    """Times are microseconds since the epoch. `verified_by` is dns, http, reserved name, or admin and a name."""

    id: str
    app_id: str
    app: str
    host: str
    token: str
    redirect_to: str | None
    allow_http: bool
    hsts_secs: int
    verified_by: str | None
    verified_at: int | None
    checked_at: int | None
    problem: str | None
    created_by: str
    created_at: int


@dataclass(frozen=True, slots=True)
class NewHost:
    """What is asked for; `asserted` means that an admin vouches for it."""

    host: str
    redirect_to: str | None = None
    allow_http: bool = False
    hsts_secs: int = 0
    asserted: bool = False


@dataclass(frozen=True, slots=True)
class HostOptions:
    base_domain: str
    api_hosts: tuple[str, ...]
    on_loopback: bool
    """Nobody but this machine reaches the server, so names that exist on no other may be had without proof."""


class Hosts:
    def __init__(self, database: DatabasePort, router: HostRouter, prover: Prover, options: HostOptions) -> None:
        self._database = database
        self._router = router
        self._prover = prover
        self._options = options
        self._telling = asyncio.Lock()
        self._pending: dict[str, dict[str, str]] = {}
        self._extra: dict[str, dict[str, str]] = {}
        self.on_change: Callable[[], Awaitable[None]] | None = None
        """Called after every change of which hosts are verified."""

    async def add(self, app: str, new: NewHost, author: str) -> HostRow:
        """Claim a host and look for its proof at once; a claim that cannot be proven yet stays pending.

        Adding a host again changes what is kept of it. Raises BadRequest, Conflict and NotFound."""
        host = canonical(new.host)
        check_free(host, self._options.base_domain, self._options.api_hosts)
        redirect_to = None if new.redirect_to is None else canonical(new.redirect_to)
        if not 0 <= new.hsts_secs <= MAX_HSTS_SECS:
            raise BadRequest(f"hsts_secs is 0 to {MAX_HSTS_SECS}", {"field": "hsts_secs"})
        by = f"admin {author}" if new.asserted else None
        if by is None and self._options.on_loopback and is_reserved(host):
            by = "reserved name"
        now = now_us()
        changed = {"redirect_to": redirect_to, "allow_http": new.allow_http, "hsts_secs": new.hsts_secs}
        try:
            async with self._database.write() as tx:
                app_id = await _app_id(tx, app, lock=True)
                mine = [_row(row) for row in await tx.execute(_select().where(hosts.c.app_id == app_id))]
                _check_redirect(host, redirect_to, mine)
                old = next((row for row in mine if row.host == host), None)
                if old is None and len(mine) >= MAX_HOSTS:
                    raise Conflict(f"an app has at most {MAX_HOSTS} hosts")
                if by is not None and (old is None or old.verified_at is None):
                    changed |= {"verified_by": by, "verified_at": now, "problem": None}
                if old is None:
                    await self._refuse_taken(tx, host, app_id)
                    await tx.execute(
                        sa.insert(hosts).values(
                            id=new_id(), app_id=app_id, host=host, token=secrets.token_urlsafe(32),
                            created_by=author, created_at=now, **changed,
                        )
                    )  # fmt: skip
                else:
                    await tx.execute(sa.update(hosts).where(hosts.c.id == old.id).values(**changed))
        except IntegrityError:
            raise _taken(host) from None
        await self.publish()
        row = await self.get(app, host)
        return row if row.verified_at is not None else await self.verify(app, host)

    async def list(self, app: str, *, after: str | None = None, limit: int = 50) -> Sequence[HostRow]:
        """By name, `limit` + 1 at most. Raises NotFound."""
        async with self._database.read() as tx:
            query = _select().where(hosts.c.app_id == await _app_id(tx, app)).order_by(hosts.c.host)
            if after is not None:
                query = query.where(hosts.c.host > after)
            return [_row(row) for row in await tx.execute(query.limit(limit + 1))]

    async def get(self, app: str, host: str) -> HostRow:
        """Raises NotFound and, for what is no host at all, BadRequest."""
        name = canonical(host)
        async with self._database.read() as tx:
            query = _select().where(hosts.c.app_id == await _app_id(tx, app), hosts.c.host == name)
            row = (await tx.execute(query)).one_or_none()
        if row is None:
            raise NotFound(f"{app} has no host '{name}'; see 'aether hosts list'")
        return _row(row)

    async def verify(self, app: str, host: str) -> HostRow:
        """Look for the proof of a pending host and keep what was found. Raises Conflict, NotFound."""
        row = await self.get(app, host)
        if row.verified_at is not None:
            return row
        by: str | None = None
        problem: str | None = None
        try:
            by = await self._prover.prove(row.host, row.token)
        except Unproven as error:
            problem = str(error)
        now = now_us()
        values: dict[str, Any] = {"checked_at": now, "problem": problem}
        if by is not None:
            values |= {"verified_by": by, "verified_at": now}
        try:
            async with self._database.write() as tx:
                await tx.execute(sa.update(hosts).where(*_still_pending(row)).values(**values))
        except IntegrityError:
            taken = _taken(row.host)
            async with self._database.write() as tx:
                told = {"checked_at": now, "problem": taken.message}
                await tx.execute(sa.update(hosts).where(*_still_pending(row)).values(**told))
            raise taken from None
        if by is not None:
            _log.info("host verified", app=app, host=row.host, by=by)
            await self.publish()
        return await self.get(app, row.host)

    async def remove(self, app: str, host: str) -> None:
        """Raises NotFound, and Conflict while another host redirects to it."""
        row = await self.get(app, host)
        async with self._database.write() as tx:
            await _app_id(tx, app, lock=True)
            query = sa.select(hosts.c.host).where(hosts.c.app_id == row.app_id, hosts.c.redirect_to == row.host)
            if other := await tx.scalar(query.limit(1)):
                raise Conflict(f"'{other}' redirects to '{row.host}': remove that one first")
            await tx.execute(sa.delete(hosts).where(hosts.c.id == row.id))
        await self.publish()
        _log.info("host removed", app=app, host=row.host)

    async def verified(self) -> Sequence[HostRow]:
        """The hosts that lead to apps."""
        async with self._database.read() as tx:
            found = await tx.execute(
                _select().where(hosts.c.verified_at.is_not(None), applications.c.deleting_at.is_(None))
            )
            return [_row(row) for row in found]

    async def pending(self) -> Sequence[HostRow]:
        """The hosts whose proof has not been found yet."""
        async with self._database.read() as tx:
            found = await tx.execute(
                _select().where(hosts.c.verified_at.is_(None), applications.c.deleting_at.is_(None))
            )
            return [_row(row) for row in found]

    async def publish(self) -> None:
        """Tell the edge what the record says by now."""
        async with self._telling:  # so that of two changes the later one is told last
            async with self._database.read() as tx:
                found = [_row(row) for row in await tx.execute(_select().where(applications.c.deleting_at.is_(None)))]
            self._router.set_hosts(
                {
                    row.host: HostRule(row.app, row.redirect_to, row.allow_http, row.hsts_secs)
                    for row in found
                    if row.verified_at is not None
                }
            )
            self._pending = {}
            for row in found:
                if row.verified_at is None:
                    self._pending.setdefault(row.host, {})[CHALLENGE_PATH + row.token] = expected(row.token)
            self._tell_answers()
        if self.on_change is not None:
            await self.on_change()

    def answer(self, host: str, path: str, text: str | None) -> None:
        """Have the edge answer `path` of `host` with `text`, or no more with None: for certificate authorities."""
        paths = self._extra.setdefault(host, {})
        if text is None:
            paths.pop(path, None)
        else:
            paths[path] = text
        if not paths:
            del self._extra[host]
        self._tell_answers()

    def _tell_answers(self) -> None:
        merged = {host: dict(paths) for host, paths in self._pending.items()}
        for host, paths in self._extra.items():
            merged.setdefault(host, {}).update(paths)
        self._router.set_answers(merged)

    async def _refuse_taken(self, tx: Any, host: str, app_id: str) -> None:
        query = sa.select(hosts.c.id).where(
            hosts.c.host == host, hosts.c.verified_at.is_not(None), hosts.c.app_id != app_id
        )
        if await tx.scalar(query) is not None:
            raise _taken(host)


def _still_pending(row: HostRow) -> tuple[sa.ColumnElement[bool], ...]:
    return hosts.c.id == row.id, hosts.c.verified_at.is_(None)


def _taken(host: str) -> Conflict:
    return Conflict(f"'{host}' belongs to another app on this server; remove it there first")


def _check_redirect(host: str, target: str | None, mine: Collection[HostRow]) -> None:
    if target is None:
        return
    found = next((row for row in mine if row.host == target), None)
    if target == host or found is None:
        raise BadRequest(
            f"redirect_to must be another host of the app: add '{target}' first", {"field": "redirect_to"}
        )
    if found.redirect_to is not None or any(row.redirect_to == host for row in mine):
        raise BadRequest("a redirect must not lead to a redirect", {"field": "redirect_to"})


async def _app_id(tx: Any, app: str, *, lock: bool = False) -> str:
    """With `lock` the hosts of the app change one by one."""
    query = sa.select(applications.c.id).where(applications.c.name == app, applications.c.deleting_at.is_(None))
    if lock:
        query = query.with_for_update(key_share=True)
    found = await tx.scalar(query)
    if found is None:
        raise NotFound(f"there is no app '{app}'")
    return str(found)


def _select() -> sa.Select[*tuple[Any, ...]]:
    return sa.select(hosts, applications.c.name.label("app")).join(applications, applications.c.id == hosts.c.app_id)


def _row(row: Any) -> HostRow:
    return HostRow(
        row.id, row.app_id, row.app, row.host, row.token, row.redirect_to, row.allow_http, row.hsts_secs,
        row.verified_by, row.verified_at, row.checked_at, row.problem, row.created_by, row.created_at,
    )  # fmt: skip
