"""The list of artifacts: filters, pages, what happened to one, and what a page of very many costs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from aether.model.names import new_id
from aether.model.times import to_iso
from aether.registry.records import Filter
from aether.stores.database.engine import Database
from aether.stores.database.tables import applications, artifacts
from support.effort import effort
from support.served import Served, add_app, digest_of, random_bytes, served
from support.supply import Signer

pytestmark = pytest.mark.usefixtures("database_url")

MANY = 5000
OLDEST = 1_000_000
PAGE = 50


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as one:
        await one.add_app("shop")
        yield one


async def digests(api: Served, query: str) -> list[str]:
    status, page = await api.call("GET", f"/artifacts?{query}")
    assert status == 200, page
    return [item["digest"] for item in page["items"]]


async def test_filters(api: Served) -> None:
    await api.add_app("other")
    made: list[dict[str, Any]] = []
    for n, (app, runtime) in enumerate([("shop", "node20"), ("shop", "node22"), ("other", "node22")]):
        data = random_bytes(100 + n)
        signed = await api.presign(app, data, runtime=runtime)
        await api.put(signed, data)
        status, _ = await api.complete(app, data, signed["upload_id"])
        assert status == 200
        made.append((await api.call("GET", f"/artifacts/{digest_of(data)}/meta"))[1])
    first, second, third = (one["digest"] for one in made)
    assert await digests(api, "") == [third, second, first]
    assert await digests(api, "app=shop") == [second, first]
    assert await digests(api, "runtime=node22") == [third, second]
    assert await digests(api, "runtime=node22&app=shop") == [second]
    assert await digests(api, "runtime=node99") == []
    assert await digests(api, f"digest={second[:10]}") == [second]
    assert await digests(api, f"digest={second}") == [second]
    assert await digests(api, f"since={made[1]['created_at']}") == [third, second]
    assert await digests(api, f"before={made[1]['created_at']}") == [first]
    assert await digests(api, f"since={made[0]['created_at']}&before={made[2]['created_at']}") == [second, first]
    assert await digests(api, "verified=false") == [third, second, first]
    assert await digests(api, "verified=true") == []


@pytest.mark.parametrize(
    "query", ["digest=XYZ", "digest=" + "a" * 65, "since=yesterday", "before=", "verified=maybe", "cursor=W10"]
)
async def test_a_filter_that_cannot_be_is_refused(api: Served, query: str) -> None:
    status, error = await api.call("GET", f"/artifacts?{query}")
    assert (status, error["code"]) == (400, "bad_request")


async def test_everything_that_happened_is_told(api: Served) -> None:
    data = random_bytes(300)
    digest = digest_of(data)
    signer = Signer()
    admin = {"Authorization": "Bearer tok-admin"}
    await api.call("POST", "/apps/shop/public-keys", json={"public_key_hex": signer.public_key}, headers=admin)
    wrong = await api.presign("shop", data)
    await api.put(wrong, b"x" * len(data))
    assert (await api.complete("shop", data, wrong["upload_id"]))[0] == 400
    signed, more = await api.presign("shop", data), await api.presign("shop", data)
    await api.put(signed, data)
    await api.complete("shop", data, signed["upload_id"], signature=signer.sign(digest))
    await api.put(more, data)
    await api.complete("shop", data, more["upload_id"])
    for method in ("PUT", "PUT", "DELETE"):
        status, shown = await api.call(method, f"/artifacts/{digest}/pin")
        assert (status, shown["pinned"]) == (200, method == "PUT")
    rows: list[dict[str, Any]] = []
    cursor = ""
    while True:
        status, page = await api.call("GET", f"/artifacts/{digest}/events?limit=4{cursor}")
        assert status == 200
        rows += page["items"]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
    told = [(row["event"], row["actor"]) for row in reversed(rows)]
    assert told == [
        ("presigned", "dan"), ("rejected", "dan"), ("presigned", "dan"), ("presigned", "dan"),
        ("completed", "dan"), ("signed", "dan"), ("duplicate", "dan"), ("pinned", "dan"), ("unpinned", "dan"),
    ]  # fmt: skip
    assert api.sample("artifact_events_total", event="presigned") == 3
    assert api.sample("artifact_events_total", event="completed") == 1


async def _fill(database: Database) -> str:
    """Very many artifacts of one app, and some of another between them."""
    apps = [await add_app(database, name) for name in ("crowd", "few", "none")]
    rows = [
        {
            "id": new_id(), "app_id": apps[1] if n % 500 == 5 else apps[0], "digest": f"{n:08x}" * 8,
            "size_bytes": 1, "status": "stored", "storage_key": "k", "created_at": OLDEST + n // 3,
            "runtime": f"node2{n % 4}",
        }
        for n in range(MANY)
    ]  # fmt: skip
    async with database.write() as tx:
        await tx.execute(sa.insert(artifacts), rows)
    async with database.write() as tx:
        await tx.execute(sa.text("ANALYZE"))
    return apps[0]


async def test_the_last_page_of_very_many_is_no_more_work_than_the_first(api: Served) -> None:
    crowd = await _fill(api.database)
    places = {"first": None, "middle": (OLDEST + MANY // 6, "0"), "last": (OLDEST + 20, "ffffffff")}
    for app in ("crowd", None):
        for wanted in (Filter(), Filter(verified=False)):
            work: dict[str, dict[str, int]] = {}
            for place, after in places.items():
                found, work[place] = await effort(api.database, api.registry.list(app, wanted, PAGE, after))
                assert len(found) == PAGE
            for what, first in work["first"].items():
                assert 0 < first < MANY, (app, wanted, work)  # of steps one row takes many
                assert all(one[what] <= 1.5 * first for one in work.values()), (app, wanted, work)
    # every page once, in order, each artifact once
    seen: list[tuple[int, str]] = []
    after: tuple[int, str] | None = None
    while rows := await api.registry.list("crowd", Filter(), 700, after):
        seen += [(row.created_at, row.id) for row in rows]
        after = seen[-1]
    assert len(seen) == len(set(seen)) == MANY - 10
    assert [moment for moment, _ in seen] == sorted((moment for moment, _ in seen), reverse=True)
    few = await api.registry.list("few", Filter(), PAGE, None)
    assert len(few) == 10
    assert crowd not in {row.app_id for row in few}
    status, page = await api.call("GET", f"/artifacts?app=few&since={to_iso(OLDEST)}&limit=5")
    assert (status, len(page["items"])) == (200, 5)
    assert await api.registry.list("none", Filter(), PAGE, None) == []


async def test_a_teams_page_costs_nothing_for_the_artifacts_of_others(api: Served) -> None:
    await _fill(api.database)
    own = [await add_app(api.database, name, owner="team") for name in ("mine", "ours", "idle")]
    rows = [
        {
            "id": new_id(), "app_id": own[n % 2], "digest": f"{MANY + n:08x}" * 8, "size_bytes": 1,
            "status": "stored", "storage_key": "k", "created_at": OLDEST - 7 + 3 * n, "runtime": "node22",
        }
        for n in range(40)
    ]  # fmt: skip
    async with api.database.write() as tx:
        await tx.execute(sa.insert(artifacts), rows)
        await tx.execute(sa.text("ANALYZE"))
    newest = [row["id"] for row in reversed(rows)]
    team = applications.c.owner == "team"
    for wanted, limit, expected in (
        (Filter(only=team), PAGE, newest),
        (Filter(only=team), 7, newest[:7]),
        (Filter(only=team, runtime="node22", since=rows[3]["created_at"]), PAGE, newest[:37]),
        (Filter(only=team, runtime="node24"), PAGE, []),
    ):
        found, work = await effort(api.database, api.registry.list(None, wanted, limit, None))
        assert [row.id for row in found] == expected
        assert all(count < MANY for count in work.values()), work
    after = (rows[20]["created_at"], rows[20]["id"])
    assert [row.id for row in await api.registry.list(None, Filter(only=team), 5, after)] == newest[20:25]
