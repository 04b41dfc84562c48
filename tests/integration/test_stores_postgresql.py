"""PostgreSQL going away, standing still and coming back, and what it refuses, told in one clear sentence each."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from aether.model.addresses import without_passwords
from aether.model.errors import AetherError, BadRequest, ConfigError, ServiceUnavailable
from aether.model.names import new_id
from aether.model.times import now_us
from aether.stores.database import postgresql as driver
from aether.stores.database.engine import Database
from aether.stores.database.postgresql import Address
from aether.stores.database.tables import applications
from support.databases import Databases, LocalServer, execute, opened, rows


async def add_app(database: Database, name: str) -> None:
    async with database.write() as tx:
        await tx.execute(sa.insert(applications).values(id=new_id(), name=name, owner="ann", created_at=now_us()))


async def names(database: Database) -> set[str]:
    async with database.read() as tx:
        return set((await tx.execute(sa.select(applications.c.name))).scalars())


@pytest.fixture
async def own(own_postgresql: LocalServer) -> AsyncIterator[Database]:
    """A database on a server of the test's own."""
    async with opened(own_postgresql.url, timeout_secs=1.0) as database:
        await add_app(database, "before")
        yield database


@pytest.fixture
def url(postgresql: Databases) -> str:
    return postgresql.fresh()


# --- away and back


async def test_a_server_that_was_started_anew_is_used_again_without_an_error(
    own: Database, own_postgresql: LocalServer
) -> None:
    for how in (signal.SIGINT, signal.SIGQUIT):
        async with asyncio.TaskGroup() as group:  # several connections are pooled
            for _ in range(5):
                group.create_task(own.check())
        await asyncio.to_thread(own_postgresql.stop, how)
        await asyncio.to_thread(own_postgresql.start)
        await asyncio.gather(*(own.check() for _ in range(5)))
        await add_app(own, f"after {how}")
    assert len(await names(own)) == 3


async def test_while_the_server_is_away_everybody_is_told_at_once(own: Database, own_postgresql: LocalServer) -> None:
    await asyncio.to_thread(own_postgresql.stop)
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(ServiceUnavailable, match="database"):
            await own.check()
        with pytest.raises(ServiceUnavailable, match="database"):
            await add_app(own, "lost")
    assert time.monotonic() - began < 5
    await asyncio.to_thread(own_postgresql.start)
    await add_app(own, "found")
    assert await names(own) == {"before", "found"}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
async def test_a_server_that_goes_away_in_a_transaction_has_kept_nothing_of_it(
    own: Database, own_postgresql: LocalServer, how: signal.Signals
) -> None:
    async def interrupted() -> None:
        async with own.write() as tx:
            row = {"id": new_id(), "name": "half", "owner": "ann", "created_at": 1}
            await tx.execute(sa.insert(applications).values(row))
            await asyncio.to_thread(own_postgresql.stop, how)
            await tx.execute(sa.update(applications).values(owner="bob"))

    with pytest.raises(ServiceUnavailable):
        await interrupted()
    await asyncio.to_thread(own_postgresql.start)
    assert await names(own) == {"before"}


async def test_a_server_that_goes_away_before_the_commit_is_told_of(
    own: Database, own_postgresql: LocalServer
) -> None:
    async def interrupted() -> None:
        async with own.write() as tx:
            row = {"id": new_id(), "name": "half", "owner": "ann", "created_at": 1}
            await tx.execute(sa.insert(applications).values(row))
            await asyncio.to_thread(own_postgresql.stop, signal.SIGQUIT)

    with pytest.raises(ServiceUnavailable):
        await interrupted()
    await asyncio.to_thread(own_postgresql.start)
    assert await names(own) == {"before"}


async def test_many_writers_through_an_outage_lose_nothing_that_was_acknowledged(
    own: Database, own_postgresql: LocalServer
) -> None:
    kept: set[str] = set()
    refused = 0
    over = asyncio.Event()

    async def write_on(writer: int) -> None:
        nonlocal refused
        n = 0
        while not over.is_set():
            n += 1
            try:
                await add_app(own, f"{writer}-{n}")
            except ServiceUnavailable:
                refused += 1
                await asyncio.sleep(0.02)
            else:
                kept.add(f"{writer}-{n}")

    async with asyncio.TaskGroup() as group:
        for writer in range(4):
            group.create_task(write_on(writer))
        for how in (signal.SIGINT, signal.SIGQUIT):
            await asyncio.sleep(0.3)
            await asyncio.to_thread(own_postgresql.stop, how)
            await asyncio.sleep(0.5)
            before = len(kept)
            await asyncio.to_thread(own_postgresql.start)
            while len(kept) < before + 20:
                await asyncio.sleep(0.02)
        over.set()
    assert refused
    assert await names(own) >= kept


