"""Changes that meet: several at once, on SQLite by turns and on PostgreSQL side by side. What must hold afterwards
holds whoever came first, and nobody is answered with an error that is not his own."""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa

from aether.apps import sealing
from aether.apps.configs import Change
from aether.apps.deployments import Author, DeployRequest, RollbackTarget
from aether.apps.ledger import Claim, LostRollout, app_lease
from aether.apps.runs import RunRequest
from aether.edge.table import RouteTable
from aether.hosts.certificates import Certificates
from aether.hosts.proof import ProofOptions, Prover
from aether.hosts.service import HostOptions, Hosts, NewHost
from aether.identity.roles import DEFAULT_TEAM, Role
from aether.leases import Leases
from aether.model.deployment import DeploymentStatus
from aether.model.errors import AetherError, Conflict, NotFound, Unauthorized
from aether.stores.database.engine import Database
from aether.stores.database.tables import (
    applications,
    certificates,
    configs,
    deployment_events,
    deployments,
    hosts,
    leases,
    memberships,
    runs,
    secret_keys,
    sessions,
    tokens,
)
from support.databases import opened
from support.plane import DIGEST, Plane, plane

_T = TypeVar("_T")
ANN = Author("ann")
COMMAND = "node server.js"


@pytest.fixture
def two(tmp_path: Path, database: Database) -> tuple[Plane, Plane]:
    """Two servers on one database."""
    return plane(tmp_path, database), plane(tmp_path, database, "two")


async def at_once(*work: Awaitable[_T], expected: tuple[type[Exception], ...] = ()) -> list[_T | None]:
    """What each gives; None for one that was refused as may be expected."""
    found = await asyncio.gather(*work, return_exceptions=True)
    for result in found:
        if isinstance(result, BaseException) and not isinstance(result, expected):
            raise result
    return [None if isinstance(result, BaseException) else result for result in found]


async def column(database: Database, query: sa.Select[Any]) -> Sequence[Any]:
    async with database.read() as tx:
        return (await tx.execute(query)).scalars().all()


def request(**more: Any) -> DeployRequest:
    return DeployRequest(**{"app": "it", "digest": DIGEST, "command": COMMAND, **more})


# --- identity


async def test_a_disabled_user_has_no_session_and_no_token_left(two: tuple[Plane, Plane]) -> None:
    one, other = two
    accounts = one.identity.accounts
    for turn in range(12):
        name = f"user{turn}"
        user = await accounts.create_user(name, Role.DEPLOYER, "a long password")

        async def log_in(server: Plane, name: str = name, user_id: str = user.id) -> None:
            pair = await server.identity.sessions.open_for_user(user_id, name, Role.DEPLOYER)
            await server.identity.sessions.refresh(pair.refresh_token or "")

        async def make_token(server: Plane, name: str = name) -> None:
            made = await server.identity.machine_tokens.create(
                name, "ci", None, apps=None, expires_in_secs=600, created_by="ann"
            )
            await server.identity.login_with_token(made.token or "", "")

        await at_once(
            log_in(one), make_token(other), accounts.change_user(name, disabled=True), log_in(other), make_token(one),
            expected=(Unauthorized, NotFound),
        )  # fmt: skip
        await accounts.change_user(name, disabled=False)
        alive = sa.select(sessions.c.id).where(sessions.c.user_id == user.id, sessions.c.revoked_at.is_(None))
        assert await column(one.database, alive) == []
        valid = sa.select(tokens.c.id).where(tokens.c.user_id == user.id, tokens.c.kind == "ci")
        assert await column(one.database, valid.where(tokens.c.revoked_at.is_(None))) == []


async def test_what_a_revoked_token_was_exchanged_for_ends_with_it(two: tuple[Plane, Plane]) -> None:
    one, other = two
    await one.identity.accounts.create_user("ida", Role.DEPLOYER, None)
    for _ in range(12):
        made = await one.identity.machine_tokens.create(
            "ida", "ci", None, apps=None, expires_in_secs=600, created_by="ann"
        )
        await at_once(
            *(server.identity.login_with_token(made.token or "", "") for server in (one, other, other)),
            one.identity.machine_tokens.revoke(made.id, None),
            expected=(Unauthorized,),
        )
        assert await column(one.database, sa.select(sessions.c.id).where(sessions.c.revoked_at.is_(None))) == []


