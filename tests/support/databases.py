"""Databases for tests: SQLite in the test's folder, and PostgreSQL, found or started once per test process.

Where PostgreSQL comes from, the first that there is:

1. `DATABASE_URL`: that server, with a login that may make databases; the database it names is made if absent.
2. local binaries (Debian's postgresql), started on a free loopback port in a temporary folder. Not as root:
   PostgreSQL refuses that, so root's tests start it as `postgres` or `nobody`.
3. Docker with `AETHER_TEST_PG_IMAGE` (postgres:15-alpine).

`AETHER_FORCE_TESTCONTAINERS=1` takes the third before the second; `AETHER_DISABLE_TESTCONTAINERS=1` never takes it,
and a missing server is a failure then. Each test has a fresh database, copied from one with the schema; with
`AETHER_TEST_SHARED_POOL=1` all share one, emptied in between. `AETHER_TEST_MAX_CONNS` and
`AETHER_TEST_DB_ACQUIRE_TIMEOUT_SECS` bound the pools of `opened`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import itertools
import os
import pwd
import re
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import pytest
import sqlalchemy as sa

from aether.stores.database.engine import Database
from aether.stores.database.postgresql import Address
from aether.stores.database.tables import metadata
from support.product import free_port

_T = TypeVar("_T")
KINDS = ("sqlite", "postgresql")
_CURRENT = "AETHER_TEST_CURRENT_DATABASE_URL"
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "max_connections": "200",
    "autovacuum": "off",
    "deadlock_timeout": "200ms",
}
_START_SECS = 30.0
_PR_SET_PDEATHSIG = 1


def current_url(folder: Path) -> str:
    """The database of the test that runs, if it or its module asked for `database_url`; else SQLite in `folder`."""
    return os.environ.get(_CURRENT) or f"sqlite+aiosqlite:///{folder}/aether.db"


def flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("1", "true")


def max_conns() -> int:
    return int(os.environ.get("AETHER_TEST_MAX_CONNS", "6"))


def acquire_secs() -> float:
    return float(os.environ.get("AETHER_TEST_DB_ACQUIRE_TIMEOUT_SECS", "5"))


def connected(url: str, **options: Any) -> Database:
    """A database with the bounds that the environment sets."""
    return Database(url, **{"pool_size": max_conns(), "timeout_secs": acquire_secs(), **options})


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Database]:
    database = connected(url, **options)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


async def everything_in(database: Database) -> bytes:
    """All that is kept: the bytes of SQLite's files, or the rows of every table."""
    if database.kind.name == "sqlite":
        path = Path(sa.make_url(database.kind.url).database or "")
        return path.read_bytes() + path.with_name(path.name + "-wal").read_bytes()
    async with database.read() as tx:
        kept = [(await tx.execute(sa.select(table))).all() for table in metadata.sorted_tables]
    return repr(kept).encode()


# --- asked from outside


class _Elsewhere:
    """An event loop in a thread of its own, for tests that are in none or must not wait in theirs."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="databases of tests", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)


_elsewhere: _Elsewhere | None = None


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    global _elsewhere
    _elsewhere = _elsewhere or _Elsewhere()
    return _elsewhere.run(work)


def rows(url: str, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
    """What a query finds, asked with a connection of its own; `?` stands for an argument on both databases."""
    if url.startswith("sqlite"):
        path = sa.make_url(url).database
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
        try:
            return connection.execute(sql, arguments).fetchall()
        finally:
            connection.close()
    return [tuple(row) for row in _run(_fetch(url, sql, arguments))]


def execute(url: str, sql: str) -> None:
    """Run one statement by itself on PostgreSQL."""
    _run(_fetch(url, sql, ()))


async def _fetch(url: str, sql: str, arguments: tuple[Any, ...]) -> list[Any]:
    connection = await Address(url).connect(10)
    try:
        numbers = itertools.count(1)
        return await connection.fetch(re.sub(r"\?", lambda _: f"${next(numbers)}", sql), *arguments)
    finally:
        await connection.close()


# --- servers


def binaries() -> Path | None:
    """The folder with PostgreSQL's programs, the newest version's."""
    found = [
        *Path("/usr/lib/postgresql").glob("*/bin/initdb"),
        *Path("/opt/homebrew/opt").glob("postgresql*/bin/initdb"),
    ]
    if found:
        return max(found, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))]).parent
    program = shutil.which("initdb")
    return None if program is None else Path(program).resolve().parent


def _user() -> dict[str, Any]:
    """As whom the programs are run."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise RuntimeError("PostgreSQL does not run as root, and there is neither a user 'postgres' nor 'nobody'")


