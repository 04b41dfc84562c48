"""A SQLite file that several processes of one machine use at once: transactions in threads, and word of changes.

Why not `aether.stores.database`: its callers hold transactions open over several awaits. Here a transaction is one
function that runs in the thread of its connection without coming back to the event loop, so that all writes that wait
at a moment can be committed together: each in a savepoint of its own, for the price of one flush to the disk. What
was acknowledged is on the disk (`synchronous=FULL`); a process that is killed loses only what nobody was told of.

A change by this process or another wakes whoever waits in `changed`. Other processes are told (`wakes`); one that was
killed between its commit and telling is noticed by looking at SQLite's own counter twice a second, and only while
somebody waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import structlog

from aether.model.errors import ServiceUnavailable
from aether.stores.local import wakes

_T = TypeVar("_T")
Work = Callable[[sqlite3.Connection], Any]
_AT_ONCE = 64
"""Writes of one commit."""
_LOOK_SECS = 0.5
_BUSY_AGAIN_SECS = 0.01
_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "cache_size=-4096", "temp_store=MEMORY")
_log = structlog.stdlib.get_logger("aether.stores")


class SqliteFile:
    """See the module. `layout` are the statements that make the tables of `version`."""

    def __init__(self, path: Path, layout: Sequence[str], version: int, *, patience_secs: float = 5.0) -> None:
        self.path = path
        self._layout = layout
        self._version = version
        self._patience = patience_secs
        """How long a write may wait for other processes, and anybody for an answer."""
        self._folder = path.with_name(path.name + ".wake")
        self._ear = wakes.Ear(self._folder, self._wake)
        self._writing = _Thread(f"{path.name} writes", self._connect, self._commit)
        self._reading = _Thread(f"{path.name} reads", self._connect, self._answer)
        self._waiting: set[asyncio.Future[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._looking: asyncio.Task[None] | None = None
        self._looks = asyncio.Event()
        self._changes = 0

    async def open(self) -> None:
        """Raises ServiceUnavailable."""
        self._loop = asyncio.get_running_loop()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._ear.open()
        except OSError as error:
            self._ear.close()
            raise ServiceUnavailable(f"{self.path} cannot be used: {error}") from error
        self._writing.start()
        self._reading.start()
        try:
            await self.write(self._lay_out)
        except BaseException:
            await self.close()
            raise
        self._looking = asyncio.create_task(self._look(), name=f"{self.path.name} looks")

    async def close(self) -> None:
        """Finish what is under way and give everything back."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait((self._looking,))
        self._ear.close()
        # one after the other: SQLite tidies up when the last connection closes, and two at once are both not the last
        for thread in (self._reading, self._writing):
            thread.end()
            await asyncio.to_thread(thread.join)
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    # --- transactions

    async def write(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run `work` in a transaction, committed when this returns; what it raises undoes it.

        Raises ServiceUnavailable when the file cannot be written; cancelled or too late, the write may still be
        made."""
        return await self._ask(self._writing, work)

    async def read(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run `work` on one state of the file, in which everything acknowledged before is seen."""
        return await self._ask(self._reading, work)

    async def _ask(self, thread: _Thread, work: Callable[[sqlite3.Connection], _T]) -> _T:
        asked = thread.ask(work)
        try:
            async with asyncio.timeout(self._patience * 2):
                return await asyncio.wrap_future(asked)
        except TimeoutError:
            raise ServiceUnavailable(f"{self.path.name} does not answer; whether it was changed is unknown") from None
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise
        except (sqlite3.Error, OSError) as error:
            raise ServiceUnavailable(_meaning(self.path.name, error)) from error

    # --- word of changes

    @property
    def changes(self) -> int:
        """Grows whenever the file may have changed; hand it to `changed` after having looked at the file."""
        return self._changes

    async def changed(self, since: int) -> None:
        """Return when the file may have changed since `changes` was `since`."""
        if self._changes != since:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        self._looks.set()
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)

    def _wake(self) -> None:
        self._changes += 1
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def _look(self) -> None:
        """While somebody waits, notice the changes of processes that did not live to tell of them."""
        seen = -1
        while True:
            if not self._waiting:
                self._looks.clear()
                await self._looks.wait()
            try:
                found = await self.read(_counter)
            except ServiceUnavailable as error:
                _log.warning("a shared file cannot be looked at", path=str(self.path), error=error.message)
            else:
                if found != seen:
                    seen = found
                    self._wake()
            await asyncio.sleep(_LOOK_SECS)

    # --- in the threads

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=self._patience, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        try:
            for pragma in _PRAGMAS:
                self._patiently(connection.execute, f"PRAGMA {pragma}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _lay_out(self, connection: sqlite3.Connection) -> None:
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        if found == self._version:
            return
        if found:
            raise ServiceUnavailable(f"{self.path} was written by another version of Aether ({found})")
        for statement in self._layout:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version={self._version}")

    def _answer(self, connection: sqlite3.Connection, asked: Sequence[_Asked]) -> None:
        for one in asked:
            if not one.future.set_running_or_notify_cancel():
                continue
            try:
                result = self._patiently(_on_one_state, connection, one.work)
            except BaseException as error:  # noqa: BLE001 - handed to whoever asked
                one.future.set_exception(error)
            else:
                one.future.set_result(result)

    def _commit(self, connection: sqlite3.Connection, asked: Sequence[_Asked]) -> None:
        running = [one for one in asked if one.future.set_running_or_notify_cancel()]
        done: list[tuple[_Asked, Any, BaseException | None]] = []
        before = connection.total_changes
        try:
            self._patiently(connection.execute, "BEGIN IMMEDIATE")
            for one in running:
                done.append((one, *_in_savepoint(connection, one.work)))
            connection.execute("COMMIT")
        except BaseException as error:  # noqa: BLE001 - handed to whoever asked
            _roll_back(connection)
            for one in running:
                one.future.set_exception(error)
            return
        if connection.total_changes != before:
            wakes.tell(self._folder, self._ear.name)
            if self._loop is not None:
                with contextlib.suppress(RuntimeError):  # a loop that has ended has nobody who waits
                    self._loop.call_soon_threadsafe(self._wake)
        for one, result, error in done:
            if error is None:
                one.future.set_result(result)
            else:
                one.future.set_exception(error)

    def _patiently(self, call: Callable[..., _T], *arguments: Any) -> _T:
        """SQLite gives up at once in some states, such as a recovery after a killed process that another one has
        begun, without waiting as it was told to."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                return call(*arguments)
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() >= deadline:
                    raise
                time.sleep(_BUSY_AGAIN_SECS)


class _Asked:
    __slots__ = ("future", "work")

    def __init__(self, work: Work) -> None:
        self.work = work
        self.future: Future[Any] = Future()


class _Thread:
    """A thread with a connection of its own, opened at the first question, that answers in the order of asking."""

    def __init__(
        self,
        name: str,
        connect: Callable[[], sqlite3.Connection],
        serve: Callable[[sqlite3.Connection, Sequence[_Asked]], None],
    ) -> None:
        self._connect = connect
        self._serve = serve
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._ended = False
        # a server that ends by an exception must not hang on a file that nobody closed
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask(self, work: Work) -> Future[Any]:
        if self._ended:
            raise ServiceUnavailable("the file has been closed")
        asked = _Asked(work)
        self._asked.put(asked)
        return asked.future

    def end(self) -> None:
        self._ended = True
        self._asked.put(None)

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        connection: sqlite3.Connection | None = None
        ended = False
        while not ended:
            asked: list[_Asked] = []
            taken = self._asked.get()
            while taken is not None:
                asked.append(taken)
                if len(asked) == _AT_ONCE:
                    break
                try:
                    taken = self._asked.get_nowait()
                except queue.Empty:
                    break
            ended = taken is None
            if not asked:
                continue
            try:
                connection = connection or self._connect()
            except (sqlite3.Error, OSError) as error:
                for one in asked:
                    if one.future.set_running_or_notify_cancel():
                        one.future.set_exception(error)
                continue
            try:
                self._serve(connection, asked)
            except sqlite3.Error as error:
                # what cannot even be rolled back is opened anew
                connection.close()
                connection = None
                for one in asked:
                    if not one.future.done():
                        one.future.set_exception(error)
        if connection is not None:
            connection.close()


def _in_savepoint(connection: sqlite3.Connection, work: Work) -> tuple[Any, BaseException | None]:
    """What `work` returned, or raised: then nothing of it is left. Raises what has undone the whole transaction."""
    connection.execute("SAVEPOINT one")
    try:
        result = work(connection)
    except BaseException as error:
        if not connection.in_transaction:
            raise
        connection.execute("ROLLBACK TO one")
        connection.execute("RELEASE one")
        return None, error
    connection.execute("RELEASE one")
    return result, None


def _on_one_state(connection: sqlite3.Connection, work: Work) -> Any:
    try:
        connection.execute("BEGIN")
        return work(connection)
    finally:
        _roll_back(connection)


def _roll_back(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:
        connection.execute("ROLLBACK")


def _counter(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA data_version").fetchone()[0])


def _meaning(name: str, error: Exception) -> str:
    if _is_busy(error):
        return f"{name} is locked by another process; try again"
    if _code(error).startswith("SQLITE_FULL"):
        return f"the disk that holds {name} is full"
    return f"{name} cannot be used: {error}"


def _is_busy(error: Exception) -> bool:
    return _code(error).startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


def _code(error: Exception) -> str:
    return getattr(error, "sqlite_errorname", "") or ""
