"""A function in a microVM that is booted, against one that goes on from a snapshot: of its runtime, or its own.

    python bench/microvm.py [--pairs N] [--of runtime|function] [--runtime node|python] [--memory MB] [--out FILE]

The function is the smallest HTTP server there is for the language. Its code, the guest and the snapshot are made
before; a snapshot of the function is good for one start, so the next one is made between two. Per start: until /init
has called the host (the guest has booted, or has gone on), until the function listens, and until its first answer, in
wall time and in processor time of the monitor, which is everything the guest did.
Interleaved (A B B A); prints medians and their ratios, and the memory of an instance restored from a runtime snapshot
that is its own (PSS), alone and beside another one. Writes bench/out/microvm.json.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from aether.model.function_instance import Code, CodeForm, FunctionSpec, StartKind
from aether.runtimes.microvm import leftovers
from aether.runtimes.microvm.qemu import QemuOptions, QemuRuntime

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("AETHER_DEV_CACHE", Path.home() / ".cache" / "aether-dev"))
SOURCES = {
    "node": ("index.js", "require('http').createServer((q, s) => s.end('hello')).listen(process.env.PORT)"),
    "python": (
        "main.py",
        "import http.server, os\n"
        "class Hello(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200)\n"
        "        self.end_headers()\n"
        "        self.wfile.write(b'hello')\n"
        "http.server.HTTPServer(('0.0.0.0', int(os.environ['PORT'])), Hello).serve_forever()\n",
    ),
}
TICK = os.sysconf("SC_CLK_TCK")
Mark = tuple[float, float]
"""Seconds of wall time and of processor time since the start."""


@dataclass
class Taken:
    up: Mark
    ready: Mark
    answer: Mark


class Side:
    def __init__(self, data: Path, code: Code, language: str, memory_mb: int, *, snapshots: str) -> None:
        options = QemuOptions(
            kernel_root=CACHE / "kernel",
            guests_dir=CACHE / "guests",
            snapshots=bool(snapshots),
            snapshots_dir=data / "kept",
        )
        self.runtime = QemuRuntime(data, options)
        self.kind = StartKind.RESTORED if snapshots else StartKind.COLD
        self._own = snapshots == "function"
        self._scope = leftovers.scope(data)
        self._code, self._language, self._memory_mb = code, language, memory_mb
        self._count = 0

    def spec(self) -> FunctionSpec:
        self._count += 1
        name = f"bench-{self._count}"
        entry = SOURCES[self._language][0]
        return FunctionSpec(
            name, "bench", self._language, self._code, entry, memory_mb=self._memory_mb, ready_secs=300.0,
            snapshot=self._own,
        )  # fmt: skip

    def pid(self, name: str) -> int:
        return leftovers.running(self._scope)[name][0][0]

    async def take(self) -> Taken:
        spec = self.spec()
        began = time.monotonic()

        def mark() -> Mark:
            return time.monotonic() - began, used(self.pid(spec.instance_id))

        start = asyncio.create_task(self.runtime.start(spec))
        while spec.instance_id not in await self.runtime.list():
            await asyncio.sleep(0)
        # when the guest has called is nobody's business but this measurement's
        await self.runtime._machines[spec.instance_id][0].up.wait()  # pyright: ignore[reportPrivateUsage]
        up = mark()
        await start
        ready = mark()
        assert await self.answer(spec.instance_id) == b"hello"
        taken = Taken(up, ready, mark())
        assert (await self.runtime.status(spec.instance_id)).start == self.kind
        await self.runtime.stop(spec.instance_id, 0.0)
        await self.runtime.settle()
        return taken

    async def answer(self, name: str) -> bytes:
        loop = asyncio.get_running_loop()
        with await self.runtime.connect(name) as sock:
            await loop.sock_sendall(sock, b"GET / HTTP/1.0\r\n\r\n")
            found = b""
            while data := await loop.sock_recv(sock, 65536):
                found += data
        return found.partition(b"\r\n\r\n")[2]


def used(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def pss_mb(pid: int) -> float:
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return round(next(int(row.split()[1]) for row in rows if row.startswith("Pss:")) / 1024, 1)


async def memory(side: Side) -> dict[str, float]:
    """PSS of one restored instance after its first answer, alone, and of each of two."""
    names: list[str] = []
    found: dict[str, float] = {}
    for count in (1, 2):
        spec = side.spec()
        await side.runtime.start(spec)
        await side.answer(spec.instance_id)
        names.append(spec.instance_id)
        found[f"pss_mb_of_{count}"] = statistics.mean(pss_mb(side.pid(name)) for name in names)
    for name in names:
        await side.runtime.stop(name, 0.0)
    return found


def packed(folder: Path, language: str) -> Code:
    name, text = SOURCES[language]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text.encode()))
    path = folder / "code.tar.gz"
    path.write_bytes(out.getvalue())
    return Code(path, CodeForm.TAR_GZ, sha256(out.getvalue()).hexdigest())


async def measure(pairs: int, language: str, memory_mb: int, of: str) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="aether-bench-") as folder:
        work = Path(folder)
        code = packed(work, language)
        cold, restored = (
            Side(work / name, code, language, memory_mb, snapshots=of if name == "restored" else "")
            for name in ("cold", "restored")
        )
        found: list[tuple[Taken, Taken]] = []
        try:
            for side in (cold, restored):
                await side.runtime.prepare(language, code)
            began = time.monotonic()
            assert await restored.runtime.make_snapshot(language, 1, memory_mb)
            made = time.monotonic() - began
            if of == "function":
                first = restored.spec()
                await restored.runtime.start(first)
                await restored.runtime.stop(first.instance_id, 0.0)
                await restored.runtime.settle()
            await restored.take()  # reads the snapshot into memory, once per server
            for number in range(pairs):
                if number % 2:
                    after = await restored.take()
                    found.append((await cold.take(), after))
                else:
                    before = await cold.take()
                    found.append((before, await restored.take()))
            pss = await memory(restored) if of == "runtime" else {}
        finally:
            await cold.runtime.close()
            await restored.runtime.close()
    results: dict[str, object] = {"runtime": language, "of": of, "memory_mb": memory_mb, "pairs": pairs}
    for until in ("up", "ready", "answer"):
        for index, unit in enumerate(("wall", "cpu")):
            pairs_of = [(getattr(one, until)[index], getattr(two, until)[index]) for one, two in found]
            ratios = [two / one for one, two in pairs_of]
            results[f"{until}_{unit}"] = {
                "cold_s": round(statistics.median(one for one, _ in pairs_of), 2),
                "restored_s": round(statistics.median(two for _, two in pairs_of), 2),
                "ratio": round(statistics.median(ratios), 3),
                "range": [round(min(ratios), 3), round(max(ratios), 3)],
            }
    return {**results, **pss, "making_s": round(made, 2), "load": [round(value, 1) for value in os.getloadavg()]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--runtime", choices=sorted(SOURCES), default="node")
    parser.add_argument("--of", choices=("runtime", "function"), default="runtime")
    parser.add_argument("--memory", type=int, default=128)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "microvm.json")
    options = parser.parse_args()
    found = asyncio.run(measure(options.pairs, options.runtime, options.memory, options.of))
    print(json.dumps(found, indent=2))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"bench": "microvm", "results": {"start": found}}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
