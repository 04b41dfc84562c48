"""How long the installed `aether` takes to start, against `python -c pass` by the same interpreter.

    python bench/cli.py [--pairs N] [--api-base URL] [--out FILE]

`--help` does nothing but start; `list` asks a live server (one of its own unless --api-base names one, with
AETHER_TOKEN or the session for it). Both are measured interleaved (A B B A), each pair gives one ratio, and the
median and the range of the ratios are what counts. Writes bench/out/cli.json; exit 1 when a median misses its bar.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BARS = {"help": 1.6, "list": 5.0}
START_SECS = 60.0
RUNS_PER_SAMPLE = 5


def timed(command: list[str], env: dict[str, str]) -> float:
    """Milliseconds of the fastest of a few runs: the noise of a shared machine only ever adds."""
    best = float("inf")
    for _ in range(RUNS_PER_SAMPLE):
        started = time.perf_counter()
        done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        took = (time.perf_counter() - started) * 1000
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed with {done.returncode}: {done.stderr.decode()}")
        best = min(best, took)
    return best


def compare(baseline: list[str], subject: list[str], env: dict[str, str], pairs: int) -> dict[str, object]:
    """Interleaved samples of both commands and what they come to."""
    before: list[float] = []
    after: list[float] = []
    for number in range(pairs):
        order = ((baseline, before), (subject, after))
        for command, samples in order if number % 2 == 0 else order[::-1]:
            samples.append(timed(command, env))
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    return {
        "baseline_ms": round(statistics.median(before), 2),
        "ms": round(statistics.median(after), 2),
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "pairs": pairs,
    }


@contextmanager
def server(aether: str, settings: Mapping[str, str] | None = None) -> Iterator[dict[str, str]]:
    """A running, logged-in `aether up`; yields the environment of its user."""
    with tempfile.TemporaryDirectory(prefix="aether-bench-") as home, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        env = {name: value for name, value in os.environ.items() if not name.startswith("AETHER_")}
        env |= {f"XDG_{kind}_HOME": f"{home}/{kind.lower()}" for kind in ("DATA", "CONFIG", "CACHE")}
        env |= settings or {}
        env["AETHER_API_BASE"] = f"http://127.0.0.1:{port}"
        with open(f"{home}/up.stderr", "wb") as errors:
            up = subprocess.Popen(
                [aether, "up", "--port", str(port)], env=env, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        try:
            assert up.stdout is not None
            for line in up.stdout:
                if "aether login" in line:
                    break
            else:
                raise SystemExit(f"aether up ended with {up.wait()}: {Path(home, 'up.stderr').read_text()}")
            subprocess.run([aether, "login"], env=env, check=True, stdout=subprocess.DEVNULL)
            for name in ("one", "two", "three"):
                subprocess.run([aether, "apps", "create", name], env=env, check=True, stdout=subprocess.DEVNULL)
            yield env
        finally:
            up.terminate()
            try:
                up.wait(START_SECS)
            except subprocess.TimeoutExpired:
                up.kill()
                up.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--api-base", help="a running server instead of one started for this")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "cli.json")
    options = parser.parse_args()
    # an installation has its bytecode; without it the compiler would be measured
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # the installed script beside the interpreter that runs this file: same interpreter on both sides
    aether = str(Path(sys.executable).parent / "aether")
    python = [sys.executable, "-c", "pass"]
    results: dict[str, object] = {"help": compare(python, [aether, "--help"], dict(os.environ), options.pairs)}
    if options.api_base:
        env = {**os.environ, "AETHER_API_BASE": options.api_base}
        results["list"] = compare(python, [aether, "list"], env, options.pairs)
    else:
        with server(aether) as env:
            results["list"] = compare(python, [aether, "list"], env, options.pairs)
    missed = []
    for name, bar in BARS.items():
        found = results[name]
        assert isinstance(found, dict)
        found["bar"] = bar
        if found["ratio"] > bar:
            missed.append(name)
        print(
            f"{name:<5} {found['ms']:>7} ms  {found['ratio']:>6} x python -c pass ({found['baseline_ms']} ms), "
            f"range {found['range'][0]} to {found['range'][1]}, bar {bar}"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"bench": "cli", "python": sys.version.split()[0], "results": results}, indent=2)
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
