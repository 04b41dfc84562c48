"""The registry's speed and memory: uploads, completion under load, long lists.

    python bench/registry.py [upload] [complete] [memory] [pages] [--pairs N] [--mb N] [--out FILE]

upload    a file through presigned multipart by our client, against boto3's own transfer of the same file to the same
          server; both with their own defaults, interleaved (A B B A). `ratio` ends with the last part (as boto3's
          transfer ends with the store's completion), `ratio_stored` with the registry's word that every byte is right
complete  64 completions in flight: their p99 against three times the median of one alone plus the time that hashing
          all 64 takes (on as many threads as there are CPUs)
memory    largest resident set of the server during 64 uploads at once, less what it was before
pages     first and last page of a list of 100,000 artifacts, on every database that is there

Writes bench/out/registry.json; a bar that is missed is said, not an error.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import pytest  # noqa: E402  (the path is set above)
import sqlalchemy as sa  # noqa: E402
from boto3.s3.transfer import TransferConfig  # noqa: E402

from aether.api.paging import encode_cursor  # noqa: E402
from aether.client.api import Api  # noqa: E402
from aether.client.transfer import Announced, Watch, transfer  # noqa: E402
from aether.client.transport import Transport  # noqa: E402
from aether.model.errors import ServiceUnavailable  # noqa: E402
from aether.model.names import new_id  # noqa: E402
from aether.stores.database.engine import Database  # noqa: E402
from aether.stores.database.tables import applications, artifacts  # noqa: E402
from support import databases, s3_servers  # noqa: E402
from support.server import Server, server  # noqa: E402

IN_FLIGHT = 64
ARTIFACTS = 100_000
OLDEST_US = 1_700_000_000_000_000
BARS = {"upload": 1.15, "memory_mb": 50.0, "pages": 1.5}


def spread(values: list[float], digits: int = 3) -> dict[str, Any]:
    return {
        "median": round(statistics.median(values), digits),
        "range": [round(min(values), digits), round(max(values), digits)],
    }


def pairs(count: int, a: Callable[[], float], b: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Run both so many times, A B B A ..."""
    first: list[float] = []
    second: list[float] = []
    for number in range(count):
        for mine in (True, False) if number % 2 == 0 else (False, True):
            first.append(a()) if mine else second.append(b())
    return first, second


class Timed(Api):
    """Remembers when completing began: everything has arrived then."""

    arrived = 0.0

    def complete(self, *args: Any, **kwargs: Any) -> Any:
        self.arrived = time.perf_counter()
        return super().complete(*args, **kwargs)


def api_of(up: Server, kind: type[Api] = Api) -> Any:
    token = (up.data / "admin-token").read_text().strip()
    return kind(Transport(f"http://127.0.0.1:{up.port}", token))


@contextmanager
def registry(kind: str, folder: Path, **environment: str) -> Iterator[tuple[Server, Any, str]]:
    """A server on this store; (it, boto3's client or None, bucket)."""
    if kind == "filesystem":
        with server(folder, **environment) as up:
            up.api("POST", "/apps", {"name": "bench"})
            yield up, None, ""
        return
    s3 = s3_servers.running(kind)
    bucket = s3.new_bucket()
    with server(folder, **s3.settings(bucket), **environment) as up:
        up.api("POST", "/apps", {"name": "bench"})
        yield up, s3.boto(), bucket


def available(kinds: list[str]) -> list[str]:
    found: list[str] = []
    for kind in kinds:
        try:
            s3_servers.running(kind)
            found.append(kind)
        except pytest.skip.Exception as missing:
            print(f"left out: {missing}", file=sys.stderr)
    return found


def emptied(client: Any, bucket: str) -> None:
    """What was stored is not measured again: the stores of benches live in memory."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for item in page.get("Contents", []):
            client.delete_object(Bucket=bucket, Key=item["Key"])


# --- upload


def bench_upload(arguments: argparse.Namespace) -> dict[str, Any]:
    return {kind: upload_to(kind, arguments) for kind in available(s3_servers.kinds())}


def upload_to(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    stored: list[float] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aether-bench-")))
        path = folder / "artifact.tar.gz"
        path.write_bytes(os.urandom(arguments.mb * 1_000_000))
        up, client, bucket = stack.enter_context(registry(kind, folder / "server"))

        def ours() -> float:
            with path.open("r+b") as file:  # another artifact each time
                file.write(os.urandom(16))
            with path.open("rb") as file:
                artifact = Announced("bench", hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)
            with api_of(up, Timed) as api:
                began = time.perf_counter()
                transfer(api, artifact, str(path), Watch())
                stored.append(time.perf_counter() - began)
                took = api.arrived - began
            emptied(client, bucket)
            return took

        def theirs() -> float:
            began = time.perf_counter()
            client.upload_file(str(path), bucket, "boto3.tar.gz", Config=TransferConfig())
            took = time.perf_counter() - began
            emptied(client, bucket)
            return took

        ours()
        theirs()
        stored.clear()
        mine, boto = pairs(arguments.pairs, ours, theirs)
    ratios = [a / b for a, b in zip(mine, boto, strict=True)]
    result = {
        "mb": arguments.mb,
        "ours_s": spread(mine),
        "boto3_s": spread(boto),
        "ratio": spread(ratios),
        "ratio_stored": spread([a / b for a, b in zip(stored, boto, strict=True)]),
        "holds": statistics.median(ratios) <= BARS["upload"],
    }
    print("upload", kind, json.dumps(result), flush=True)
    return result


# --- complete


def hashing_secs(datas: list[bytes]) -> float:
    """Of everything, by as many threads as there are CPUs."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        began = time.perf_counter()
        list(pool.map(lambda data: hashlib.sha256(data).digest(), datas))
        return time.perf_counter() - began


