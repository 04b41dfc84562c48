"""The database port that every capability speaks to; drivers live in `aether.stores.database`.

Nothing is imported at run time: the connection type is SQLAlchemy Core's, the one dialect-neutral SQL
vocabulary of the server.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy.ext.asyncio import AsyncConnection

alongside: ContextVar[Callable[[AsyncConnection], Awaitable[None]] | None] = ContextVar("alongside", default=None)
"""Called at the end of every write transaction of this context, before it is committed: what must be kept if and only
if a change is, whoever makes it (the audit log)."""


class DatabasePort(Protocol):
    """Transactions over the tables of `aether.stores.database.tables`.

    Both methods raise ServiceUnavailable when the database cannot be had in time. IntegrityError of SQLAlchemy
    passes through, because only the caller knows what a broken rule means.

    `brief` promises that no statement touches more than a handful of rows, each found by an index: SQLite then runs
    them without changing threads, and brief writes that wait at the same moment share one commit.
    """

    def read(self, *, brief: bool = False) -> AbstractAsyncContextManager[AsyncConnection]:
        """One consistent snapshot; writes made in it are never committed."""
        ...

    def write(self, *, brief: bool = False) -> AbstractAsyncContextManager[AsyncConnection]:
        """One transaction that sees the newest state and is committed on leaving, rolled back on any error.

        Keep it short and never await anything but the database inside. On SQLite writers take turns; on PostgreSQL
        they run side by side, each statement seeing what others have committed before it. So what a decision rests on
        is locked before it is read (`with_for_update`, which SQLite ignores), or held by a constraint, or is a
        condition of the very statement that changes it. Locks are taken in one order, so that nobody waits in a ring:
        leases; owners, users and teams, tokens, sessions; applications, artifacts and uploads, deployments, and what
        hangs on those; rows of one table by their key. `FOR NO KEY UPDATE` (`key_share=True`) is enough for a row
        that is not deleted, and lets others refer to it.
        """
        ...