async def test_a_server_that_stands_still_is_given_up_in_time(
    own_postgresql: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "STATEMENT_SECS", 0.5)
    monkeypatch.setattr(driver, "_GIVE_UP_SECS", 0.3)
    async with opened(own_postgresql.url, pool_size=2, timeout_secs=0.7) as database:
        await add_app(database, "before")
        own_postgresql.freeze()
        try:
            began = time.monotonic()
            for _ in range(2):
                with pytest.raises(ServiceUnavailable, match="in time"):
                    await add_app(database, "lost")
            assert time.monotonic() - began < 12
        finally:
            own_postgresql.thaw()
        await add_app(database, "after")
        assert await names(database) == {"before", "after"}


# --- waits with an end


async def test_waiting_for_somebody_elses_lock_ends(url: str) -> None:
    async with opened(url, timeout_secs=0.3) as database:
        await add_app(database, "one")
        held = asyncio.Event()

        async def hold() -> None:
            async with database.write() as tx:
                await tx.execute(sa.update(applications).values(owner="bob"))
                held.set()
                await asyncio.sleep(1)

        holding = asyncio.create_task(hold())
        await held.wait()
        with pytest.raises(ServiceUnavailable, match="holds what this one needs"):
            async with database.write() as tx:
                await tx.execute(sa.update(applications).values(owner="carl"))
        await holding
        assert rows(url, "select owner from applications") == [("bob",)]


async def test_of_two_that_wait_for_each_other_one_is_told_and_the_other_goes_on(url: str) -> None:
    async with opened(url, timeout_secs=3) as database:
        for name in ("a", "b"):
            await add_app(database, name)
        both = asyncio.Barrier(2)

        async def change(first: str, second: str) -> None:
            async with database.write() as tx:
                await tx.execute(sa.update(applications).where(applications.c.name == first).values(owner=first))
                await both.wait()
                await tx.execute(sa.update(applications).where(applications.c.name == second).values(owner=first))

        found = await asyncio.gather(change("a", "b"), change("b", "a"), return_exceptions=True)
        (told,) = [error for error in found if error is not None]
        assert isinstance(told, ServiceUnavailable)
        assert "each other" in told.message
        owners = rows(url, "select distinct owner from applications")
        assert owners in ([("a",)], [("b",)])


async def test_a_process_that_stands_still_in_a_transaction_does_not_keep_its_locks(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "IDLE_SECS", 0.4)
    async with opened(url, timeout_secs=3) as database:
        await add_app(database, "one")

        async def stand_still() -> None:
            async with database.write() as tx:
                await tx.execute(sa.update(applications).values(owner="frozen"))
                async with opened(url, timeout_secs=3) as other, other.write() as theirs:
                    await theirs.execute(sa.update(applications).values(owner="quick"))

        with pytest.raises(ServiceUnavailable):
            await stand_still()
        assert rows(url, "select owner from applications") == [("quick",)]
        await database.check()


async def test_a_statement_that_takes_too_long_is_broken_off(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "STATEMENT_SECS", 0.2)
    async with opened(url) as database:
        with pytest.raises(ServiceUnavailable, match="too long"):
            async with database.read() as tx:
                await tx.execute(sa.text("SELECT pg_sleep(5)"))
        async with database.patient() as tx:
            await tx.execute(sa.text("SELECT pg_sleep(0.4)"))
        await database.check()


# --- refusals


@pytest.mark.parametrize(
    "values",
    [
        {"name": "nul\0nul"},
        {"name": "half \ud800 a pair"},
        {"name": "n" * 41},
        {"created_at": 2**63},
        {"last_release": 2**31},
    ],
)
async def test_what_cannot_be_kept_is_a_bad_request(url: str, values: dict[str, Any]) -> None:
    async with opened(url) as database:
        row = {"id": new_id(), "name": "one", "owner": "ann", "created_at": 1, **values}
        with pytest.raises(BadRequest):
            async with database.write() as tx:
                await tx.execute(sa.insert(applications).values(row))
        assert await names(database) == set()


async def refusal(url: str) -> AetherError:
    with pytest.raises(AetherError) as found:
        async with opened(url, timeout_secs=1):
            pass
    return found.value