async def test_logins_at_once_drop_what_has_ended_without_disturbing_each_other(two: tuple[Plane, Plane]) -> None:
    one, other = two
    user = await one.identity.accounts.create_user("ida", Role.DEPLOYER, None)
    for _ in range(5):
        await at_once(
            *(
                s.identity.sessions.open_for_user(user.id, "ida", Role.DEPLOYER)
                for s in (one, other)
                for _ in range(5)
            )
        )
        async with one.database.write() as tx:
            await tx.execute(sa.update(sessions).values(expires_at=1))
            await tx.execute(sa.update(tokens).values(expires_at=1))


async def test_a_member_is_added_once(two: tuple[Plane, Plane]) -> None:
    accounts = [server.identity.accounts for server in two]
    await accounts[0].create_user("ida", Role.DEPLOYER, None)
    await accounts[0].create_team("web")
    await at_once(*(one.add_member("web", "ida") for one in accounts * 4))
    assert len(await column(two[0].database, sa.select(memberships.c.user_id))) == 1


async def test_no_app_belongs_to_a_team_that_is_gone(two: tuple[Plane, Plane]) -> None:
    one, other = two
    await one.catalogue.create("moving", DEFAULT_TEAM)
    for turn in range(12):
        await one.identity.accounts.create_team("web")
        made, moved, _ = await at_once(
            one.catalogue.create(f"app{turn}", "web"),
            other.catalogue.transfer("moving", "web"),
            other.identity.accounts.delete_team("web"),
            expected=(Conflict, NotFound),
        )
        owned = await column(one.database, sa.select(applications.c.name).where(applications.c.owner == "web"))
        assert sorted(owned) == sorted([f"app{turn}"] * (made is not None) + ["moving"] * (moved is not None))
        if owned:
            assert (await one.identity.accounts.team("web")).name == "web"
            for name in owned:
                await one.catalogue.transfer(name, DEFAULT_TEAM)
            await one.identity.accounts.delete_team("web")


async def test_servers_that_start_at_once_share_the_first_token(two: tuple[Plane, Plane], tmp_path: Path) -> None:
    file = tmp_path / "admin-token"
    await two[0].identity.tokens.ensure_bootstrap(file)
    async with two[0].database.write() as tx:
        await tx.execute(sa.delete(tokens))
    await at_once(*(server.identity.tokens.ensure_bootstrap(file) for server in two * 3))
    assert len(await column(two[0].database, sa.select(tokens.c.id))) == 1


async def test_each_data_directory_has_a_first_token_of_its_own(two: tuple[Plane, Plane], tmp_path: Path) -> None:
    files = [tmp_path / "here", tmp_path / "there"]
    for file in (*files, *files):
        await two[0].identity.tokens.ensure_bootstrap(file, file.name)
    texts = [file.read_text().strip() for file in files]
    assert [(await two[1].identity.tokens.authenticate(text)).role for text in texts] == [Role.ADMIN] * 2
    files[0].unlink()
    await two[0].identity.tokens.ensure_bootstrap(files[0], "here")
    assert len(await column(two[0].database, sa.select(tokens.c.id))) == 2


async def test_servers_that_start_at_once_name_their_key_once(two: tuple[Plane, Plane]) -> None:
    await at_once(*(sealing.adopt(server.database, server.vault) for server in two * 3))
    assert await column(two[0].database, sa.select(secret_keys.c.id)) == [two[0].vault.sealer.newest]


