"""What came of a series as a page of the docs: phase × fault → outcomes with their counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from support.faults.cells import CLI, NEW, OLD, RIVALS, SERVER, Fault, Phase, fits
from support.faults.series import Row

_BLOCKS = (
    ("The server", [fault for fault in Fault if fault in SERVER]),
    ("The client", [fault for fault in Fault if fault in CLI or fault is Fault.VANISH]),
    ("Two deploys at once", [fault for fault in Fault if fault in RIVALS]),
    ("Processes of the old release", [fault for fault in Fault if fault in OLD]),
    ("Processes of the new release", [fault for fault in Fault if fault in NEW]),
)

_HEAD = """# Fault runs

`./dev.sh faults` kills, cuts off or doubles something in every phase of a change to an app, on a real `aether up`
with sandboxed instances, and then checks what is left. This page is what it wrote: {runs} runs with seed {seed},
**{verdict}**.

After each fault the server is started again if it was killed, everything comes to rest, and these rules are checked:

- **Answers.** A visitor asks all the time. No request fails, except while the server itself is down, or while the
  only instance was killed and is being replaced. When only the server died, no instance is started anew.
- **Releases.** One active deployment, the app points at it, release numbers are dense and unique; a change that was
  repeated by its client is there once. No fault of the server loses a deployment.
- **Told.** What the client was told is what is on record.
- **Remains.** The instances that run are those that are wanted, each with all of its helper processes; no process,
  cgroup, instance folder, staging file or upload is left.
- **Artifacts.** No row without its object, no object without its row; the newest one downloads with its digest.
- **Next.** The next deployment works at once.
- **Logs.** The app's lines are there once.

Cells are outcomes with their counts: *promoted* (the new release serves), *failed*, *cancelled*, *rolled back* (the
old one does), *not begun* (the fault came before there was a deployment); with two deploys both outcomes. *Over
before the fault* means that there was nothing left to hit. Where a strike falls within a phase is drawn from the
seed, so counts differ a little from machine to machine; a bad row is marked **BAD**.
"""


def page(rows: Sequence[Row], seed: int) -> str:
    bad = [row for row in rows if row.problems]
    verdict = f"{len(bad)} bad rows" if bad else "no bad row"
    parts = [_HEAD.format(runs=len(rows), seed=seed, verdict=verdict)]
    for title, faults in _BLOCKS:
        parts.append(f"\n## {title}\n\n{_table(rows, faults)}")
    return "".join(parts)


def _table(rows: Sequence[Row], faults: Sequence[Fault]) -> str:
    names = " | ".join(str(fault).partition(": ")[2] + f" ({str(fault).partition(': ')[0]})" for fault in faults)
    lines = [f"| phase | {names} |", "|---" * (len(faults) + 1) + "|"]
    for phase in Phase:
        if any(fits(phase, fault) for fault in faults):
            lines.append(f"| {phase} | " + " | ".join(_cell(rows, phase, fault) for fault in faults) + " |")
    return "\n".join(lines) + "\n"


def _cell(rows: Sequence[Row], phase: Phase, fault: Fault) -> str:
    mine = [row for row in rows if (row.phase, row.fault) == (phase, fault)]
    counts = Counter("**BAD** " + row.outcome if row.problems else row.outcome for row in mine)
    return ", ".join(f"{outcome} {count}" for outcome, count in sorted(counts.items())) or "–"
