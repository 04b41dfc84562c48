"""Taking away what nobody needs any more, now; for admins."""

from __future__ import annotations

import msgspec
from litestar import post
from litestar.params import JSONBody

from aether.api.services import Deps
from aether.model.errors import ServiceUnavailable


class CollectRequest(msgspec.Struct):
    """With `dry_run` nothing is taken away."""

    dry_run: bool = False


class ChoreResult(msgspec.Struct):
    """What one chore took away, or would; `error` says why it could not."""

    chore: str
    deleted: int
    bytes: int
    error: str | None


class Collected(msgspec.Struct):
    dry_run: bool
    items: list[ChoreResult]


@post("/gc", tags=["retention"], status_code=200)
async def collect(services: Deps, data: JSONBody[CollectRequest]) -> Collected:
    """Run every chore of retention once. 409 while another server does."""
    if services.retention is None:
        raise ServiceUnavailable("this server takes nothing away")
    results = await services.retention.sweep(dry_run=data.dry_run)
    return Collected(
        data.dry_run,
        [ChoreResult(it.chore, it.swept.deleted, it.swept.bytes, it.error) for it in results],
    )


HANDLERS = [collect]
