"""How much work a database does for what is asked of it, counted and not timed: the same on a machine that is busy.

On SQLite the steps of its virtual machine; on PostgreSQL the rows that the plan touched and the pages that it read.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable
from typing import Any, TypeVar

import sqlalchemy as sa

from aether.stores.database.engine import Database

_T = TypeVar("_T")


async def effort(database: Database, question: Awaitable[_T]) -> tuple[_T, dict[str, int]]:
    """The answer, and the work of every query on this database that it took, by what is counted."""
    answer, seen = await _queries(database, question)
    assert seen
    counted: dict[str, int] = {}
    for sql, parameters in seen:
        one = await (_on_sqlite if database.kind.name == "sqlite" else _on_postgresql)(database, sql, parameters)
        counted = {what: counted.get(what, 0) + number for what, number in one.items()}
    return answer, counted


async def _queries(database: Database, question: Awaitable[_T]) -> tuple[_T, list[tuple[str, Any]]]:
    seen: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, sql: str, parameters: Any, *_: Any) -> None:
        if sql.lstrip().startswith(("SELECT", "WITH")):
            seen.append((sql, parameters))

    engine = database.engine.sync_engine
    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        return await question, seen
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)


async def _on_sqlite(database: Database, sql: str, parameters: Any) -> dict[str, int]:
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1

    async with database.read() as tx:
        raw: Any = (await tx.get_raw_connection()).driver_connection
        await raw.set_progress_handler(step, 1)
        try:
            await tx.exec_driver_sql(sql, parameters)
        finally:
            await raw.set_progress_handler(None, 0)
    return {"steps": steps}


async def _on_postgresql(database: Database, sql: str, parameters: Any) -> dict[str, int]:
    async with database.read() as tx:
        found = await tx.exec_driver_sql(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", parameters)
        told = found.scalar_one()
    plan = (json.loads(told) if isinstance(told, str) else told)[0]["Plan"]
    return {"rows": _rows(plan), "pages": plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]}


def _rows(plan: dict[str, Any]) -> int:
    each = plan["Actual Rows"] + sum(value for name, value in plan.items() if name.startswith("Rows Removed by"))
    return each * plan["Actual Loops"] + sum(_rows(child) for child in plan.get("Plans", ()))
