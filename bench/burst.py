"""A hundred functions that are called for the first time at once, against a bare script that starts the same.

Both sides start the same instances on the same runtime, as many at a time as the other (A B B A). What is compared is
the time until the last but one in a hundred has its answer: of the calls, and of a script that starts an instance,
connects and asks. Each side starts from an empty folder; code is unpacked before. The runtime is `process`, where a
start is short, so that what gateway, scaler, stores and worker add is a large part of it.
Writes bench/out/burst.json.

    python bench/burst.py [--functions 100] [--parallel 4] [--pairs 4] [--check RATIO]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import uvloop  # noqa: E402

from aether.functions.scaling import Rules  # noqa: E402
from aether.functions.worker import WorkerOptions  # noqa: E402
from aether.model.function_instance import FunctionSpec  # noqa: E402
from aether.runtimes.process.functions import ProcessFunctions  # noqa: E402
from support.functions import running_functions  # noqa: E402
from support.microvm import code  # noqa: E402

SERVER = """
import os, socket
listener = socket.create_server(("0.0.0.0", int(os.environ["PORT"])))
while True:
    connection, _ = listener.accept()
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\nhi")
    connection.close()
"""


async def through_aether(count: int, parallel: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        rules = Rules(idle_secs=600.0, last_idle_secs=600.0)
        options = WorkerOptions("local", parallel, ready_secs=60.0)
        async with running_functions(Path(folder), rules=rules, start_secs=60.0, worker=options) as it:
            for number in range(count):
                it.put(SERVER, name=f"f{number}", function_id=str(uuid.uuid4()))
            await it.routed(1, f"f{count - 1}")
            await it.runtime.prepare("python", next(iter(it.shelf.codes.values())))
            began = time.monotonic()

            async def call(number: int) -> float:
                status, text = await it.get(name=f"f{number}")
                if (status, text) != (200, "hi"):
                    raise RuntimeError(f"{status} {text}")
                return time.monotonic() - began

            return await asyncio.gather(*(call(number) for number in range(count)))


async def bare(count: int, parallel: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        runtime = ProcessFunctions(Path(folder) / "process")
        made = code(Path(folder) / "code.tgz", {"main.py": SERVER})
        await runtime.prepare("python", made)
        turns = asyncio.Semaphore(parallel)
        loop = asyncio.get_running_loop()
        began = time.monotonic()

        async def start(number: int) -> float:
            async with turns:
                spec = FunctionSpec(uuid.uuid4().hex[:12], f"f{number}", "python", made, "main.py")
                await runtime.start(spec)
            with await runtime.connect(spec.instance_id) as sock:
                await loop.sock_sendall(sock, b"GET / HTTP/1.1\r\nHost: f\r\n\r\n")
                if not (await loop.sock_recv(sock, 65536)).endswith(b"hi"):
                    raise RuntimeError("no answer")
            return time.monotonic() - began

        try:
            return await asyncio.gather(*(start(number) for number in range(count)))
        finally:
            await runtime.close()


def p99(values: list[float]) -> float:
    return sorted(values)[max(0, round(len(values) * 0.99) - 1)]


async def main(options: argparse.Namespace) -> int:
    sides = {"aether": through_aether, "bare": bare}
    found: dict[str, list[float]] = {"aether": [], "bare": []}
    for number in range(options.pairs):
        for name in ("aether", "bare") if number % 2 else ("bare", "aether"):
            found[name].append(p99(await sides[name](options.functions, options.parallel)))
            print(f"{name}: p99 {found[name][-1]:.2f} s", file=sys.stderr)
    ratios = [ours / theirs for ours, theirs in zip(found["aether"], found["bare"], strict=True)]
    median = statistics.median(ratios)
    print(
        f"{options.functions} functions at once, {options.parallel} starts at a time: p99 {median:.3f} x bare "
        f"(range {min(ratios):.3f} to {max(ratios):.3f}, {options.pairs} pairs; "
        f"{statistics.median(found['aether']):.2f} s and {statistics.median(found['bare']):.2f} s)"
    )
    out = ROOT / "bench" / "out"
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "bench": "burst",
        "functions": options.functions,
        "parallel": options.parallel,
        "ratios": ratios,
        **found,
    }
    (out / "burst.json").write_text(json.dumps(result, indent=2) + "\n")
    return int(options.check is not None and min(ratios) > options.check)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", type=int, default=100)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--check", type=float, help="exit 1 when the whole range lies above this ratio")
    sys.exit(uvloop.run(main(parser.parse_args())))
