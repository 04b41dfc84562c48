"""Every metric of the contract, moved by what it counts and read where operators read it."""

from __future__ import annotations

import io
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aether.registry.collector import PendingCollector
from support.served import Served, digest_of, random_bytes, served

pytestmark = pytest.mark.usefixtures("database_url")

PART = 5 * 1024**2
COUNTERS = (
    "artifact_presign_requests_total", "artifact_presign_failures_total", "artifact_complete_failures_total",
    "artifact_upload_bytes_total", "artifact_digest_mismatch_total", "artifact_size_exceeded_total",
    "artifact_pending_gc_runs_total", "artifact_pending_gc_deleted_total", "artifact_events_total",
    "artifact_legacy_upload_requests_total", "artifact_multipart_inits_total",
    "artifact_multipart_part_presigns_total", "artifact_multipart_completes_total",
    "artifact_multipart_complete_failures_total", "artifact_quota_exceeded_total",
)  # fmt: skip
GAUGES = ("artifact_uploads_in_progress", "artifacts_total")
HISTOGRAMS = (
    "artifact_upload_duration_seconds", "artifact_put_duration_seconds", "artifact_complete_duration_seconds",
    "artifact_multipart_part_size_bytes", "artifact_multipart_parts_per_artifact",
)  # fmt: skip


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    settings = {
        "AETHER_MAX_ARTIFACTS_PER_APP": "4",
        "AETHER_MAX_ARTIFACT_SIZE_BYTES": "8000000",
        "AETHER_MULTIPART_PART_SIZE_BYTES": str(PART),
        "AETHER_RETAIN_LATEST_PER_APP": "0",
    }
    async with served(tmp_path, **settings) as one:
        await one.add_app("shop")
        yield one


async def read(api: Served) -> dict[str, float]:
    """Samples by name, summed over what labels there are."""
    async with api.client.get(f"{api.base}/metrics") as answer:
        assert answer.status == 200
        text = await answer.text()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


class Moved:
    """What moved between two readings."""

    def __init__(self, api: Served) -> None:
        self._api = api

    async def __aenter__(self) -> Moved:
        self._before = await read(self._api)
        return self

    async def __aexit__(self, *_: object) -> None:
        after = await read(self._api)
        self.by = {name: after[name] - self._before.get(name, 0.0) for name in after}


async def multipart(api: Served, data: bytes) -> None:
    body = {"app": "shop", "digest": digest_of(data), "size_bytes": len(data)}
    begun = (await api.call("POST", "/artifacts/multipart/init", json=body))[1]
    ask = {"app": "shop", "upload_id": begun["upload_id"], "part_numbers": [1, 2]}
    parts: list[dict[str, Any]] = []
    for one in (await api.call("POST", "/artifacts/multipart/presign-part", json=ask))[1]["parts"]:
        start = (one["part_number"] - 1) * PART
        _, _, etag = await api.outside(one, data[start : start + one["size_bytes"]])
        parts.append({"part_number": one["part_number"], "etag": etag})
    end = {**body, "upload_id": begun["upload_id"]}
    assert (await api.call("POST", "/artifacts/multipart/complete", json={**end, "parts": parts[:1]}))[0] == 400
    assert (await api.call("POST", "/artifacts/multipart/complete", json={**end, "parts": parts}))[0] == 200


async def test_every_metric_is_moved_by_what_it_counts(api: Served) -> None:
    data = random_bytes(1000)
    async with Moved(api) as good:
        signed = await api.presign("shop", data)
        await api.put(signed, data)
        assert (await api.complete("shop", data, signed["upload_id"], put_duration_ms=25))[0] == 200
    assert good.by["artifact_presign_requests_total"] == 1
    assert good.by["artifact_upload_bytes_total"] == len(data)
    assert good.by["artifact_events_total"] == 2
    assert good.by["artifacts_total"] == 1
    assert good.by["artifact_put_duration_seconds_sum"] == pytest.approx(0.025)
    for name in ("upload", "put", "complete"):
        assert good.by[f"artifact_{name}_duration_seconds_count"] == 1

    wrong = random_bytes(900)
    async with Moved(api) as bad:
        signed = await api.presign("shop", wrong)
        await api.put(signed, b"x" * len(wrong))
        assert (await api.complete("shop", wrong, signed["upload_id"]))[0] == 400
        huge = {"app": "shop", "digest": digest_of(b""), "size_bytes": 8_000_001}
        assert (await api.call("POST", "/artifacts/presign", json=huge))[0] == 413
    assert bad.by["artifact_digest_mismatch_total"] == 1
    assert bad.by["artifact_complete_failures_total"] == 1
    assert bad.by["artifact_presign_failures_total"] == 1
    assert bad.by["artifact_size_exceeded_total"] == 1
    assert bad.by["artifacts_total"] == 0

    large = random_bytes(PART + 500)
    async with Moved(api) as parts:
        await multipart(api, large)
    assert parts.by["artifact_multipart_inits_total"] == 1
    assert parts.by["artifact_multipart_part_presigns_total"] == 2
    assert parts.by["artifact_multipart_completes_total"] == 1
    assert parts.by["artifact_multipart_complete_failures_total"] == 1
    assert parts.by["artifact_multipart_part_size_bytes_sum"] == len(large)
    assert parts.by["artifact_multipart_parts_per_artifact_sum"] == 2

    async with Moved(api) as legacy:
        for n in range(2):
            body = random_bytes(700 + n)
            headers = {"X-Aether-Artifact-Digest": digest_of(body)}
            status, _ = await api.call("POST", "/artifacts?app=shop", data=io.BytesIO(body), headers=headers)
            assert status == 200
    assert legacy.by["artifact_legacy_upload_requests_total"] == 2
    assert legacy.by["artifacts_total"] == 2

    async with Moved(api) as full:
        one_more = {"app": "shop", "digest": "e" * 64, "size_bytes": 1}
        assert (await api.call("POST", "/artifacts/presign", json=one_more))[0] == 403
    assert full.by["artifact_quota_exceeded_total"] == 1

    await api.add_app("other")
    left = await api.presign("other", data)
    await api.put(left, data)
    async with Moved(api) as collected:
        late = lambda: time.time() + 90_000  # noqa: E731 - a clock
        await PendingCollector(api.database, api.objects, api.settings, api.metrics, late).collect()
    assert collected.by["artifact_pending_gc_runs_total"] == 1
    assert collected.by["artifact_pending_gc_deleted_total"] == 1

    signed = await api.presign("other", data)
    with socket.create_connection(("127.0.0.1", api.port)) as raw:
        raw.sendall(f"PUT {signed['url']} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode())
        while (await read(api))["artifact_uploads_in_progress"] != 1:
            pass
    while (await read(api))["artifact_uploads_in_progress"] != 0:
        pass

    seen = await read(api)
    for name in (*COUNTERS, GAUGES[1], *(f"{name}_count" for name in HISTOGRAMS)):
        assert seen[name] > 0, name


async def test_no_metric_tells_of_an_app_or_a_digest(api: Served) -> None:
    data = random_bytes(100)
    await api.upload("shop", data)
    async with api.client.get(f"{api.base}/metrics") as answer:
        text = await answer.text()
    lines = [line for line in text.splitlines() if line.startswith("artifact")]
    assert lines
    assert not [line for line in lines if "shop" in line or digest_of(data)[:12] in line]