def put(api: Api, data: bytes) -> dict[str, Any]:
    """Everything but completing; returns what completing is told."""
    digest = hashlib.sha256(data).hexdigest()
    signed = api.presign("bench", digest=digest, size_bytes=len(data))
    body = Sent(data)
    api.transport.put(str(signed["url"]), body, headers=signed["headers"])
    return {"digest": digest, "size_bytes": len(data), "upload_id": signed["upload_id"]}


class Sent:
    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._left = memoryview(data)

    def read(self, size: int = -1, /) -> bytes:
        block, self._left = bytes(self._left[:size]), self._left[size:]
        return block


def bench_complete(arguments: argparse.Namespace) -> dict[str, Any]:
    results = {"filesystem": complete_on("filesystem", arguments.rounds)}
    with postgresql() as url:
        if url is not None:
            results["filesystem, postgresql"] = complete_on("filesystem", arguments.rounds, DATABASE_URL=url)
    return results | {kind: complete_on(kind, arguments.rounds) for kind in available(s3_servers.kinds())}


def complete_on(kind: str, rounds: int, size: int = 2_000_000, **environment: str) -> dict[str, Any]:
    refused = 0

    def timed(api: Api, told: dict[str, Any]) -> float:
        """As a client does it: what is refused for the moment is asked again, and that time counts."""
        nonlocal refused
        began = time.perf_counter()
        while True:
            try:
                api.complete("bench", **told, idempotency_key=told["upload_id"])
                return time.perf_counter() - began
            except ServiceUnavailable:
                refused += 1
                time.sleep(0.25)

    alone: list[float] = []
    together: list[float] = []
    hashing: list[float] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aether-bench-")))
        up, _, _ = stack.enter_context(registry(kind, folder, **environment))
        pool = stack.enter_context(ThreadPoolExecutor(IN_FLIGHT))
        apis = [stack.enter_context(api_of(up)) for _ in range(IN_FLIGHT)]
        for api in apis:
            api.alive()
        for _ in range(rounds):
            alone += [timed(apis[0], put(apis[0], os.urandom(size))) for _ in range(8)]
            datas = [os.urandom(size) for _ in range(IN_FLIGHT)]
            told = list(pool.map(put, apis, datas))
            together += list(pool.map(timed, apis, told))
            hashing.append(hashing_secs(datas))
    p99 = sorted(together)[math.ceil(0.99 * len(together)) - 1]
    bound = 3 * statistics.median(alone) + statistics.median(hashing)
    result = {
        "artifact_mb": size / 1e6,
        "in_flight": IN_FLIGHT,
        "alone_ms": spread([secs * 1000 for secs in alone], 1),
        "median_ms": round(statistics.median(together) * 1000, 1),
        "p99_ms": round(p99 * 1000, 1),
        "hashing_all_ms": round(statistics.median(hashing) * 1000, 1),
        "refused": refused,
        "ratio_to_bound": round(p99 / bound, 2),
        "holds": p99 <= bound,
    }
    print("complete", kind, *environment, json.dumps(result), flush=True)
    return result


# --- memory


def bench_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    return {kind: memory_on(kind) for kind in ["filesystem", *available(s3_servers.kinds())]}


