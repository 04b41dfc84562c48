"""Many apps on one machine: 20 deployed at once, and what 100 idle ones cost.

Deploys at once: from the first upload until every app has answered, against the floor measured in the same run, which
is to unpack the same archives and start the same programs bare, all at once, until each has answered.

Idle apps: memory (PSS, so that shared pages count once) and CPU of the server, of what supervises each app (keeper,
dialer, network, sandbox) and of the apps themselves, against the same program started bare. Prints medians and
ratios; writes bench/out/apps.json.

    python bench/apps.py [--at-once 20] [--pairs 3] [--idle 100] [--secs 30]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "bench"))

from deploy import cpu_secs, memory_kib, process_tree  # noqa: E402  (the path is set above)

from support.product import free_port  # noqa: E402
from support.server import Server, hello, pack, server, wait_for  # noqa: E402


@contextlib.contextmanager
def bare(folder: Path, count: int) -> Iterator[list[int]]:
    """`count` bare copies of the app, unpacked and answering; yields their pids."""
    started: list[subprocess.Popen[bytes]] = []

    def one(n: int) -> None:
        root = folder / str(n)
        root.mkdir(parents=True)
        (root / "app.tar.gz").write_bytes(pack(hello(f"bare-{n}")))
        subprocess.run(["tar", "xzf", "app.tar.gz"], cwd=root, check=True)
        port = free_port()
        app = subprocess.Popen(
            ["node", "server.js"], cwd=root, env={**os.environ, "PORT": str(port)}, stdout=subprocess.DEVNULL
        )
        started.append(app)
        wait_for(lambda: answers(port), 60)

    try:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(one, range(count)))
        yield [app.pid for app in started]
    finally:
        for app in started:
            app.kill()
            app.wait()
        shutil.rmtree(folder, ignore_errors=True)


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
        return True
    return False


def deploy_all(up: Server, names: list[str]) -> float:
    """Seconds until all have answered."""

    def one(name: str) -> None:
        made = up.deploy(name, hello(name))
        assert made["status"] == "active", made
        assert up.said(name) == name

    began = time.perf_counter()
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(one, names))
    return time.perf_counter() - began


def at_once(folder: Path, count: int, pairs: int) -> dict[str, object]:
    ours: list[float] = []
    floors: list[float] = []

    def mine(n: int) -> None:
        with server(folder / f"up-{n}", AETHER_STOP_GRACE_SECS="1") as up:
            ours.append(deploy_all(up, [f"app-{i}" for i in range(count)]))

    def floor(n: int) -> None:
        began = time.perf_counter()
        with bare(folder / f"bare-{n}", count):
            floors.append(time.perf_counter() - began)

    for n in range(pairs):
        for step in (mine, floor) if n % 2 == 0 else (floor, mine):
            step(n)
    ratios = [a / b for a, b in zip(ours, floors, strict=True)]
    return {
        "apps": count,
        "secs": statistics.median(ours),
        "floor_secs": statistics.median(floors),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def parts(up: Server) -> dict[str, set[int]]:
    """Pids of the server, of what supervises apps, and of the apps."""
    assert up.process is not None
    keepers = up.pids()
    below = {pid for keeper in keepers for pid in process_tree(keeper)}
    apps = {pid for pid in below if _program(pid) == "node"}
    return {"server": {up.process.pid}, "supervision": (below | keepers) - apps - {up.process.pid}, "apps": apps}


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode().rpartition("/")[2]
    except OSError:
        return ""


def cost(pids: set[int], secs: float, before: dict[int, float]) -> tuple[float, float]:
    """(PSS in MiB, percent of one CPU)."""
    memory, cpu = 0, 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            memory += memory_kib(pid, "Pss")
            cpu += cpu_secs(pid) - before.get(pid, 0.0)
    return memory / 1024, cpu / secs * 100


def idle(folder: Path, count: int, secs: float) -> dict[str, object]:
    with server(folder / "idle", AETHER_STOP_GRACE_SECS="1") as up:
        assert up.process is not None
        empty = memory_kib(up.process.pid, "Pss") / 1024
        names = [f"app-{i}" for i in range(count)]
        for begin in range(0, count, 20):
            deploy_all(up, names[begin : begin + 20])
        time.sleep(5)
        found = parts(up)
        before = {pid: cpu_secs(pid) for pids in found.values() for pid in pids}
        time.sleep(secs)
        spent = {name: cost(pids, secs, before) for name, pids in found.items()}
        with bare(folder / "bare", count) as pids:
            time.sleep(5)
            began = {pid: cpu_secs(pid) for pid in pids}
            time.sleep(secs)
            alone = cost(set(pids), secs, began)
    rows = {
        name: {"pss_mib": memory, "pss_mib_per_app": memory / count, "cpu_percent_per_app": cpu / count}
        for name, (memory, cpu) in {**spent, "bare": alone}.items()
    }
    whole = sum(memory for memory, _ in spent.values())
    return {
        "apps": count,
        "server_empty_pss_mib": empty,
        "processes": {name: len(pids) for name, pids in found.items()},
        "parts": rows,
        "cpu_percent_all": sum(cpu for _, cpu in spent.values()),
        "memory_ratio": (whole - empty) / alone[0],
        "cpu_ratio": sum(cpu for _, cpu in spent.values()) / alone[1] if alone[1] else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--idle", type=int, default=100)
    parser.add_argument("--secs", type=float, default=30.0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="aether-bench-"))
    try:
        result: dict[str, object] = {}
        if arguments.at_once:
            result["at_once"] = at_once(folder, arguments.at_once, arguments.pairs)
        if arguments.idle:
            result["idle"] = idle(folder, arguments.idle, arguments.secs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result, indent=2))
    out = ROOT / "bench" / "out"
    out.mkdir(parents=True, exist_ok=True)
    (out / "apps.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