async def test_a_key_that_seals_something_is_named(tmp_path: Path, database: Database) -> None:
    """One server begins to use a newer key while another goes on with the one before."""
    file, keys = tmp_path / "secrets.key", [base64.b64encode(os.urandom(32)).decode() for _ in range(2)]
    file.touch(mode=0o600)
    file.write_text("\n".join(keys))
    older = plane(tmp_path, database)
    file.write_text("\n".join(reversed(keys)))
    newer = plane(tmp_path, database, "two")
    await older.catalogue.create("it", DEFAULT_TEAM)
    for turn in range(10):
        await sealing.adopt(database, older.vault)
        await sealing.adopt(database, newer.vault)
        await at_once(
            sealing.reseal(database, newer.vault),
            older.deployments.configure("it", Change(put={f"A{turn}": "x"}), ANN),
        )
        named = set(await column(database, sa.select(secret_keys.c.id)))
        texts = await column(database, sa.select(configs.c.env))
        assert {text.split(":")[1] for text in texts} <= named


# --- apps and deployments


async def ready(server: Plane) -> None:
    await server.catalogue.create("it", DEFAULT_TEAM)
    await server.add_artifact("it")


async def test_of_one_name_there_is_one_app(two: tuple[Plane, Plane]) -> None:
    made = await at_once(
        *(server.catalogue.create("it", DEFAULT_TEAM) for server in two * 4), expected=(Conflict,)
    )  # fmt: skip
    assert len([view for view in made if view is not None]) == 1
    assert len(await column(two[0].database, sa.select(leases.c.name))) == 1


async def test_of_deployments_at_once_the_last_one_is_under_way(two: tuple[Plane, Plane]) -> None:
    await ready(two[0])
    found = await at_once(
        *(server.deployments.create(request(env={"N": str(n)}), ANN) for n, server in enumerate(two * 4))
    )
    assert [made is not None and made[1] for made in found] == [True] * 8
    rows = await two[0].deployments.list(app="it")
    assert [row.status for row in rows] == [DeploymentStatus.PENDING] + [DeploymentStatus.CANCELLED] * 7
    assert len({row.created_at for row in rows}) == 8


async def test_the_same_deployment_asked_for_at_once_is_made_once(two: tuple[Plane, Plane]) -> None:
    await ready(two[0])
    found = await at_once(*(server.deployments.create(request(), ANN) for server in two * 4))
    assert sorted(made is not None and made[1] for made in found) == [False] * 7 + [True]
    keyed = await at_once(
        *(server.deployments.create(request(env={"K": "1"}), ANN, "a key") for server in two * 4)
    )  # fmt: skip
    assert len({made[0].id for made in keyed if made}) == 1
    assert len(await two[0].deployments.list(app="it")) == 2


async def test_a_deployment_ends_once(two: tuple[Plane, Plane]) -> None:
    """Whoever settles it first: its owner, a person, or a newer deployment."""
    one, other = two
    await ready(one)
    lease = await one.leases.claim(app_lease((await one.catalogue.get("it")).id))
    assert lease is not None
    settled = {"failed", "cancelled", "active"}
    for turn in range(15):
        row, _ = await one.deployments.create(request(env={"N": str(turn)}), ANN)
        claim = Claim(row.id, row.app_id, row.epoch, lease)
        ledger = one.engine.ledger
        await ledger.move(claim, DeploymentStatus.PENDING, DeploymentStatus.VERIFYING, "v")
        await ledger.move(claim, DeploymentStatus.VERIFYING, DeploymentStatus.ROLLING_OUT, "r")
        end: Awaitable[Any] = (
            ledger.promote(claim, [], [])
            if turn % 2
            else ledger.move(claim, DeploymentStatus.ROLLING_OUT, DeploymentStatus.FAILED, "f")
        )
        await at_once(
            end, other.deployments.cancel(row.id, ANN), other.deployments.create(request(env={"M": str(turn)}), ANN),
            expected=(LostRollout, Conflict),
        )  # fmt: skip
        phases = await column(
            one.database,
            sa.select(deployment_events.c.phase)
            .where(deployment_events.c.deployment_id == row.id)
            .order_by(deployment_events.c.id),
        )
        ends = [phase for phase in phases if phase in settled]
        assert len(ends) == 1, phases
        assert (await one.deployments.get(row.id)).status == ends[0]
    releases = await column(one.database, sa.select(deployments.c.release).where(deployments.c.release.is_not(None)))
    assert sorted(releases) == list(range(1, len(releases) + 1))


