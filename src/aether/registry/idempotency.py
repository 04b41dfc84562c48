"""Keys by which a client says that two completions are one: taken before anything is done under them.

The first artifact that a key is used for is the only one, whether or not its completion came to an end. Forgetting
old keys is left to `aether.registry.collector`.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.model.errors import IdempotencyConflict
from aether.stores.database.tables import artifacts, idempotency_keys

MAX_LENGTH = 200
_USED = sa.select(idempotency_keys.c.digest).where(
    idempotency_keys.c.app_id == sa.bindparam("app"), idempotency_keys.c.key == sa.bindparam("by")
)
_INSERT = sa.insert(idempotency_keys)


async def take(tx: AsyncConnection, app_id: str, key: str, digest: str, now: int) -> None:
    """Raises IdempotencyConflict when it was used for another artifact, IntegrityError when somebody takes it at this
    moment."""
    used = await tx.scalar(_USED, {"app": app_id, "by": key})
    if used is None:
        await tx.execute(_INSERT, {"app_id": app_id, "key": key, "digest": digest, "created_at": now})
    elif used != digest:
        raise IdempotencyConflict("this idempotency key was used for another artifact")


async def forget(tx: AsyncConnection, before: int) -> None:
    """Drop the keys taken before `before` but for those that a stored artifact carries."""
    carried = sa.exists().where(
        artifacts.c.app_id == idempotency_keys.c.app_id, artifacts.c.idempotency_key == idempotency_keys.c.key
    )
    await tx.execute(sa.delete(idempotency_keys).where(idempotency_keys.c.created_at < before, ~carried))