async def test_a_login_or_a_database_that_is_not_there_is_a_mistake_in_the_settings(postgresql: Databases) -> None:
    there = Address(postgresql.server.url)
    missing = await refusal(there.with_database("nowhere").dsn)
    assert isinstance(missing, ConfigError)
    assert "no such database" in missing.message
    stranger = await refusal(there.dsn.replace("aether@", "stranger:secret@"))
    assert isinstance(stranger, ConfigError)
    assert "refuses this login" in stranger.message
    assert "secret" not in stranger.message


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("mysql://x/y", "must begin with postgresql://"),
        ("postgresql://a@b:port/c", "cannot be used"),
        ("postgresql://a@b/c?sslmode=sometimes", "sslmode"),
        ("postgresql://a:p#q@b/c", "%23"),
    ],
)
async def test_an_address_that_is_none_is_told_without_its_password(given: str, why: str) -> None:
    found = await refusal(given)
    assert isinstance(found, ConfigError)
    assert why in found.message
    assert "p#q" not in found.message


def test_every_spelling_of_an_address_is_the_same() -> None:
    for given in ("postgres", "postgresql", "postgresql+asyncpg"):
        address = Address(f"{given}://ann:s%40crt@host:5433/the%20db?sslmode=require")
        assert address.dsn == "postgresql://ann:s%40crt@host:5433/the%20db?sslmode=require"
        assert address.database == "the db"
        assert address.with_database("x y").dsn == "postgresql://ann:s%40crt@host:5433/x%20y?sslmode=require"
        assert address.shown == "postgresql://ann:****@host:5433/the%20db?sslmode=require"
    shown = without_passwords("postgresql://h/d?password=x&sslpassword=y")
    assert shown == "postgresql://h/d?password=****&sslpassword=****"


async def test_tls_is_spoken_when_the_address_asks_for_it(own_postgresql: LocalServer) -> None:
    plain = await refusal(own_postgresql.url + "?sslmode=require")
    assert isinstance(plain, ServiceUnavailable)
    own_postgresql.stop()
    folder = own_postgresql.folder
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "server.key", "-out", folder / "server.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    for name in ("server.key", "server.crt"):
        owner = own_postgresql.data.stat()
        os.chown(folder / name, owner.st_uid, owner.st_gid)
        (folder / name).chmod(0o600)
    own_postgresql.settings = {
        "ssl": "on", "ssl_cert_file": str(folder / "server.crt"), "ssl_key_file": str(folder / "server.key"),
    }  # fmt: skip
    own_postgresql.start()
    trusted = f"{own_postgresql.url}?sslmode=verify-full&sslrootcert={folder / 'server.crt'}"
    async with opened(trusted) as database, database.read() as tx:
        assert await tx.scalar(sa.text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"))
    elsewhere = Path(folder, "empty.crt")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=other",
         "-keyout", os.devnull, "-out", elsewhere], check=True, capture_output=True,
    )  # fmt: skip
    stranger = await refusal(f"{own_postgresql.url}?sslmode=verify-full&sslrootcert={elsewhere}")
    assert isinstance(stranger, ServiceUnavailable)


async def test_settings_in_the_address_win(url: str) -> None:
    async with opened(url + "?lock_timeout=123&application_name=mine") as database, database.read() as tx:
        assert await tx.scalar(sa.text("SHOW lock_timeout")) == "123ms"
        assert await tx.scalar(sa.text("SHOW application_name")) == "mine"


async def test_a_schema_that_changes_under_a_running_server_costs_one_answer_at_most(url: str) -> None:
    async with opened(url, pool_size=1) as database:
        await add_app(database, "one")
        query = sa.text("SELECT * FROM applications")
        async with database.read() as tx:
            await tx.execute(query)
        execute(url, "ALTER TABLE applications ADD COLUMN newer integer")
        for _ in range(2):
            try:
                async with database.read() as tx:
                    found = (await tx.execute(query)).one()
            except ServiceUnavailable:
                continue
            break
        assert found.newer is None


def test_the_server_of_the_tests_ends_with_them() -> None:
    """Not that of this process: one whose process is killed."""
    script = (
        "import sys, time; sys.path.insert(0, 'tests')\n"
        "from support.databases import LocalServer, binaries\n"
        "server = LocalServer(binaries()); server.start()\n"
        "print(server.process.pid, server.folder, flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    pid, folder = child.stdout.readline().split()
    child.kill()
    child.wait()
    child.stdout.close()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z":
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)
    shutil.rmtree(folder)