async def test_an_overtaken_owner_writes_nothing(two: tuple[Plane, Plane]) -> None:
    """The epoch is confirmed in the transaction itself, against a successor that claims at the same moment."""
    one, other = two
    await ready(one)
    name = app_lease((await one.catalogue.get("it")).id)
    for turn in range(15):
        lease = await one.leases.claim(name)
        assert lease is not None
        row, _ = await one.deployments.create(request(env={"N": str(turn)}), ANN)
        claim = Claim(row.id, row.app_id, row.epoch, lease)

        async def take_over(name: str = name) -> None:
            async with other.database.write() as tx:
                values = {"owner": "two", "epoch": leases.c.epoch + 1}
                await tx.execute(sa.update(leases).where(leases.c.name == name).values(values))
                await asyncio.sleep(0.005)

        moved, _ = await asyncio.gather(
            one.engine.ledger.move(claim, DeploymentStatus.PENDING, DeploymentStatus.VERIFYING, "v"),
            take_over(),
            return_exceptions=True,
        )
        status = (await one.deployments.get(row.id)).status
        assert status == (DeploymentStatus.PENDING if moved else DeploymentStatus.VERIFYING)
        async with one.database.write() as tx:
            await tx.execute(sa.update(leases).where(leases.c.name == name).values(owner=None))
        one.leases.forget(name)


async def test_changes_of_config_at_once_are_all_kept(two: tuple[Plane, Plane]) -> None:
    await ready(two[0])
    await at_once(
        *(server.deployments.configure("it", Change(put={f"V{n}": "1"}), ANN) for n, server in enumerate(two * 5))
    )
    config = await two[0].deployments.config("it")
    assert config.version == 10
    assert sorted(config.variables.env) == [f"V{n}" for n in range(10)]


async def test_sizes_set_at_once(two: tuple[Plane, Plane]) -> None:
    await ready(two[0])
    await at_once(*(server.catalogue.scale("it", {"web": 2}) for server in two * 4))
    assert (await two[0].catalogue.get("it")).desired == 2


async def test_a_deletion_beside_changes(two: tuple[Plane, Plane]) -> None:
    """The app is gone at the end, and nobody got an answer that is not true."""
    one, other = two
    for turn in range(8):
        await ready(one)
        await one.deployments.create(request(), ANN)
        await at_once(
            one.catalogue.delete("it"),
            other.deployments.create(request(env={"N": str(turn)}), ANN),
            other.deployments.configure("it", Change(put={"A": "b"}), ANN),
            other.catalogue.scale("it", {"web": 3}),
            other.catalogue.transfer("it", DEFAULT_TEAM),
            expected=(NotFound,),
        )
        for table in (applications, deployments, leases):
            assert await column(one.database, sa.select(table)) == []


async def test_the_lease_of_an_app_that_is_deleted_is_left_to_the_deleter(two: tuple[Plane, Plane]) -> None:
    """Found by three servers: the third one took what the owner had given back for the second, and kept it."""
    one, other = two
    await ready(one)
    app_id = (await one.catalogue.get("it")).id
    async with one.database.write() as tx:
        await tx.execute(sa.update(applications).values(deleting_at=1))
    await one.leases.release(app_lease(app_id))
    assert await other.engine._census.claim_apps() == []
    assert other.leases.held(app_lease(app_id)) is None
    async with asyncio.timeout(10):
        await one.catalogue.delete("it")
    assert await column(one.database, sa.select(leases.c.name)) == []


