"""Phases of a warm `aether deploy` (unchanged project, then a one-file edit) and the memory of an idle `aether up`.

The peer measured in the same run is the least that any deploy must do with the same bytes: `tar c | gzip -1` and
`npm start` until it answers (an upload is left out in the peer's favour). Prints medians and the ratio of the whole
deploy to that floor; writes bench/out/deploy.json.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.product import Product, copy_example, free_port  # noqa: E402  (the path is set above)


def process_tree(pid: int) -> list[int]:
    """`pid` and its descendants."""
    parents: dict[int, list[int]] = {}
    for proc in Path("/proc").iterdir():
        if proc.name.isdigit():
            try:
                fields = (proc / "stat").read_text().rsplit(") ", 1)[1].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(proc.name))
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        todo += parents.get(one, [])
    return found


def memory_kib(pid: int, key: str) -> int:
    """A field of /proc/PID/smaps_rollup in KiB (Rss, Pss)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    return 0


def cpu_secs(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def floor_once(tree: Path, work: Path) -> float:
    """Seconds to tar and compress `tree` and start it bare until it answers once."""
    started = time.perf_counter()
    subprocess.run(f"tar -C '{tree}' -c . | gzip -1 > '{work}/floor.tar.gz'", shell=True, check=True)
    port = free_port()
    app = subprocess.Popen(
        ["npm", "start", "--silent"], cwd=tree, env=os.environ | {"PORT": str(port)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/")
                connection.getresponse().read()
                break
            except OSError:
                time.sleep(0.005)
        return time.perf_counter() - started
    finally:
        os.killpg(app.pid, 15)
        app.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    pairs = parser.parse_args().pairs
    home = Path(tempfile.mkdtemp(prefix="aether-bench-"))
    product = Product(home / "home")
    product.home.mkdir()
    try:
        product.start()
        product.login()
        assert product.process is not None
        pid = product.process.pid
        time.sleep(3)
        before = cpu_secs(pid)
        time.sleep(10)
        idle = {
            "rss_mib": memory_kib(pid, "Rss") / 1024,
            "pss_mib": memory_kib(pid, "Pss") / 1024,
            "cpu_percent": (cpu_secs(pid) - before) * 10,
        }
        project = copy_example("express", home / "express")
        first = product.deploy(project).json
        bare = copy_example("express", home / "bare")
        subprocess.run(["npm", "ci", "--omit=dev", "--silent"], cwd=bare, check=True)
        edits: list[dict[str, float]] = []
        floors: list[float] = []
        answers: list[float] = []
        unchanged: list[dict[str, float]] = []

        def edited(n: int) -> None:
            text = (ROOT / "examples/express/server.js").read_text()
            (project / "server.js").write_text(text.replace("Hello from", f"Edit {n} from"))
            started = time.perf_counter()
            result = product.deploy(project).json
            status, body = product.get("hello")
            answers.append((time.perf_counter() - started) * 1000)
            assert status == 200, body
            assert f"Edit {n} " in body, body
            edits.append(result["timings_ms"])

        for n in range(pairs):
            if n % 2:
                floors.append(floor_once(bare, home))
                edited(n)
            else:
                edited(n)
                floors.append(floor_once(bare, home))
            unchanged.append(product.deploy(project).json["timings_ms"])
        ratios = [edit["total"] / 1000 / floor for edit, floor in zip(edits, floors, strict=True)]
        apps = {"rss_mib": sum(memory_kib(p, "Rss") for p in process_tree(pid)) / 1024}
        result = {
            "artifact_bytes": first["size_bytes"],
            "cold_first_deploy_ms": first["timings_ms"],
            "edited_ms": {k: statistics.median(e[k] for e in edits) for k in edits[0]},
            "unchanged_ms": {k: statistics.median(e[k] for e in unchanged) for k in unchanged[0]},
            "edit_to_first_answer_ms": statistics.median(answers),
            "floor_ms": statistics.median(floors) * 1000,
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "idle_up": idle,
            "server_process_after": apps,
        }
    finally:
        product.close()
        shutil.rmtree(home, ignore_errors=True)
    print(json.dumps(result, indent=2))
    out = ROOT / "bench" / "out"
    out.mkdir(parents=True, exist_ok=True)
    (out / "deploy.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
