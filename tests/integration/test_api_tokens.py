"""Tokens in the database: sessions, their end, and the bootstrap token's file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from aether.identity.roles import Role
from aether.identity.tokens import SESSION_SECS, TokenService
from aether.model.errors import Unauthorized
from aether.model.times import now_us
from aether.settings import StaticToken
from aether.stores.database.engine import Database
from aether.stores.database.tables import tokens


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    made = Database(f"sqlite+aiosqlite:///{tmp_path}/aether.db")
    await made.open()
    yield made
    await made.close()


async def test_the_bootstrap_token_is_made_once_and_private(database: Database, tmp_path: Path) -> None:
    file = tmp_path / "admin-token"
    service = TokenService(database)
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
    await TokenService(database).ensure_bootstrap(file)
    old = file.read_text().strip()
    file.unlink()
    service = TokenService(database)
    await service.ensure_bootstrap(file)
    assert file.read_text().strip() != old
    with pytest.raises(Unauthorized):
        await service.authenticate(old)


async def test_a_start_killed_between_file_and_row_is_finished_by_the_next(
    database: Database, tmp_path: Path
) -> None:
    file = tmp_path / "admin-token"
    file.write_text("aeb_written_but_not_recorded\n")
    service = TokenService(database)
    await service.ensure_bootstrap(file)
    assert (await service.authenticate("aeb_written_but_not_recorded")).kind == "bootstrap"


async def test_only_hashes_are_stored(database: Database, tmp_path: Path) -> None:
    service = TokenService(database, [StaticToken("plain", "deployer", "dan")])
    await service.ensure_bootstrap(tmp_path / "admin-token")
    session = await service.login("plain")
    assert session.token not in repr(session)
    content = (tmp_path / "aether.db").read_bytes() + (tmp_path / "aether.db-wal").read_bytes()
    for secret in ("plain", session.token, (tmp_path / "admin-token").read_text().strip()):
        assert secret.encode() not in content


async def test_a_session_expires(database: Database) -> None:
    service = TokenService(database, [StaticToken("plain", "reader", "rob")])
    session = await service.login("plain")
    assert session.principal.expires_at is not None
    assert abs(session.principal.expires_at - now_us() - SESSION_SECS * 1_000_000) < 60_000_000
    async with database.write() as tx:
        await tx.execute(sa.update(tokens).values(expires_at=now_us() - 1))
    with pytest.raises(Unauthorized):
        await service.authenticate(session.token)


async def test_a_session_of_a_session_lives_no_longer(database: Database) -> None:
    service = TokenService(database, [StaticToken("plain", "reader", "rob")])
    first = await service.login("plain")
    second = await service.login(first.token)
    assert second.principal == first.principal
    assert second.token != first.token


async def test_logout_ends_sessions_only(database: Database, tmp_path: Path) -> None:
    service = TokenService(database, [StaticToken("plain", "reader", "rob")])
    await service.ensure_bootstrap(tmp_path / "admin-token")
    bootstrap = (tmp_path / "admin-token").read_text().strip()
    session = await service.login("plain")
    for token in (session.token, "plain", bootstrap, None):
        await service.logout(token)
    assert await service.authenticate("plain")
    assert await service.authenticate(bootstrap)
    with pytest.raises(Unauthorized):
        await service.authenticate(session.token)


@pytest.mark.parametrize("token", [None, "", "x", "plain ", "Plain", "pläin", "\udcff"])
async def test_other_texts_are_refused(database: Database, token: str | None) -> None:
    service = TokenService(database, [StaticToken("plain", "reader", "rob")])
    with pytest.raises(Unauthorized):
        await service.authenticate(token)
