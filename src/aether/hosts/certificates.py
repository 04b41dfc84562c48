"""The certificates of custom hosts: kept in files that only the server reads, shown by the edge from the next
handshake on.

The file is written before the row that names it; a file without a row is removed when the server starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa
import structlog

from aether.hosts.authority import write_private
from aether.hosts.pair import Pair, read_pair, split_pem
from aether.hosts.service import HostRow, Hosts
from aether.model.certificates import CertificateRow
from aether.model.database import DatabasePort
from aether.model.errors import AetherError, BadRequest, Conflict, LocalIOError, NotFound
from aether.model.times import now_us
from aether.stores.database.tables import certificates, hosts

_log = structlog.stdlib.get_logger("aether.certificates")


class Book(Protocol):
    """The edge, as far as certificates go."""

    def show(self, host: str, pem: Path | None) -> None:
        """From the next handshake on `host` is answered with what this file holds; None: with nothing of its own.

        Raises OSError."""
        ...


class Certificates:
    """`folder` holds one file per host: the key and the chain."""

    def __init__(self, database: DatabasePort, hosts: Hosts, folder: Path, book: Book) -> None:
        self._database = database
        self._hosts = hosts
        self._folder = folder
        self._book = book
        self._shown: dict[str, str] = {}
        self._turn = asyncio.Lock()
        self.on_change: Callable[[], None] = lambda: None
        """Called when hosts have come or gone, or a certificate of the owner's own has gone."""

    async def open(self) -> None:
        """Show what is recorded and remove the rest. Raises LocalIOError."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise LocalIOError(f"{self._folder} cannot be made: {error.strerror}") from error
        await self.refresh()
        for path in self._folder.iterdir():
            if path.name.removesuffix(".pem") not in self._shown:
                path.unlink(missing_ok=True)

    async def refresh(self) -> None:
        """Bring what the edge shows in line with the record."""
        async with self._turn:
            wanted = {row.host: row for row in await self.list() if row.fingerprint}
            verified = {row.host for row in await self._hosts.verified()}
            for host in [host for host in self._shown if host not in wanted or host not in verified]:
                self._book.show(host, None)
                del self._shown[host]
                self._path(host).unlink(missing_ok=True)
            for host, row in wanted.items():
                if host in verified and self._shown.get(host) != row.fingerprint:
                    self._show(host, row.fingerprint or "")
        self.on_change()

    async def list(self) -> list[CertificateRow]:
        async with self._database.read() as tx:
            return [_row(row) for row in await tx.execute(sa.select(certificates))]

    async def find(self, row: HostRow) -> CertificateRow | None:
        async with self._database.read() as tx:
            found = (await tx.execute(sa.select(certificates).where(certificates.c.host_id == row.id))).one_or_none()
        return None if found is None else _row(found)

    async def give(self, app: str, host: str, chain: bytes, key: bytes) -> CertificateRow:
        """Show a certificate of the owner's own for a verified host. Raises BadRequest, Conflict and NotFound."""
        row = await self._hosts.get(app, host)
        if row.verified_at is None:
            raise Conflict(f"'{row.host}' is not verified yet: 'aether hosts verify {row.host}' says what is missing")
        pair = read_pair(chain, key)
        if not pair.covers(row.host):
            named = ", ".join(pair.names) or "no host"
            raise BadRequest(f"the certificate is for {named}, not for {row.host}")
        if pair.not_after <= now_us():
            raise BadRequest("the certificate has run out")
        return await self.keep(row, pair, "given")

    async def keep(self, row: HostRow, pair: Pair, source: str) -> CertificateRow:
        """Record and show a pair that has been checked."""
        async with self._turn:
            try:
                await asyncio.to_thread(write_private, self._path(row.host), pair.pem)
            except OSError as error:
                raise LocalIOError(f"the certificate cannot be kept: {error.strerror or error}") from error
            await self.record(
                row, source=source, issuer=pair.issuer, fingerprint=pair.fingerprint, not_before=pair.not_before,
                not_after=pair.not_after, failures=0, next_attempt_at=None, problem=None,
            )  # fmt: skip
            self._show(row.host, pair.fingerprint)
        found = await self.find(row)
        if found is None:
            raise NotFound(f"'{row.host}' was removed meanwhile")
        _log.info("certificate shown", host=row.host, source=source, issuer=pair.issuer)
        return found

    async def record(self, row: HostRow, **values: Any) -> None:
        """Change what is recorded of a host's certificate; a host that is gone has no record."""
        async with self._database.write() as tx:
            exists = await _exists(tx, row.id)
            changed = await tx.execute(
                sa.update(certificates).where(certificates.c.host_id == row.id).values(**values)
            )  # fmt: skip
            if not changed.rowcount and exists:
                await tx.execute(sa.insert(certificates).values(host_id=row.id, host=row.host, **values))

    async def withdraw(self, app: str, host: str) -> None:
        """Forget a host's certificate. Raises NotFound."""
        row = await self._hosts.get(app, host)
        async with self._database.write() as tx:
            gone = await tx.execute(sa.delete(certificates).where(certificates.c.host_id == row.id))
        if not gone.rowcount:
            raise NotFound(f"'{row.host}' has no certificate of its own")
        await self.refresh()

    def _show(self, host: str, fingerprint: str) -> None:
        path = self._path(host)
        try:
            pair = read_pair(*split_pem(path.read_bytes()))
            self._book.show(host, path)
        except (OSError, AetherError) as error:
            _log.error("a certificate cannot be shown", host=host, error=str(error))
            return
        self._shown[host] = fingerprint if pair.fingerprint == fingerprint else pair.fingerprint

    def _path(self, host: str) -> Path:
        return self._folder / f"{host}.pem"


async def _exists(tx: Any, host_id: str) -> bool:
    """With the host locked, so that its record is made once."""
    query = sa.select(hosts.c.id).where(hosts.c.id == host_id).with_for_update(key_share=True)
    return await tx.scalar(query) is not None


def _row(row: Any) -> CertificateRow:
    return CertificateRow(
        row.host, row.source, row.issuer, row.fingerprint, row.not_before, row.not_after, row.failures,
        row.next_attempt_at, row.problem,
    )  # fmt: skip
