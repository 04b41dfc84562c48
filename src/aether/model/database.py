"""The database port that every capability speaks to; drivers live in `aether.stores.database`.

Nothing is imported at run time: the connection type is SQLAlchemy Core's, the one dialect-neutral SQL
vocabulary of the server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy.ext.asyncio import AsyncConnection


class DatabasePort(Protocol):
    """Transactions over the tables of `aether.stores.database.tables`.

    Both methods raise ServiceUnavailable when the database cannot be had in time. IntegrityError of SQLAlchemy
    passes through, because only the caller knows what a broken rule means.
    """

    def read(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """One consistent snapshot; writes made in it are never committed."""
        ...

    def write(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """One transaction that sees the newest state and is committed on leaving, rolled back on any error.

        Keep it short and never await anything but the database inside: writers take turns.
        """
        ...
