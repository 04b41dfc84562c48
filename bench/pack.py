"""Packing against the tools people have: `tar | pigz -6`, `tar | pigz -1`, `tar | cat` (SPEC section 9).

Every run is a process of its own, interpreter start included, on the same tree with the same output folder. Pairs are
interleaved A B B A; what is printed and written to bench/out/pack.json is the median of the ratios and their range.
Our artifact is flushed to disk within the measured time, theirs is not. Needs tar and pigz; Linux.

    python bench/pack.py [--pairs 7] [--cold-pairs 3] [--tree DIR]
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MIN_FILES, MIN_BYTES = 18_000, 400_000_000
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aether-bench"
OUT = Path(__file__).parent / "out"
PACKAGES = {
    "@babel/preset-env": "7",
    "@mui/material": "5",
    "aws-sdk": "2",
    "date-fns": "3",
    "eslint": "8",
    "express": "4",
    "googleapis": "140",
    "jest": "29",
    "next": "14",
    "react": "18",
    "react-dom": "18",
    "rxjs": "7",
    "three": "0.160",
    "typescript": "5",
    "webpack": "5",
}
PROGRAM = """
import sys
from pathlib import Path
from aether.artifact.pack import pack
from aether.artifact.tree import scan
pack(scan(sys.argv[1]), Path(sys.argv[2]))
"""
BARS = {"pigz6": 0.25, "pigz1": 0.6, "size": 1.05, "cold": 1.15, "rss_mb": 200.0}


@dataclass
class Run:
    seconds: float
    rss_mb: float


def timed(argv: list[str]) -> Run:
    """Run a command to its end: wall seconds and the peak memory of its largest process."""
    started = time.perf_counter()
    pid = os.posix_spawnp(argv[0], argv, os.environ)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"failed: {' '.join(argv)}")
    return Run(seconds, usage.ru_maxrss / 1024)


def measure_tree(tree: Path) -> tuple[int, int]:
    files = size = 0
    for base, _, names in os.walk(tree):
        for name in names:
            found = os.lstat(os.path.join(base, name))
            files, size = files + 1, size + found.st_size
    return files, size


def install_tree(tree: Path) -> bool:
    """Real packages by npm; False when it cannot be had."""
    if shutil.which("npm") is None:
        return False
    tree.mkdir(parents=True, exist_ok=True)
    (tree / "package.json").write_text(json.dumps({"name": "tree", "version": "1.0.0", "dependencies": PACKAGES}))
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--legacy-peer-deps"]
    return subprocess.run(command, cwd=tree, check=False, stdout=sys.stderr).returncode == 0


def generate_tree(tree: Path) -> None:
    """Source-like text and some binaries, the same on every machine."""
    source = random.Random(20)
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 12))) for _ in range(4000)]
    marks = [" ", " ", " ", ".", "(", ")", ";\n", " = ", ", ", "{\n  ", "}\n"]
    for number in range(22_000):
        folder = tree / "node_modules" / f"package-{number // 40}" / ("lib" if number % 3 else "dist")
        folder.mkdir(parents=True, exist_ok=True)
        size = int(source.paretovariate(1.1) * 3000) % 400_000
        text = "".join(word + source.choice(marks) for word in source.choices(words, k=size // 8))
        (folder / f"file-{number}.js").write_text(text)
    for number in range(40):
        (tree / "node_modules" / f"package-{number}" / "addon.node").write_bytes(source.randbytes(2_500_000))


def prepare_tree(wanted: Path | None) -> Path:
    tree = wanted or CACHE / "pack-tree-1"
    done = tree.with_name(tree.name + ".ready")
    if wanted is None and not done.exists():
        shutil.rmtree(tree, ignore_errors=True)
        if not install_tree(tree):
            shutil.rmtree(tree, ignore_errors=True)
            generate_tree(tree)
        done.touch()
    files, size = measure_tree(tree)
    if files < MIN_FILES or size < MIN_BYTES:
        raise SystemExit(
            f"{tree} has {files} files and {size} bytes; at least {MIN_FILES} and {MIN_BYTES} are needed"
        )
    return tree


class Bench:
    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.out = CACHE / "pack-out"

    def clear(self) -> None:
        """Every run starts with an empty output folder and nothing of the run before waiting for the disk."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        os.sync()

    def ours(self) -> Run:
        self.clear()
        return timed([sys.executable, "-c", PROGRAM, str(self.tree), str(self.out)])

    def shell(self, behind: str) -> Run:
        self.clear()
        return timed(["/bin/sh", "-c", f'tar -C "$1" -c . | {behind} > "$2"', "sh", str(self.tree), self.their_file])

    @property
    def their_file(self) -> str:
        return str(self.out / "theirs")

    def size(self) -> int:
        return max(path.stat().st_size for path in self.out.iterdir())


