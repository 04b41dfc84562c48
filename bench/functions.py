"""How long a function takes from its start until it listens, as a sandboxed process, against `node` started bare.

    python bench/functions.py [--pairs N] [--out FILE]

The function is the smallest HTTP server there is for Node.js. Its code is unpacked and its sandbox tried before; the
start is what a cold caller waits for. Both sides are observed alike, by the kernel's table of listening sockets,
interleaved (A B B A). `own_ms` is what the driver adds, pair by pair. Writes bench/out/functions.json.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from hashlib import sha256
from pathlib import Path

from aether.model.function_instance import Code, CodeForm, FunctionSpec
from aether.runtimes.interpreters import node_program
from aether.runtimes.process.functions import ProcessFunctions
from aether.runtimes.process.shim.listening import OPEN, Look

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "require('http').createServer((q, s) => s.end('hello')).listen(process.env.PORT)"
LOOK_SECS = 0.003
NODE = node_program()


async def bare(file: Path) -> float:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    look = Look(port)
    began = time.perf_counter()
    process = subprocess.Popen([NODE, file], env={"PORT": str(port), "NODE_ENV": "production"})
    try:
        while look.now() != OPEN:
            await asyncio.sleep(LOOK_SECS)
        return (time.perf_counter() - began) * 1000
    finally:
        process.kill()
        process.wait()
        look.close()


async def sandboxed(runtime: ProcessFunctions, code: Code) -> float:
    name = f"bench-{os.getpid()}"
    began = time.perf_counter()
    await runtime.start(FunctionSpec(name, "bench", "node", code, "index.js"))
    took = (time.perf_counter() - began) * 1000
    await runtime.stop(name, 0.0)
    return took


def packed(folder: Path) -> Code:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        info = tarfile.TarInfo("index.js")
        info.size = len(SOURCE)
        archive.addfile(info, io.BytesIO(SOURCE.encode()))
    path = folder / "code.tar.gz"
    path.write_bytes(out.getvalue())
    return Code(path, CodeForm.TAR_GZ, sha256(out.getvalue()).hexdigest())


async def measure(pairs: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="aether-bench-") as folder:
        work = Path(folder)
        (work / "index.js").write_text(SOURCE)
        code = packed(work)
        runtime = ProcessFunctions(work / "data")
        try:
            await runtime.prepare("node", code)
            await bare(work / "index.js")
            await sandboxed(runtime, code)
            found: list[tuple[float, float]] = []
            for number in range(pairs):
                if number % 2:
                    ours = await sandboxed(runtime, code)
                    found.append((await bare(work / "index.js"), ours))
                else:
                    theirs = await bare(work / "index.js")
                    found.append((theirs, await sandboxed(runtime, code)))
        finally:
            await runtime.close()
    own = [ours - theirs for theirs, ours in found]
    ratios = [ours / theirs for theirs, ours in found]
    return {
        "pairs": pairs,
        "node_ms": round(statistics.median(theirs for theirs, _ in found), 1),
        "function_ms": round(statistics.median(ours for _, ours in found), 1),
        "own_ms": round(statistics.median(own), 1),
        "own_range": [round(min(own), 1), round(max(own), 1)],
        "ratio": round(statistics.median(ratios), 2),
        "range": [round(min(ratios), 2), round(max(ratios), 2)],
        "load": [round(value, 1) for value in os.getloadavg()],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "functions.json")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    found = asyncio.run(measure(options.pairs))
    print(json.dumps(found))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"bench": "functions", "results": {"start": found}}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
