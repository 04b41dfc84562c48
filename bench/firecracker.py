"""How long Firecracker's machines take, from the wish until the guest's processors run, in a jail and with a network.

    python bench/firecracker.py [--rounds N] [--out FILE]

Booted (`boot`) and loaded from a snapshot (`load`) in turns, each a machine of 128 MB and one processor, and the end
of each until nothing is left of it. What the guest does is no part of it: this runs where guests do not boot, too.
`bare` is the same Firecracker loading the same snapshot without a jailer, as a child, asked by the same client.
Wants Firecracker and the guest's kernel where `./dev.sh test` keeps them. Writes bench/out/firecracker.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from aether.runtimes.firecracker import jail  # noqa: E402
from aether.runtimes.firecracker.api import Api, load_calls  # noqa: E402
from aether.runtimes.firecracker.machine import Snapshot  # noqa: E402
from aether.runtimes.firecracker.runtime import FirecrackerRuntime  # noqa: E402
from aether.runtimes.microvm.network import inside, make_network  # noqa: E402
from support.firecracker import FILES, PROGRAMS, options, running  # noqa: E402
from support.microvm import code, spec  # noqa: E402


async def bare(folder: Path) -> float:
    """Milliseconds from the fork until the guest of the snapshot in `folder` runs on."""
    network = make_network(0)
    began = time.perf_counter()
    place = folder / jail.SOCKET
    place.unlink(missing_ok=True)

    def spawn() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["/bin/sh", "-c", f'exec chroot . /firecracker --id bare --api-sock /{jail.SOCKET} --level Error'],
            cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    process = inside(network.namespace, spawn)
    try:
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(os.fspath(place))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
                await asyncio.sleep(0.001)
        sock.setblocking(False)
        api = await Api.over(sock)
        for call in load_calls({}):
            await api.make(call)
        took = (time.perf_counter() - began) * 1000
        api.close()
        return took
    finally:
        process.kill()
        process.wait()
        network.close()


def make_root(folder: Path, files: dict[str, Path]) -> None:
    """What a bare Firecracker needs to find: the same names as in a jail."""
    (folder / "dev" / "net").mkdir(parents=True)
    for name, device in (("kvm", (10, 232)), ("net/tun", (10, 200)), ("urandom", (1, 9))):
        os.mknod(folder / "dev" / name, 0o020600, os.makedev(*device))
    for name, path in files.items():
        target = folder / name
        target.write_bytes(path.read_bytes())
        target.chmod(0o700)


async def measure(rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"boot": [], "load": [], "bare": [], "end": []}
    with tempfile.TemporaryDirectory(prefix="aether-bench-") as name:
        data = Path(name)
        runtime = FirecrackerRuntime(data / "data", options())
        work = code(data / "code.tgz", FILES)
        try:
            first = await running(await runtime.launch(spec(work, "first")))
            taken = await first.take_snapshot(data / "state", data / "memory")
            files = {jail.ROOTFS: first.plan.files[jail.ROOTFS], jail.CODE: first.plan.files[jail.CODE]}
            make_root(data / "bare", {**files, jail.STATE: taken.state, jail.MEMORY: taken.memory,
                                      "firecracker": PROGRAMS.firecracker})  # fmt: skip
            await runtime.stop("first", 0.0)
            for _ in range(rounds):
                for kind in ("boot", "load"):
                    found[kind].append(await once(runtime, work, taken if kind == "load" else None, found["end"]))
                found["bare"].append(await bare(data / "bare"))
        finally:
            await runtime.close()
    return found


async def once(runtime: FirecrackerRuntime, work: object, snapshot: Snapshot | None, ends: list[float]) -> float:
    began = time.perf_counter()
    await running(await runtime.launch(spec(work, "one"), snapshot))  # type: ignore[arg-type]
    took = (time.perf_counter() - began) * 1000
    began = time.perf_counter()
    await runtime.stop("one", 0.0)
    ends.append((time.perf_counter() - began) * 1000)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "firecracker.json")
    given = parser.parse_args()
    found = asyncio.run(measure(given.rounds))
    result = {
        name: {
            "p50_ms": round(statistics.median(each), 1),
            "min_ms": round(min(each), 1),
            "max_ms": round(max(each), 1),
        }
        for name, each in found.items()
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"rounds": given.rounds, "load_average": os.getloadavg()[0], **result}
    given.out.write_text(json.dumps(report, indent=2) + "\n")
    for name, each in result.items():
        print(f"{name:5} p50 {each['p50_ms']:7.1f} ms   {each['min_ms']:.1f}–{each['max_ms']:.1f}")


if __name__ == "__main__":
    main()