def pairs(count: int, ours: Callable[[], Run], theirs: Callable[[], Run]) -> tuple[dict[str, float], list[Run]]:
    """Interleaved A B B A: the median of the ratios and their range, the medians of the seconds, our runs."""
    ratios: list[float] = []
    a_runs: list[Run] = []
    b_runs: list[Run] = []
    for number in range(count):
        if number % 2:
            b, a = theirs(), ours()
        else:
            a, b = ours(), theirs()
        a_runs.append(a)
        b_runs.append(b)
        ratios.append(a.seconds / b.seconds)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
        "ours_s": round(statistics.median(run.seconds for run in a_runs), 3),
        "theirs_s": round(statistics.median(run.seconds for run in b_runs), 3),
        "pairs": count,
    }, a_runs


def drop_caches() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def cold(run: Callable[[], Run], clear: Callable[[], None]) -> Callable[[], Run]:
    def inner() -> Run:
        clear()
        drop_caches()
        return run()

    return inner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--cold-pairs", type=int, default=3, help="0 leaves the cold runs out")
    parser.add_argument("--tree", type=Path, help="a tree of your own")
    arguments = parser.parse_args()
    tree = prepare_tree(arguments.tree)
    files, size = measure_tree(tree)
    bench = Bench(tree)
    bench.shell("cat")
    bench.ours()
    our_size = bench.size()
    bench.shell("pigz -1")
    their_size = bench.size()

    result: dict[str, object] = {"files": files, "bytes": size, "cpus": os.cpu_count()}
    runs: list[Run] = []
    for name, behind in (("pigz6", "pigz -6"), ("pigz1", "pigz -1"), ("cat", "cat")):
        result[name], ours = pairs(arguments.pairs, bench.ours, lambda behind=behind: bench.shell(behind))
        runs += ours
    result["size"] = {"ratio": round(our_size / their_size, 4), "ours": our_size, "pigz1": their_size}
    result["rss_mb"] = round(max(run.rss_mb for run in runs), 1)
    if arguments.cold_pairs and drop_caches():
        # the same commands without the outputs' own clearing, which would bring pages back
        bare_ours = [sys.executable, "-c", PROGRAM, str(tree), str(bench.out)]
        bare_cat = ["/bin/sh", "-c", 'tar -C "$1" -c . | cat > "$2"', "sh", str(tree), bench.their_file]
        result["cold"], _ = pairs(
            arguments.cold_pairs,
            cold(lambda: timed(bare_ours), bench.clear),
            cold(lambda: timed(bare_cat), bench.clear),
        )
    bench.clear()
    report(result)


def report(result: dict[str, object]) -> None:
    print(f"{result['files']} files, {int(str(result['bytes'])) / 1e6:.0f} MB, {result['cpus']} CPUs")
    for name, title in (
        ("pigz6", "first pack / tar | pigz -6"),
        ("pigz1", "first pack / tar | pigz -1"),
        ("cat", "same tree again / tar | cat (information)"),
        ("cold", "cold pages / tar | cat"),
    ):
        found = result.get(name)
        if not isinstance(found, dict):
            continue
        bar = BARS.get(name)
        verdict = "" if bar is None else f"  bar {bar}: {'holds' if found['ratio'] <= bar else 'MISSED'}"
        print(
            f"{title:44} {found['ratio']:.3f}  [{found['low']:.3f}..{found['high']:.3f}]"
            f"  {found['ours_s']:.2f} s / {found['theirs_s']:.2f} s{verdict}"
        )
    size = result["size"]
    assert isinstance(size, dict)
    print(f"{'output / pigz -1':44} {size['ratio']:.3f}  bar {BARS['size']}")
    print(f"{'peak RSS':44} {result['rss_mb']} MB  bar {BARS['rss_mb']:.0f}")
    OUT.mkdir(exist_ok=True)
    (OUT / "pack.json").write_text(json.dumps({**result, "bars": BARS}, indent=2) + "\n")


if __name__ == "__main__":
    main()
