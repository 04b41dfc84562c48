"""What a first call waits for beyond its instance: a cold call through Aether against a bare start of the same.

Both sides start one instance of the same function on the same runtime and ask it once, interleaved (A B B A): a call
to a function that has no instance (edge, line, scaler, store, queue, worker, runtime, edge), and a script that starts
the instance, connects and asks. `own_ms` is the difference, pair by pair. With `--runtime qemu` each instance is a
virtual machine that boots (snapshots off); with `process` it is a sandbox. Writes bench/out/coldstart.json.

    python bench/coldstart.py [--runtime process|qemu] [--pairs 7] [--check RATIO]
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

from aether.functions.ports import FunctionRuntime  # noqa: E402
from aether.functions.scaling import Rules  # noqa: E402
from aether.model.function_instance import FunctionSpec  # noqa: E402
from aether.runtimes.microvm.qemu import QemuRuntime  # noqa: E402
from aether.runtimes.process.functions import ProcessFunctions  # noqa: E402
from support import microvm  # noqa: E402
from support.functions import FUNCTION_ID, Functions, running_functions  # noqa: E402

SERVER = """
import os, socket
listener = socket.create_server(("0.0.0.0", int(os.environ["PORT"])))
while True:
    connection, _ = listener.accept()
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\nhi")
    connection.close()
"""
GONE_AT_ONCE = Rules(idle_secs=0.2, last_idle_secs=0.2, stable_secs=1.0, panic_secs=1.0)


async def through_aether(it: Functions) -> float:
    """Milliseconds from the call to its answer; returns when its instance is gone again."""
    began = time.monotonic()
    answer = await it.get()
    took = time.monotonic() - began
    if answer != (200, "hi"):
        raise RuntimeError(str(answer))
    await it.until(lambda state: not state.instances)
    await it.engine.worker.ended(FUNCTION_ID)
    return took * 1000


async def bare(it: Functions) -> float:
    loop = asyncio.get_running_loop()
    (code,) = it.shelf.codes.values()
    spec = FunctionSpec(uuid.uuid4().hex[:12], "bare", "python", code, "main.py", ready_secs=120.0)
    began = time.monotonic()
    await it.runtime.start(spec)
    with await it.runtime.connect(spec.instance_id) as sock:
        await loop.sock_sendall(sock, b"GET / HTTP/1.1\r\nHost: f\r\n\r\n")
        if not (await loop.sock_recv(sock, 65536)).endswith(b"hi"):
            raise RuntimeError("no answer")
    took = time.monotonic() - began
    await it.runtime.stop(spec.instance_id, 0.0)
    return took * 1000


async def main(options: argparse.Namespace) -> int:
    found: dict[str, list[float]] = {"aether": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        runtime: FunctionRuntime = ProcessFunctions(Path(folder) / "process")
        if options.runtime == "qemu":
            await runtime.close()
            microvm.need_machines()
            runtime = QemuRuntime(Path(folder) / "qemu", microvm.options(snapshots=False))
        async with running_functions(Path(folder), rules=GONE_AT_ONCE, start_secs=120.0, runtime=runtime) as it:
            await it.routed(it.put(SERVER))
            sides = {"aether": through_aether, "bare": bare}
            for side in sides.values():
                await side(it)
            for number in range(options.pairs):
                for name in ("aether", "bare") if number % 2 else ("bare", "aether"):
                    found[name].append(await sides[name](it))
    pairs = list(zip(found["aether"], found["bare"], strict=True))
    ratios, own = [ours / theirs for ours, theirs in pairs], [ours - theirs for ours, theirs in pairs]
    print(
        f"a cold call / a bare start ({options.runtime}): median {statistics.median(ratios):.3f} x "
        f"(range {min(ratios):.3f} to {max(ratios):.3f}, {options.pairs} pairs); own {statistics.median(own):.1f} ms "
        f"({min(own):.1f} to {max(own):.1f}) beside {statistics.median(found['bare']):.0f} ms"
    )
    out = ROOT / "bench" / "out"
    out.mkdir(parents=True, exist_ok=True)
    result = {"bench": "coldstart", "runtime": options.runtime, "ratios": ratios, "own_ms": own, **found}
    (out / f"coldstart-{options.runtime}.json").write_text(json.dumps(result, indent=2) + "\n")
    return int(options.check is not None and min(ratios) > options.check)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", choices=("process", "qemu"), default="process")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--check", type=float, help="exit 1 when the whole range lies above this ratio")
    sys.exit(uvloop.run(main(parser.parse_args())))
