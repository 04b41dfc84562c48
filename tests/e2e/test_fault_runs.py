"""Fault runs on a real `aether up`: a seeded choice that meets every phase and every fault; AETHER_FAULT_RUNS asks
for more. `./dev.sh faults` runs every cell and writes docs/faults.md."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from support.faults.cells import CELLS, Fault, Phase
from support.faults.series import Row, cells_for, play

SEED = int(os.environ.get("AETHER_FAULT_SEED", "1"))


def covering(seed: int) -> list[tuple[Phase, Fault]]:
    """Few cells in which every phase and every fault appears, chosen by the seed."""
    left: set[Phase | Fault] = {*Phase, *Fault}
    found: list[tuple[Phase, Fault]] = []
    cells = random.Random(seed).sample(CELLS, len(CELLS))
    while left:
        best = max(cells, key=lambda cell: len(left.intersection(cell)))
        left.difference_update(best)
        found.append(best)
    return found


@pytest.mark.timeout(900)
def test_fault_runs_have_no_bad_row(tmp_path: Path) -> None:
    cells = covering(SEED)
    runs = int(os.environ.get("AETHER_FAULT_RUNS", "0"))
    cells += cells_for(max(0, runs - len(cells)), SEED)
    told: list[Row] = []
    rows = play(tmp_path, cells, SEED, told.append)
    bad = [f"{row.phase} / {row.fault} ({row.driver}): {row.problems} {row.detail}" for row in rows if row.problems]
    assert not bad, "\n".join(bad)
    assert {row.phase for row in rows} == set(Phase)
    assert {row.fault for row in rows} == set(Fault)
    hit = [row for row in rows if row.outcome != "over before the fault"]
    assert len(hit) > len(rows) * 0.6, "most faults came too late: the phases are not what they were measured to be"