def memory_on(kind: str, size: int = 12_000_000) -> dict[str, Any]:
    parts = {"AETHER_MULTIPART_THRESHOLD_BYTES": str(6 << 20), "AETHER_MULTIPART_PART_SIZE_BYTES": str(5 << 20)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aether-bench-")))
        up, client, bucket = stack.enter_context(registry(kind, folder / "server", **parts))
        assert up.process is not None
        process = Path(f"/proc/{up.process.pid}")

        def send(number: int) -> None:
            path = folder / f"{number}.tar.gz"
            data = os.urandom(size)
            path.write_bytes(data)
            with api_of(up) as api:
                transfer(api, Announced("bench", hashlib.sha256(data).hexdigest(), size), str(path), Watch())
            path.unlink()

        for number in range(4):
            send(number)
        (process / "clear_refs").write_text("5")
        before = peak_bytes(process)
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            list(pool.map(send, range(IN_FLIGHT)))
        growth = (peak_bytes(process) - before) / 1e6
        if client is not None:
            emptied(client, bucket)
    result = {
        "uploads": IN_FLIGHT,
        "artifact_mb": size / 1e6,
        "before_mb": round(before / 1e6, 1),
        "growth_mb": round(growth, 1),
        "holds": growth < BARS["memory_mb"],
    }
    print("memory", kind, json.dumps(result), flush=True)
    return result


def peak_bytes(process: Path) -> int:
    line = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


# --- pages


async def fill(url: str) -> None:
    """Artifacts of one app, straight into the table: uploading them would measure uploads."""
    database = Database(url)
    await database.open()
    try:
        async with database.read() as tx:
            app_id = (await tx.execute(sa.select(applications.c.id))).scalar_one()
        for start in range(0, ARTIFACTS, 1000):
            rows = [
                {
                    "id": new_id(), "app_id": app_id, "digest": hashlib.sha256(b"%d" % n).hexdigest(),
                    "size_bytes": n + 1, "status": "stored", "storage_key": f"artifacts/bench/{n}",
                    "created_at": OLDEST_US + n,
                }
                for n in range(start, start + 1000)
            ]  # fmt: skip
            async with database.write() as tx:
                await tx.execute(sa.insert(artifacts), rows)
        async with database.write() as tx:
            await tx.execute(sa.text("ANALYZE"))
    finally:
        await database.close()


def bench_pages(arguments: argparse.Namespace) -> dict[str, Any]:
    results = {"sqlite": pages_of("sqlite", {})}
    with postgresql() as url:
        if url is not None:
            results["postgresql"] = pages_of("postgresql", {"DATABASE_URL": url})
    return results


@contextmanager
def postgresql() -> Iterator[str | None]:
    """An empty database on a server of the tests, None where there is no PostgreSQL."""
    try:
        found = databases.Databases(databases.find_server())
    except pytest.skip.Exception as missing:
        print(f"left out: {missing}", file=sys.stderr)
        yield None
        return
    try:
        yield found.empty()
    finally:
        found.close()


def pages_of(kind: str, environment: dict[str, str], limit: int = 100) -> dict[str, Any]:
    last = encode_cursor(OLDEST_US + limit, "0")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aether-bench-")))
        quiet = {"AETHER_RETAIN_LATEST_PER_APP": "0", "AETHER_DISABLE_BACKGROUND": "1"}
        up, _, _ = stack.enter_context(registry("filesystem", folder, **quiet, **environment))
        asyncio.run(fill(environment.get("DATABASE_URL", f"sqlite+aiosqlite:///{up.data}/aether.db")))
        api = stack.enter_context(api_of(up))

        def page(cursor: str | None) -> float:
            began = time.perf_counter()
            found = api.artifacts(limit=limit, cursor=cursor)
            took = time.perf_counter() - began
            assert len(found["items"]) == limit
            assert (found["next_cursor"] is None) == (cursor is not None)
            return took

        for _ in range(20):
            page(None)
            page(last)
        lasts, firsts = pairs(100, lambda: page(last), lambda: page(None))
    ratio = statistics.median(lasts) / statistics.median(firsts)
    spans = statistics.quantiles([a / b for a, b in zip(lasts, firsts, strict=True)], n=10)
    result = {
        "artifacts": ARTIFACTS,
        "first_ms": spread([secs * 1000 for secs in firsts], 2),
        "last_ms": spread([secs * 1000 for secs in lasts], 2),
        "ratio": round(ratio, 3),
        "p10_p90_of_pairs": [round(spans[0], 3), round(spans[-1], 3)],
        "holds": 1 / BARS["pages"] <= ratio <= BARS["pages"],
    }
    print("pages", kind, json.dumps(result), flush=True)
    return result


WHAT = {"upload": bench_upload, "complete": bench_complete, "memory": bench_memory, "pages": bench_pages}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="WHAT", help="upload, complete, memory, pages (all)")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "registry.json")
    arguments = parser.parse_args()
    if unknown := set(arguments.what) - set(WHAT):
        parser.error(f"not measured here: {', '.join(sorted(unknown))}")
    results: dict[str, Any] = {"bars": BARS}
    if arguments.out.exists():
        results |= json.loads(arguments.out.read_text())
    for name in arguments.what or WHAT:
        results[name] = WHAT[name](arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
