"""How fast lines go from an app's write to `aether logs --follow`, against `tail -F` of a file with the same writer.

    python bench/logs.py [--lines N] [--pairs N] [--out FILE]

One Node.js program writes N numbered lines of 100 bytes as fast as its standard output takes them: once as an app of
an `aether up` of our own (pipe, keeper, file, server, edge, command), once into a file that `tail -F` follows. Both
are timed from its first byte (for the file: its start) to the last line at the reader, interleaved (A B B A). Every
line must arrive, in order, or the run fails. Writes bench/out/logs.json.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from cli import server

ROOT = Path(__file__).resolve().parents[1]
LINE = 100
# rotation must not be faster than a reader that shares its CPUs with writer, keeper, server and edge
LARGE = {"AETHER_APP_LOG_BYTES": str(1 << 30)}
# With a PORT a request for /N makes it write N lines, else its argument does; it says nothing else.
WRITER = """
const fs = require('fs');
const write = (count) => {
  let text = '';
  for (let n = 1; n <= count; n++) {
    text += (String(n).padStart(9, '0') + ' ').padEnd(LENGTH, 'x') + '\\n';
    if (text.length > 60000) { put(text); text = ''; }
  }
  put(text);
};
const put = (text) => {
  let data = Buffer.from(text);
  while (data.length) {
    try { data = data.subarray(fs.writeSync(1, data)); } catch (error) { if (error.code !== 'EAGAIN') throw error; }
  }
};
if (process.env.PORT) {
  require('http').createServer((q, s) => { s.end('ok'); setImmediate(() => write(Number(q.url.slice(1)))); })
    .listen(process.env.PORT);
} else {
  write(Number(process.argv[2]));
}
""".replace("LENGTH", str(LINE - 1))


def arrive(stream: IO[bytes], count: int, number: Callable[[bytes], int]) -> float:
    """Read until line `count` is there; returns when that was. Raises SystemExit when a line is missing."""
    expected, rest = 1, b""
    while expected <= count:
        data = stream.read1(1 << 20)  # type: ignore[attr-defined]
        if not data:
            raise SystemExit(f"the reader ended at line {expected}")
        lines = (rest + data).split(b"\n")
        rest = lines.pop()
        if not lines:
            continue
        first, last = number(lines[0]), number(lines[-1])
        if first and (first != expected or last - first != len(lines) - 1):
            raise SystemExit(f"lines are missing or doubled at {expected}: {first} to {last} in {len(lines)} lines")
        if last:
            expected = last + 1
    return time.perf_counter()


def plain(line: bytes) -> int:
    return int(line[:9])


def from_json(line: bytes) -> int:
    said = json.loads(line)["line"]
    return int(said[:9]) if said[:9].isdigit() else 0


def from_text(line: bytes) -> int:
    said = line.partition(b" | ")[2][:9]
    return int(said) if said.isdigit() else 0


def by_tail(folder: Path, writer: Path, count: int) -> float:
    path = folder / "plain.log"
    path.write_bytes(b"")
    reader = subprocess.Popen(["tail", "-F", "-n", "0", str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert reader.stdout is not None
        time.sleep(0.3)
        began = time.perf_counter()
        env = {name: value for name, value in os.environ.items() if name != "PORT"}
        with path.open("ab") as out, subprocess.Popen(["node", str(writer), str(count)], stdout=out, env=env) as node:
            ended = arrive(reader.stdout, count, plain)
            node.wait()
        return ended - began
    finally:
        reader.kill()
        reader.wait()


def by_aether(aether: str, env: dict[str, str], count: int, form: str) -> float:
    host = env["AETHER_API_BASE"].removeprefix("http://")
    command = [aether, "logs", "--follow", "--app", "writer", "--tail", "0", "--format", form]
    reader = subprocess.Popen(command, env=env, stdout=subprocess.PIPE)
    try:
        assert reader.stdout is not None
        time.sleep(1.0)
        began = time.perf_counter()
        connection = http.client.HTTPConnection(host, timeout=30)
        connection.request("GET", f"/{count}", headers={"Host": f"writer.localhost:{host.rpartition(':')[2]}"})
        connection.getresponse().read()
        return arrive(reader.stdout, count, from_json if form == "json" else from_text) - began
    finally:
        reader.kill()
        reader.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=200_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "logs.json")
    arguments = parser.parse_args()
    aether = shutil.which("aether", path=str(Path(sys.executable).parent)) or "aether"
    results: dict[str, object] = {"lines": arguments.lines, "line_bytes": LINE, "pairs": arguments.pairs}
    with tempfile.TemporaryDirectory(prefix="aether-bench-logs-") as scratch, server(aether, LARGE) as env:
        folder = Path(scratch)
        project = folder / "writer"
        project.mkdir()
        (project / "server.js").write_text(WRITER)
        (project / "package.json").write_text(json.dumps({"name": "writer", "scripts": {"start": "node server.js"}}))
        subprocess.run([aether, "deploy", str(project)], env=env, check=True, stdout=subprocess.DEVNULL)
        for form in ("json", "text"):
            tails: list[float] = []
            ours: list[float] = []
            for pair in range(arguments.pairs):
                for tail in (True, False) if pair % 2 == 0 else (False, True):
                    if tail:
                        tails.append(by_tail(folder, project / "server.js", arguments.lines))
                    else:
                        ours.append(by_aether(aether, env, arguments.lines, form))
            ratios = [a / t for a, t in zip(ours, tails, strict=True)]
            secs = statistics.median(ours)
            results[form] = {
                "lines_per_s": round(arguments.lines / secs),
                "mb_per_s": round(arguments.lines * LINE / secs / 1e6, 1),
                "tail_lines_per_s": round(arguments.lines / statistics.median(tails)),
                "time_ratio": round(statistics.median(ratios), 2),
                "range": [round(min(ratios), 2), round(max(ratios), 2)],
            }
            print(form, json.dumps(results[form]))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