async def test_of_runs_at_once_no_more_than_allowed_are_begun(
    two: tuple[Plane, Plane], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aether.apps.runs.MAX_LIVE", 3)
    one, other = two
    await ready(one)
    lease = await one.leases.claim(app_lease((await one.catalogue.get("it")).id))
    assert lease is not None
    row, _ = await one.deployments.create(request(), ANN)
    claim = Claim(row.id, row.app_id, row.epoch, lease)
    await one.engine.ledger.move(claim, DeploymentStatus.PENDING, DeploymentStatus.VERIFYING, "v")
    await one.engine.ledger.move(claim, DeploymentStatus.VERIFYING, DeploymentStatus.ROLLING_OUT, "r")
    await one.engine.ledger.promote(claim, [], [])
    for server in two:  # they are recorded, and not started: that is another test's

        async def nothing(*_: Any) -> None:
            return None

        monkeypatch.setattr(server.runs, "_start", nothing)
    begun = await at_once(
        *(server.runs.start("it", RunRequest("true"), ANN) for server in two * 5), expected=(Conflict,)
    )
    assert len([run for run in begun if run is not None]) == 3
    assert len(await column(one.database, sa.select(runs.c.id))) == 3
    with pytest.raises(NotFound):
        await other.deployments.rollback("it", RollbackTarget(version=9), ANN)


# --- leases


async def test_each_lease_has_one_holder_whatever_the_number_of_claims(database_url: str) -> None:
    async with opened(database_url, pool_size=8) as database:
        servers = [Leases(database, f"server-{n}") for n in range(5)]
        names = [f"app/{n}" for n in range(20)]
        for turn in itertools.count(1):
            await asyncio.gather(*(server.claim_all(names) for server in servers))
            held = [name for server in servers for name in names if server.held(name)]
            if len(held) == len(names):
                break
            assert turn < 20, "claims that met are made again"
        assert sorted(held) == sorted(names)
        await at_once(*(server.renew() for server in servers for _ in range(3)))
        await at_once(*(server.release_all() for server in servers))
        await asyncio.gather(*(server.claim_all(names) for server in servers))
        held = [name for server in servers for name in names if server.held(name)]
        assert sorted(held) == sorted(names)
        assert await column(database, sa.select(leases.c.epoch).distinct()) == [2]


async def test_renewals_beside_writes_under_the_same_leases(database_url: str) -> None:
    async with opened(database_url, pool_size=8) as database:
        server = Leases(database, "one")
        held = await server.claim_all([f"app/{n}" for n in range(10)])

        async def write(name: str) -> None:
            async with database.write() as tx:
                await held[name].confirm(tx)
                await tx.execute(sa.select(sa.func.count()).select_from(leases))

        await at_once(*(write(name) for name in held for _ in range(5)), *(server.renew() for _ in range(20)))
        assert all(lease.holds for lease in held.values())


# --- hosts


async def test_a_host_has_one_owner_and_one_certificate_record(two: tuple[Plane, Plane], tmp_path: Path) -> None:
    one, other = two
    for app in ("shop", "rival"):
        await one.catalogue.create(app, DEFAULT_TEAM)

    class Book:
        def show(self, host: str, pem: Path | None) -> None:
            """The edge is another test's."""

    services = [
        Hosts(server.database, RouteTable(), Prover(ProofOptions()), HostOptions("localhost", (), on_loopback=False))
        for server in two
    ]
    for turn in range(6):
        new = NewHost(f"h{turn}.example.com", asserted=True)
        found = await at_once(
            *(service.add(app, new, "ann") for service in services for app in ("shop", "rival")),
            expected=(Conflict,),
        )
        owners = {row.app for row in found if row is not None}
        assert len(owners) == 1
        row = next(row for row in found if row is not None)
        books = [Certificates(one.database, service, tmp_path / "tls", Book()) for service in services]
        await at_once(*(book.record(row, source="acme", failures=n) for n, book in enumerate(books * 3)))
    assert len(await column(other.database, sa.select(certificates.c.host_id))) == 6


async def test_a_redirect_never_leads_to_a_host_that_is_gone(two: tuple[Plane, Plane]) -> None:
    one, other = two
    await one.catalogue.create("shop", DEFAULT_TEAM)
    options = HostOptions("localhost", (), on_loopback=False)
    first, second = (Hosts(server.database, RouteTable(), Prover(ProofOptions()), options) for server in two)
    for turn in range(8):
        target, source = f"a{turn}.example.com", f"b{turn}.example.com"
        await first.add("shop", NewHost(target, asserted=True), "ann")
        await at_once(
            first.remove("shop", target),
            second.add("shop", NewHost(source, redirect_to=target, asserted=True), "ann"),
            expected=(AetherError,),
        )
        found = {row.host: row.redirect_to for row in await first.list("shop", limit=100)}
        assert all(to is None or to in found for to in found.values())
    assert await column(other.database, sa.select(hosts.c.id))