def _end_with_us() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT, 0, 0, 0)


@dataclass
class LocalServer:
    """A PostgreSQL of the tests' own, which may be stopped, killed, frozen and started again."""

    bin: Path
    port: int = field(default_factory=free_port)
    settings: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="aether-pg-"))
        self.data = self.folder / "data"
        user = _user()
        if user:
            os.chown(self.folder, user["user"], user["group"])
        made = subprocess.run(
            [
                self.bin / "initdb", "-D", self.data, "-U", "aether", "-A", "trust", "--no-sync", "-E", "UTF8",
                # not the order of bytes, which SQLite has: what depends on it is to be seen
                "--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en-US",
            ],
            cwd=self.folder, capture_output=True, check=False, **user,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr.decode()

    @property
    def url(self) -> str:
        return f"postgresql://aether@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start and return once it answers."""
        assert self.process is None
        options = {**_SETTINGS, "unix_socket_directories": str(self.folder), **self.settings}
        arguments = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.bin / "postgres", "-D", self.data, "-p", str(self.port), *arguments],
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=_end_with_us if os.uname().sysname == "Linux" else None, **_user(),
            )  # fmt: skip
        deadline = time.monotonic() + _START_SECS
        while True:
            try:
                execute(self.url, "SELECT 1")
                return
            except (OSError, asyncpg.PostgresError):
                ended = self.process.poll()
                assert ended is None, f"PostgreSQL ended with {ended}:\n{self.log()}"
                assert time.monotonic() < deadline, self.log()
                time.sleep(0.02)

    def log(self) -> str:
        return (self.folder / "log").read_text()[-4000:]

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it: SIGINT ends its sessions in order, SIGQUIT as a crash would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(how)
        self.process.wait(30)
        self.process = None

    def freeze(self) -> None:
        """Every process of it stands still: connections stay, and nothing answers."""
        assert self.process is not None
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _pids(self) -> list[int]:
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [self.process.pid, *map(int, children)]

    def close(self) -> None:
        if self.process is not None:
            self.thaw()
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class DockerServer:
    """A PostgreSQL in a container, as long as it is not closed."""

    image: str

    def start(self) -> None:
        command = [
            "docker", "run", "-d", "--rm", "-p", "127.0.0.1::5432", "-e", "POSTGRES_USER=aether",
            "-e", "POSTGRES_HOST_AUTH_METHOD=trust", self.image, "-c", "fsync=off", "-c", "max_connections=200",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        self.container = done.stdout.strip()
        said = subprocess.run(["docker", "port", self.container, "5432"], capture_output=True, text=True, check=True)
        self.url = f"postgresql://aether@{said.stdout.split()[0]}/postgres"
        deadline = time.monotonic() + 60
        while True:
            try:
                execute(self.url, "SELECT 1")
                return
            except (OSError, asyncpg.PostgresError):
                assert time.monotonic() < deadline, "the container's PostgreSQL does not answer"
                time.sleep(0.2)

    def close(self) -> None:
        subprocess.run(["docker", "kill", self.container], capture_output=True, check=False)


@dataclass
class GivenServer:
    """The server that DATABASE_URL names."""

    url: str

    def start(self) -> None:
        try:
            execute(self.url, "SELECT 1")
        except asyncpg.InvalidCatalogNameError:
            address = Address(self.url)
            execute(address.with_database("postgres").dsn, f'CREATE DATABASE "{address.database}"')

    def close(self) -> None:
        """It is somebody else's."""


Server = LocalServer | DockerServer | GivenServer


def find_server() -> Server:
    """Skips, or where that is not allowed fails, when there is none."""
    if url := os.environ.get("DATABASE_URL"):
        return GivenServer(url)
    docker = None if flag("AETHER_DISABLE_TESTCONTAINERS") else shutil.which("docker")
    local = binaries()
    if local is not None and not (flag("AETHER_FORCE_TESTCONTAINERS") and docker):
        return LocalServer(local)
    if docker:
        return DockerServer(os.environ.get("AETHER_TEST_PG_IMAGE", "postgres:15-alpine"))
    if flag("AETHER_DISABLE_TESTCONTAINERS") or flag("AETHER_FORCE_TESTCONTAINERS"):
        pytest.fail("there is no PostgreSQL: set DATABASE_URL or install postgresql (./dev.sh db-start)")
    pytest.skip("component: postgresql")


class Databases:
    """Fresh databases on one server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        server.start()
        self._numbers = itertools.count(1)
        self._prefix = f"aether_test_{os.getpid()}_{os.urandom(3).hex()}"
        self._template: str | None = None
        self._shared: str | None = None

    def empty(self) -> str:
        """The URL of a database in which there is nothing."""
        return self._made("")

    def fresh(self) -> str:
        """The URL of a database with the schema and nothing in it."""
        if flag("AETHER_TEST_SHARED_POOL"):
            return self._emptied()
        if self._template is None:
            url = self.empty()
            _run(_migrated(url))
            self._template = Address(url).database
        return self._made(f' TEMPLATE "{self._template}" STRATEGY FILE_COPY')

    def drop(self, url: str) -> None:
        if url != self._shared:
            execute(self.server.url, f'DROP DATABASE IF EXISTS "{Address(url).database}" WITH (FORCE)')

    def close(self) -> None:
        for name in filter(None, (self._template, self._shared and Address(self._shared).database)):
            execute(self.server.url, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        self.server.close()

    def _made(self, how: str) -> str:
        name = f"{self._prefix}_{next(self._numbers)}"
        execute(self.server.url, f'CREATE DATABASE "{name}"{how}')
        return Address(self.server.url).with_database(name).dsn

    def _emptied(self) -> str:
        if self._shared is None:
            self._shared = self.empty()
            _run(_migrated(self._shared))
        names = ", ".join(table.name for table in metadata.sorted_tables)
        execute(self._shared, f"TRUNCATE {names} RESTART IDENTITY")
        _run(_with_default_team(self._shared))
        return self._shared


@functools.cache
def _sqlite_template() -> bytes:
    with tempfile.TemporaryDirectory(prefix="aether-sqlite-") as folder:
        _run(_migrated(f"sqlite+aiosqlite:///{folder}/aether.db"))
        return Path(folder, "aether.db").read_bytes()


def fresh_sqlite(folder: Path) -> str:
    """The URL of a database file in `folder` with the schema and nothing in it."""
    file = folder / "aether.db"
    file.touch(mode=0o600)
    file.write_bytes(_sqlite_template())
    return f"sqlite+aiosqlite:///{file}"


async def _migrated(url: str) -> None:
    async with opened(url):
        pass


async def _with_default_team(url: str) -> None:
    """What the migrations put into the tables."""
    async with opened(url) as database, database.write() as tx:
        await tx.execute(sa.text("INSERT INTO owners (name, kind) VALUES ('default', 'team')"))
        await tx.execute(sa.text("INSERT INTO teams (id, name, created_at) VALUES ('default', 'default', 1)"))


# --- fixtures; a test module imports none: tests/conftest.py does


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Databases]:
    """Fresh databases on PostgreSQL, one server for the session."""
    made = Databases(find_server())
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(params=KINDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A database of the test's own, once on SQLite and once on PostgreSQL, with the schema at head. Whatever the test
    serves uses it too, also in other processes (see `current_url`)."""
    with fresh_url(request, request.param, tmp_path) as url:
        monkeypatch.setenv(_CURRENT, url)
        yield url


@contextlib.contextmanager
def fresh_url(request: pytest.FixtureRequest, kind: str, folder: Path) -> Iterator[str]:
    """For fixtures of other scopes."""
    if kind == "sqlite":
        yield fresh_sqlite(folder)
        return
    databases: Databases = request.getfixturevalue("postgresql")
    url = databases.fresh()
    try:
        yield url
    finally:
        databases.drop(url)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An open database of the test's own, once on SQLite and once on PostgreSQL."""
    async with opened(database_url) as made:
        yield made


@pytest.fixture
def own_postgresql() -> Iterator[LocalServer]:
    """A running PostgreSQL server of the test's own, to be stopped and frozen."""
    found = binaries()
    if found is None:
        pytest.skip("component: postgresql")
    server = LocalServer(found)
    try:
        server.start()
        yield server
    finally:
        server.close()
