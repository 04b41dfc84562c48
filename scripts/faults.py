"""Fault runs: kills, cuts and doubles something in every phase of a change to an app and checks what is left.

    ./dev.sh faults [--runs N] [--seed S] [--only PHASE/FAULT] [--out FILE]

Ends with 1 when a run broke a rule (see tests/support/faults/invariants.py); a whole series writes docs/faults.md.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.faults.cells import CELLS  # noqa: E402
from support.faults.series import Row, cells_for, play  # noqa: E402
from support.faults.table import page  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=len(CELLS), help=f"default {len(CELLS)}: every cell once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", metavar="PHASE/FAULT", help="only cells whose names begin like this")
    parser.add_argument("--verbose", action="store_true", help="show what each client was told")
    parser.add_argument(
        "--out", type=Path, help="where the table goes (default: docs/faults.md after a whole series)"
    )
    arguments = parser.parse_args()
    # as Ctrl-C: the server and its instances are taken down first
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    phase, _, fault = arguments.only.partition("/")
    cells = [cell for cell in CELLS if cell[0].startswith(phase) and cell[1].startswith(fault)]
    if not cells:
        parser.error(f"no cell begins with '{arguments.only}'")

    def tell(row: Row) -> None:
        print(
            f"{row.number:4} {row.phase:24} {row.fault:36} {row.driver:4} {row.secs:5.1f} s  {row.outcome}",
            flush=True,
        )
        if row.problems or arguments.verbose:
            print(f"     {row.detail}", flush=True)
        for problem in row.problems:
            print(f"     BAD {problem}", flush=True)

    with tempfile.TemporaryDirectory(prefix="aether-faults-") as scratch:
        rows = play(Path(scratch), cells_for(arguments.runs, arguments.seed, cells), arguments.seed, tell)
    bad = [row for row in rows if row.problems]
    whole = not arguments.only and arguments.runs >= len(CELLS)
    out = arguments.out or (ROOT / "docs" / "faults.md" if whole else None)
    if out is not None:
        out.write_text(page(rows, arguments.seed))
    print(f"{len(rows)} runs, {len(bad)} bad rows, {sum(row.secs for row in rows):.0f} s (seed {arguments.seed})")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
