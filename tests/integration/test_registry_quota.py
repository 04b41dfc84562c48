"""What an app may have stored: exact under concurrent completes, with retention making room, and pins in its way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from aether.registry.sweeper import ArtifactSweeper, Keep
from aether.stores.database.tables import artifacts, uploads
from support.served import Served, digest_of, random_bytes, served

pytestmark = pytest.mark.usefixtures("database_url")

AT_ONCE = 20


@asynccontextmanager
async def quotas(folder: Path, **environ: str) -> AsyncIterator[Served]:
    async with served(folder, **environ) as api:
        await api.add_app("shop")
        await api.add_app("other")
        yield api


async def begun(api: Served, count: int, size: int = 2000, app: str = "shop") -> list[tuple[bytes, str]]:
    """Uploads whose bytes are there, and that are not completed yet."""
    found: list[tuple[bytes, str]] = []
    for _ in range(count):
        data = random_bytes(size)
        signed = await api.presign(app, data)
        assert await api.put(signed, data) == 200
        found.append((data, signed["upload_id"]))
    return found


async def stored(api: Served) -> int:
    async with api.database.read() as tx:
        query = sa.select(sa.func.count()).select_from(artifacts).where(artifacts.c.status == "stored")
        return int(await tx.scalar(query) or 0)


async def race(api: Served, ready: list[tuple[bytes, str]], app: str = "shop") -> list[tuple[int, Any]]:
    return list(await asyncio.gather(*(api.complete(app, data, upload_id) for data, upload_id in ready)))


async def test_twenty_completes_at_once_keep_as_many_as_the_app_may_have(tmp_path: Path) -> None:
    async with quotas(tmp_path, AETHER_MAX_ARTIFACTS_PER_APP="5", AETHER_RETAIN_LATEST_PER_APP="0") as api:
        ready = await begun(api, AT_ONCE)
        other = await begun(api, 3, app="other")
        answers, elsewhere = await asyncio.gather(race(api, ready), race(api, other, "other"))
        assert sorted(status for status, _ in answers) == [200] * 5 + [403] * 15
        assert {done["code"] for status, done in answers if status == 403} == {"quota_exceeded"}
        assert [status for status, _ in elsewhere] == [200] * 3
        assert await stored(api) == 8
        assert len([name for name in api.files() if name.startswith("artifacts/shop/")]) == 5
        assert len(api.files()) == 8, "what was refused is deleted"
        assert api.sample("artifact_quota_exceeded_total") == 15
        assert api.sample("artifacts_total") == 8
        data = random_bytes(10)
        body = {"app": "shop", "digest": digest_of(data), "size_bytes": 10}
        status, error = await api.call("POST", "/artifacts/presign", json=body)
        assert (status, error["code"]) == (403, "quota_exceeded"), "nothing is uploaded in vain"
        assert error["details"] == {"artifacts": 5, "total_bytes": 10_000}
        kept = next(data for (data, _), (status, _) in zip(ready, answers, strict=True) if status == 200)
        assert (await api.presign("shop", kept))["duplicate"] is True, "what is stored already needs no room"


async def test_twenty_completes_at_once_keep_as_many_bytes_as_the_app_may_have(tmp_path: Path) -> None:
    async with quotas(tmp_path, AETHER_MAX_TOTAL_BYTES_PER_APP="14500", AETHER_RETAIN_LATEST_PER_APP="0") as api:
        ready = await begun(api, AT_ONCE)
        answers = await race(api, ready)
        assert sorted(status for status, _ in answers) == [200] * 7 + [403] * 13
        assert len(api.files()) == 7
        small = await begun(api, 2, size=500)
        assert sorted(status for status, _ in await race(api, small)) == [200, 403]


async def test_a_refused_upload_has_failed_for_good(tmp_path: Path) -> None:
    async with quotas(tmp_path, AETHER_MAX_ARTIFACTS_PER_APP="1", AETHER_RETAIN_LATEST_PER_APP="0") as api:
        ready = await begun(api, 2)
        answers = await race(api, ready)
        (refused,) = [one for one, (status, _) in zip(ready, answers, strict=True) if status == 403]
        status, error = await api.complete("shop", *refused)
        assert (status, error["code"]) == (409, "conflict")
        assert await api.registry.recover() == 0
        assert await stored(api) == 1
        async with api.database.read() as tx:
            assert set((await tx.execute(sa.select(uploads.c.status))).scalars()) == {"completed", "failed"}


async def test_retention_makes_room_but_for_what_is_pinned_or_young(tmp_path: Path) -> None:
    settings = {
        "AETHER_MAX_ARTIFACTS_PER_APP": "3",
        "AETHER_RETAIN_LATEST_PER_APP": "1",
        "AETHER_RETENTION_GRACE_SECS": "0",
    }
    async with quotas(tmp_path, **settings) as api:
        ready = await begun(api, 3)
        for data, upload_id in ready:
            assert (await api.complete("shop", data, upload_id))[0] == 200
        oldest = digest_of(ready[0][0])
        assert (await api.call("PUT", f"/artifacts/{oldest}/pin"))[1]["pinned"] is True
        (more,) = await begun(api, 1)
        assert (await api.complete("shop", *more))[0] == 200
        left = [item["digest"] for item in (await api.call("GET", "/artifacts"))[1]["items"]]
        assert left == [digest_of(more[0]), digest_of(ready[2][0]), oldest]
        events = (await api.call("GET", f"/artifacts/{digest_of(ready[1][0])}/events"))[1]["items"]
        assert (events[0]["event"], events[0]["actor"]) == ("tombstoned", "aether")
    async with quotas_reopened(tmp_path, **{**settings, "AETHER_RETENTION_GRACE_SECS": "3600"}) as api:
        status, error = await api.call(
            "POST", "/artifacts/presign", json={"app": "shop", "digest": "e" * 64, "size_bytes": 1}
        )
        assert (status, error["code"]) == (403, "quota_exceeded"), "what is young may be about to be deployed"


@asynccontextmanager
async def quotas_reopened(folder: Path, **environ: str) -> AsyncIterator[Served]:
    async with served(folder, **environ) as api:
        yield api


async def test_a_pinned_artifact_outlives_retention_until_it_is_unpinned(tmp_path: Path) -> None:
    async with quotas(tmp_path) as api:
        done = [await api.upload("shop", random_bytes(100 + n)) for n in range(4)]
        await api.call("PUT", f"/artifacts/{done[0]['digest']}/pin")
        later = lambda: time.time() + 10  # noqa: E731 - a clock
        sweeper = ArtifactSweeper(api.database, api.registry, Keep(2, 1.0), later)
        for _ in range(2):
            await sweeper.sweep(dry_run=False)
        left = {item["digest"] for item in (await api.call("GET", "/artifacts"))[1]["items"]}
        assert left == {done[n]["digest"] for n in (0, 2, 3)}
        await api.call("DELETE", f"/artifacts/{done[0]['digest']}/pin")
        assert (await sweeper.sweep(dry_run=True)).deleted >= 1
        await sweeper.sweep(dry_run=False)
        left = {item["digest"] for item in (await api.call("GET", "/artifacts"))[1]["items"]}
        assert left == {done[n]["digest"] for n in (2, 3)}
