"""Custom hosts of apps."""

from __future__ import annotations

import msgspec
from litestar import delete, get, post, put
from litestar.params import FromPath, JSONBody

from aether.api import auditing
from aether.api.paging import DEFAULT_LIMIT, Cursor, Limit, Page, decode_cursor, page
from aether.api.services import Caller, Deps, Services
from aether.hosts.certificates import Certificates
from aether.hosts.proof import CHALLENGE_PATH, dns_name, expected
from aether.hosts.service import HostRow, Hosts, NewHost
from aether.identity.roles import Role
from aether.model.certificates import CertificateRow
from aether.model.errors import Conflict, Forbidden, ServiceUnavailable
from aether.model.times import to_iso, to_iso_or_none


class HostRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`redirect_to` is another host of the app. Only an admin may send `verified_by_admin`, and vouches with it for
    a host that cannot be proven."""

    host: str
    redirect_to: str | None = None
    allow_http: bool = False
    hsts_secs: int = 0
    verified_by_admin: bool = False


class HostProof(msgspec.Struct):
    """One of the two makes a pending host verified: the TXT record, or `value` as the answer at `url` (which this
    server gives itself once the host's address leads to it)."""

    txt_name: str
    url: str
    value: str


class CertificateRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Both as PEM; the chain begins with the certificate of the host. The key is never shown again."""

    chain: str
    key: str


class HostCertificate(msgspec.Struct):
    """`source` is given or acme; `problem` says why the last attempt to get one failed."""

    source: str
    issuer: str | None
    fingerprint: str | None
    not_before: str | None
    not_after: str | None
    problem: str | None


class Host(msgspec.Struct):
    """`status` is pending or verified; `problem` says why the last look for a proof found none."""

    host: str
    app: str
    status: str
    verified_by: str | None
    verified_at: str | None
    checked_at: str | None
    problem: str | None
    proof: HostProof | None
    redirect_to: str | None
    allow_http: bool
    hsts_secs: int
    certificate: HostCertificate | None
    created_by: str
    created_at: str


@post("/apps/{app:str}/hosts", tags=["hosts"])
async def add_host(app: FromPath[str], data: JSONBody[HostRequest], services: Deps, caller: Caller) -> Host:
    """Claim a host for the app and look for its proof; again changes what is kept of it. 409 when it is taken."""
    auditing.about(f"{app} {data.host}")
    if data.verified_by_admin and caller.role < Role.ADMIN:
        raise Forbidden("only an admin may vouch for a host; prove it, or ask an admin to add it")
    new = NewHost(data.host, data.redirect_to, data.allow_http, data.hsts_secs, data.verified_by_admin)
    return await _with_certificate(await _hosts_of(services).add(app, new, caller.name), services)


@get("/apps/{app:str}/hosts", tags=["hosts"])
async def list_hosts(
    app: FromPath[str], services: Deps, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None
) -> Page[Host]:
    """The app's custom hosts by name."""
    keys = decode_cursor(cursor, str)
    rows = await _hosts_of(services).list(app, after=keys[0] if keys else None, limit=limit)
    known = {row.host: row for row in await services.certificates.list()} if services.certificates else {}
    return page(
        rows, limit, lambda row: _view(row, known.get(row.host) if row.verified_at else None), lambda row: (row.host,)
    )


@post("/apps/{app:str}/hosts/{host:str}/verify", status_code=200, tags=["hosts"])
async def verify_host(app: FromPath[str], host: FromPath[str], services: Deps) -> Host:
    """Look for the proof of a pending host again."""
    return await _with_certificate(await _hosts_of(services).verify(app, host), services)


@delete("/apps/{app:str}/hosts/{host:str}", tags=["hosts"])
async def remove_host(app: FromPath[str], host: FromPath[str], services: Deps) -> None:
    """Give a host up; its requests answer 404 from now on."""
    await _hosts_of(services).remove(app, host)


@put("/apps/{app:str}/hosts/{host:str}/certificate", tags=["hosts"])
async def give_certificate(
    app: FromPath[str], host: FromPath[str], data: JSONBody[CertificateRequest], services: Deps
) -> HostCertificate:
    """Show a certificate of your own for a verified host, from the next connection on."""
    row = await _certificates_of(services).give(app, host, data.chain.encode(), data.key.encode())
    return _certificate_view(row)


@delete("/apps/{app:str}/hosts/{host:str}/certificate", tags=["hosts"])
async def withdraw_certificate(app: FromPath[str], host: FromPath[str], services: Deps) -> None:
    """Forget a host's certificate and its key."""
    await _certificates_of(services).withdraw(app, host)


def _certificates_of(services: Services) -> Certificates:
    if services.certificates is None:
        raise Conflict("this server speaks plain HTTP: start it with --tls, or --tls-cert and --tls-key")
    return services.certificates


async def _with_certificate(row: HostRow, services: Services) -> Host:
    return _view(row, await services.certificates.find(row) if services.certificates else None)


def _certificate_view(row: CertificateRow) -> HostCertificate:
    return HostCertificate(
        row.source, row.issuer, row.fingerprint, to_iso_or_none(row.not_before), to_iso_or_none(row.not_after),
        row.problem,
    )  # fmt: skip


def _hosts_of(services: Services) -> Hosts:
    if services.hosts is None:
        raise ServiceUnavailable("this server has no custom hosts")
    return services.hosts


def _view(row: HostRow, certificate: CertificateRow | None) -> Host:
    proof = None
    if row.verified_at is None:
        proof = HostProof(dns_name(row.host), f"http://{row.host}{CHALLENGE_PATH}{row.token}", expected(row.token))
    return Host(
        host=row.host,
        app=row.app,
        status="pending" if row.verified_at is None else "verified",
        verified_by=row.verified_by,
        verified_at=to_iso_or_none(row.verified_at),
        checked_at=to_iso_or_none(row.checked_at),
        problem=row.problem,
        proof=proof,
        redirect_to=row.redirect_to,
        allow_http=row.allow_http,
        hsts_secs=row.hsts_secs,
        certificate=None if certificate is None else _certificate_view(certificate),
        created_by=row.created_by,
        created_at=to_iso(row.created_at),
    )


HANDLERS = [add_host, list_hosts, verify_host, remove_host, give_certificate, withdraw_certificate]
