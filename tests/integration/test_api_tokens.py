"""Tokens in the database: the bootstrap token's file, sessions opened with tokens, and their end."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from aether.identity.roles import DEFAULT_TEAM, Role
from aether.identity.service import Identity
from aether.identity.sessions import ACCESS_SECS, REFRESH_SECS
from aether.model.errors import Unauthorized
from aether.model.names import new_id
from aether.model.times import now_us
from aether.settings import StaticToken
from aether.stores.database.engine import Database
from aether.stores.database.tables import tokens
from support.databases import everything_in
from support.identity import CHEAP

ROB = StaticToken("plain", "reader", "rob")


async def test_the_bootstrap_token_is_made_once_and_private(database: Database, tmp_path: Path) -> None:
    file = tmp_path / "admin-token"
    service = Identity(database).tokens
    await service.ensure_bootstrap(file)
    token = file.read_text().strip()
    assert file.stat().st_mode & 0o777 == 0o600
    assert (await service.authenticate(token)).role is Role.ADMIN
    file.chmod(0o644)
    await service.ensure_bootstrap(file)
    assert file.read_text().strip() == token
    assert file.stat().st_mode & 0o777 == 0o600


async def test_a_lost_bootstrap_file_gets_a_new_token_and_ends_the_old(database: Database, tmp_path: Path) -> None:
    file = tmp_path / "admin-token"
    first = Identity(database)
    await first.tokens.ensure_bootstrap(file)
    old = file.read_text().strip()
    session = await first.login_with_token(old, "")
    file.unlink()
    second = Identity(database)
    await second.tokens.ensure_bootstrap(file)
    assert file.read_text().strip() != old
    with pytest.raises(Unauthorized):
        await second.tokens.authenticate(old)
    with pytest.raises(Unauthorized):
        await second.sessions.refresh(session.refresh_token or "")


async def test_a_start_killed_between_file_and_row_is_finished_by_the_next(
    database: Database, tmp_path: Path
) -> None:
    file = tmp_path / "admin-token"
    file.write_text("aeb_written_but_not_recorded\n")
    service = Identity(database).tokens
    await service.ensure_bootstrap(file)
    found = await service.authenticate("aeb_written_but_not_recorded")
    assert (found.kind, found.owner) == ("bootstrap", DEFAULT_TEAM)


async def test_only_hashes_are_stored(database: Database, tmp_path: Path) -> None:
    identity = Identity(database, [StaticToken("plain-static", "deployer", "dan")], passwords=CHEAP)
    await identity.tokens.ensure_bootstrap(tmp_path / "admin-token")
    session = await identity.login_with_token("plain-static", "")
    renewed = await identity.sessions.refresh(session.refresh_token or "")
    await identity.accounts.create_user("ida", Role.DEPLOYER, "a long password")
    machine = await identity.machine_tokens.create(
        "ida", "ci", Role.DEPLOYER, apps=None, expires_in_secs=60, created_by="ann"
    )
    secrets = [session.token, session.refresh_token, renewed.token, renewed.refresh_token, machine.token]
    shown = repr(session) + repr(renewed) + repr(machine)
    content = await everything_in(database)
    for secret in ("plain-static", "a long password", (tmp_path / "admin-token").read_text().strip(), *secrets):
        assert secret
        assert secret.encode() not in content
        assert secret not in shown


async def test_an_access_token_is_short_and_a_refresh_token_long(database: Database) -> None:
    identity = Identity(database, [ROB])
    session = await identity.login_with_token("plain", "")
    assert abs(session.expires_at - now_us() - ACCESS_SECS * 1_000_000) < 60_000_000
    assert abs((session.refresh_expires_at or 0) - now_us() - REFRESH_SECS * 1_000_000) < 60_000_000
    async with database.write() as tx:
        await tx.execute(sa.update(tokens).values(expires_at=now_us() - 1))
    with pytest.raises(Unauthorized):
        await identity.tokens.authenticate(session.token)
    renewed = await identity.sessions.refresh(session.refresh_token or "")
    assert (await identity.tokens.authenticate(renewed.token)).name == "rob"


async def test_what_comes_of_an_access_token_ends_with_it(database: Database) -> None:
    identity = Identity(database, [ROB])
    first = await identity.login_with_token("plain", "")
    second = await identity.login_with_token(first.token, "")
    assert second.refresh_token is None
    assert second.expires_at <= first.expires_at
    await identity.logout(first.token, first.session_id)
    for token in (first.token, second.token):
        with pytest.raises(Unauthorized):
            await identity.tokens.authenticate(token)


async def test_a_session_of_a_static_token_ends_when_that_leaves_the_settings(database: Database) -> None:
    session = await Identity(database, [ROB]).login_with_token("plain", "")
    promoted = Identity(database, [StaticToken("plain", "deployer", "rob")])
    renewed = await promoted.sessions.refresh(session.refresh_token or "")
    assert renewed.role is Role.DEPLOYER
    with pytest.raises(Unauthorized):
        await Identity(database).sessions.refresh(renewed.refresh_token or "")


async def test_sessions_from_before_refresh_tokens_work_until_their_end(database: Database) -> None:
    identity = Identity(database)
    from aether.identity.secrets import hash_token

    old = {"id": new_id(), "token_hash": hash_token("aes_old"), "name": "admin", "role": "admin", "kind": "session"}
    async with database.write() as tx:
        await tx.execute(sa.insert(tokens).values(created_at=now_us(), expires_at=now_us() + 3_600_000_000, **old))
    assert (await identity.tokens.authenticate("aes_old")).role is Role.ADMIN
    await identity.logout("aes_old", None)
    with pytest.raises(Unauthorized):
        await identity.tokens.authenticate("aes_old")


async def test_logout_ends_sessions_only(database: Database, tmp_path: Path) -> None:
    identity = Identity(database, [ROB])
    await identity.tokens.ensure_bootstrap(tmp_path / "admin-token")
    bootstrap = (tmp_path / "admin-token").read_text().strip()
    session = await identity.login_with_token("plain", "")
    await identity.logout(session.token, session.session_id)
    for token in ("plain", bootstrap, None):
        await identity.logout(token, None)
    assert await identity.tokens.authenticate("plain")
    assert await identity.tokens.authenticate(bootstrap)
    with pytest.raises(Unauthorized):
        await identity.tokens.authenticate(session.token)
    with pytest.raises(Unauthorized):
        await identity.sessions.refresh(session.refresh_token or "")


@pytest.mark.parametrize("token", [None, "", "x", "plain ", "Plain", "pläin", "\udcff"])
async def test_other_texts_are_refused(database: Database, token: str | None) -> None:
    service = Identity(database, [ROB]).tokens
    with pytest.raises(Unauthorized):
        await service.authenticate(token)
